"""Proves what an episode is: token-in/token-out, order, limits, allow-lists, failures.

The engine and the tools are fakes; the tokenizer is real but has one token per byte.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_matpo.agents.roster import make_roster
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.errors import ConfigError, EngineTimeout, ToolError
from megatron_matpo.types import Role, Status, TurnKind
from tests.helpers.play import AGENTS, LIMITS, ROLLOUT, SINGLE, TASK, by_role, play
from tests.helpers.rollouts import (
    CHATML,
    LLAMA3,
    MISTRAL,
    THINKING,
    FakeToolBox,
    call,
    delegate,
    make_chat,
    search,
)

MATPO = by_role(
    [delegate("find it"), "It is \\boxed{Ada}"],
    [search("it"), "<think>I see.</think>\n\nThe page says Ada."],
)


@pytest.mark.parametrize("template", [CHATML, THINKING, LLAMA3, MISTRAL])
def test_token_in_token_out(template: str) -> None:
    """Each context is the initial ids, then sampled and environment ids in turn, never changed."""
    planner = [f"</think>{delegate('find it')}", "</think>It is \\boxed{Ada}"]
    worker = [f"</think>{search('it')}", "</think>The page says Ada."]
    tree, engine, _ = play(by_role(planner, worker), template=template)
    chat = make_chat(template)
    assert tree.planner.status is Status.ANSWERED
    for item in (tree.planner, *tree.workers):
        outputs = engine.outputs[item.id]
        sampled = [list(turn.token_ids) for turn in item.turns if turn.kind is TurnKind.MODEL]
        assert sampled == outputs and len(outputs) == 2
        expected: list[int] = []
        for turn in item.turns:  # what the engine was given is what the record holds
            if turn.kind is TurnKind.MODEL:
                assert (item.id, expected) in engine.contexts
                assert list(turn.logprobs) == [-(i + 1) / 16 for i in range(len(turn.token_ids))]
            expected = expected + list(turn.token_ids)
        assert item.token_ids == expected
        assert sum(item.loss_mask) == sum(map(len, outputs))
        first = chat.initial_ids(
            "You plan." if item.role is Role.PLANNER else _worker_system(), _user(item)
        )
        assert list(item.turns[0].token_ids) == list(first[0])
        environment = [turn for turn in item.turns if turn.kind is TurnKind.ENVIRONMENT]
        reply = "The page says Ada." if item.role is Role.PLANNER else 'search says {"q": "it"}'
        assert [list(turn.token_ids) for turn in environment] == [
            list(chat.environment_ids([reply], outputs[0])[0])
        ]


def _worker_system() -> str:
    return make_roster(AGENTS, ROLLOUT, FakeToolBox().specs()).workers["browser"].system_prompt("")


def _user(item: object) -> str:
    roster = make_roster(AGENTS, ROLLOUT, FakeToolBox().specs())
    agent = roster.workers["browser"] if item.role is Role.WORKER else roster.planner  # type: ignore[attr-defined]
    return agent.user_message(item.task, item.subtask)  # type: ignore[attr-defined]


def test_tree_has_fields_not_text() -> None:
    tree, _, tools = play(MATPO)
    (worker,) = tree.workers
    assert (tree.planner.role, tree.planner.agent, tree.planner.parent_id) == (
        Role.PLANNER,
        "planner",
        "",
    )
    assert (worker.role, worker.agent, worker.parent_id, worker.spawn_turn) == (
        Role.WORKER,
        "browser",
        "e0.p",
        1,
    )
    assert (worker.task, worker.subtask, tree.planner.task) == (TASK, "find it", TASK)
    assert tree.planner.calls[0].worker_id == worker.id
    assert tools.seen == [("web", "search", {"q": "it"})]
    assert tree.said == "It is \\boxed{Ada}"
    assert f'The main task is: "{TASK}"' in worker.turns[0].text  # quotes and braces survive
    assert 'Your current subtask is: "find it"' in worker.turns[0].text
    assert "Input JSON schema: {" in worker.turns[0].text


def test_a_box_in_the_arguments_of_a_call_is_no_answer() -> None:
    turn = "So far \\boxed{Bob}. " + delegate("check \\boxed{Ada}")
    tree, _, _ = play(
        by_role([turn], []), AGENTS | {"planner": replace(AGENTS["planner"], max_turns=1)}
    )
    assert tree.planner.status is Status.MAX_TURNS
    assert tree.said == "So far \\boxed{Bob}."


def test_the_report_has_no_thoughts_and_no_calls_and_is_capped() -> None:
    long = "x" * 300
    turns = ["<think>secret</think>\n\n" + long + call("web", "nothing")]
    agents = AGENTS | {"browser": replace(AGENTS["browser"], max_invalid_calls=0)}
    tree, _, _ = play(by_role([delegate("a"), "done"], turns), agents)
    assert tree.workers[0].status is Status.INVALID_CALL
    reply = tree.planner.turns[2].text
    assert "secret" not in reply and "use_mcp_tool" not in reply
    assert "x" * 200 in reply and "x" * 201 not in reply
    assert "[... cut: 200 of 300 characters shown]" in reply


def test_a_worker_that_says_nothing_is_reported_as_such() -> None:
    tree, _, _ = play(by_role([delegate("a"), "done"], ["<think>on and on..."]))
    assert tree.workers[0].status is Status.OVERFLOW
    assert "The worker ended without a report (overflow)." in tree.planner.turns[2].text


def test_calls_of_one_turn_run_at_the_same_time_and_answer_in_order() -> None:
    turn = search("slow") + search("bad", closed=True).replace("web", "nowhere") + search("fast")
    tools = FakeToolBox(delays_s={"slow": 0.2, "fast": 0.1})
    agents = {"planner": replace(SINGLE["planner"], max_invalid_calls=5)}
    tree, _, _ = play(by_role([turn, "done"], []), agents, tools)
    reply = tree.planner.turns[2].text
    assert reply.index('{"q": "slow"}') < reply.index("not executed") < reply.index('{"q": "fast"}')
    assert reply.count("<|im_start|>user") == 3
    assert [record.outcome for record in tree.planner.calls] == ["ok", "wrong_server", "ok"]
    slow, _, fast = (record.duration_s for record in tree.planner.calls)
    assert fast < 0.19 <= slow < 0.29  # together, not 0.3
    assert tree.planner.format_score == pytest.approx(2 / 3)


def test_workers_run_at_the_same_time_and_keep_call_order() -> None:
    def script(conversation: str, turn: int, text: str) -> str:
        if conversation.endswith(".p"):
            return [delegate("first") + delegate("second"), "done"][turn]
        return [search("slow" if "first" in text else "quick"), f"report of {conversation}"][turn]

    tools = FakeToolBox(delays_s={"slow": 0.2})
    tree, engine, _ = play(script, tools=tools, delay_s=0.01)
    assert [worker.subtask for worker in tree.workers] == ["first", "second"]
    assert [worker.id for worker in tree.workers] == ["e0.w0", "e0.w1"]
    reply = tree.planner.turns[2].text
    assert reply.index("report of e0.w0") < reply.index("report of e0.w1")
    assert engine.max_running == 2
    assert [record.worker_id for record in tree.planner.calls] == ["e0.w0", "e0.w1"]


def test_allow_lists_hold_in_prompt_and_execution() -> None:
    tree, _, tools = play(
        by_role(
            [search("directly"), delegate("a"), "done"],
            [call("calc", "add", a=1, b=2), delegate("deeper"), "report"],
        ),
        {name: replace(agent, max_invalid_calls=9) for name, agent in AGENTS.items()},
    )
    assert tools.seen == []
    assert [record.outcome for record in tree.planner.calls] == ["unknown_tool", "ok"]
    assert [record.outcome for record in tree.workers[0].calls] == ["unknown_tool"] * 2
    assert "browser / search_and_browse" in tree.planner.turns[2].text
    prompt = tree.workers[0].turns[0].text
    assert "## Server name: web" in prompt and "calc" not in prompt and "browser" not in prompt


def test_allow_list_names_must_exist() -> None:
    agents = {"planner": AgentConfig(role="planner", tools=["webb"], final_summary="never")}
    with pytest.raises(ConfigError, match=r"agents\.planner\.tools=webb.*known: calc, web"):
        make_roster(agents, ROLLOUT, FakeToolBox().specs())
    with pytest.raises(ConfigError, match=r"rollout\.planner=boss"):
        make_roster(AGENTS, replace(ROLLOUT, planner="boss"), [])


@pytest.mark.parametrize(("allowed", "num_turns"), [(0, 1), (1, 2), (2, 3)])
def test_invalid_calls_are_bounded(allowed: int, num_turns: int) -> None:
    agents = {"planner": replace(SINGLE["planner"], max_invalid_calls=allowed)}
    tree, _, _ = play(lambda *_: search("x", closed=False), agents)
    assert tree.planner.status is Status.INVALID_CALL
    assert tree.planner.num_model_turns == num_turns
    assert tree.planner.turns[-1].kind is TurnKind.MODEL
    assert tree.planner.format_score == 0.0


@pytest.mark.parametrize(
    ("message", "num_executed", "num_refused"),
    [
        (call("web", "nothing") * 2, 0, 2),
        (search("x") + call("web", "nothing") * 3, 1, 3),
        (search("x") * 10, 8, 2),  # max_calls_per_turn
    ],
)
def test_the_bound_on_invalid_calls_counts_messages(
    message: str, num_executed: int, num_refused: int
) -> None:
    tree, _, tools = play(by_role([message, "It is \\boxed{y}"], []), SINGLE)
    assert SINGLE["planner"].max_invalid_calls == 1
    assert tree.planner.status is Status.ANSWERED and tree.said == "It is \\boxed{y}"
    assert len(tools.seen) == num_executed
    assert tree.planner.turns[2].text.count("was not executed") == num_refused


def test_a_corrected_call_goes_on() -> None:
    turns = [search("x", closed=False), search("x"), "It is \\boxed{y}"]
    tree, _, tools = play(by_role(turns, []), SINGLE)
    assert tree.planner.status is Status.ANSWERED and len(tools.seen) == 1
    assert tree.planner.format_score == 0.5
    assert "not closed by </use_mcp_tool>" in tree.planner.turns[2].text


def test_tool_errors_are_read_by_the_model() -> None:
    tree, _, _ = play(by_role([search("error"), "done"], []), SINGLE)
    assert tree.planner.status is Status.ANSWERED
    assert "search says" in tree.planner.turns[2].text


def test_max_turns() -> None:
    tree, _, tools = play(lambda *_: search("x"), SINGLE)
    assert tree.planner.status is Status.MAX_TURNS
    assert tree.planner.num_model_turns == 4 and len(tools.seen) == 3
    assert tree.planner.turns[-1].kind is TurnKind.MODEL


def test_a_turn_cut_by_length_overflows_and_is_not_searched_for_calls() -> None:
    tree, engine, tools = play(lambda *_: search("x") + "...", SINGLE)
    assert tree.planner.status is Status.OVERFLOW and tools.seen == []
    assert tree.planner.calls == () and tree.planner.format_score == 1.0
    assert engine.max_tokens == [4096]


def test_per_turn_limit_and_context_bound_the_sample() -> None:
    agents = {"planner": replace(SINGLE["planner"], max_tokens_per_turn=50)}
    _, engine, _ = play(lambda *_: "done", agents)
    assert engine.max_tokens == [50]
    tree, engine, _ = play(lambda *_: "done", SINGLE, limits=replace(LIMITS, context_tokens=200))
    prompt = len(tree.planner.turns[0].token_ids)
    assert engine.max_tokens == [200 - 1 - prompt]


def test_a_reply_that_does_not_fit_is_not_appended() -> None:
    limits = replace(LIMITS, context_tokens=900)
    tree, _, _ = play(lambda *_: search("x" * 300), SINGLE, limits=limits)
    assert tree.planner.status is Status.OVERFLOW
    assert tree.planner.turns[-1].kind is TurnKind.MODEL
    assert tree.planner.num_tokens < 900


def test_a_worker_prompt_of_any_length_is_a_status() -> None:
    tree, _, _ = play(
        by_role([delegate("x" * 3000), "done"], []), limits=replace(LIMITS, context_tokens=5000)
    )
    (worker,) = tree.workers
    assert worker.status is Status.OVERFLOW and worker.num_sampled_tokens == 0
    assert tree.planner.status is Status.ANSWERED
    assert "without a report (overflow)" in tree.planner.turns[2].text


@pytest.mark.parametrize("wanted", ["always", "on_overflow", "never"])
@pytest.mark.parametrize("ending", ["answered", "overflow", "max_turns"])
def test_final_summary(wanted: str, ending: str) -> None:
    def script(conversation: str, turn: int, text: str) -> str:
        if "MUST NOT use any tool" in text:
            return "# Final Response: \\boxed{s}"
        return {"answered": "plain", "overflow": "cut...", "max_turns": search("x")}[ending]

    agents = {
        "planner": replace(
            SINGLE["planner"], final_summary=wanted, summary_reserve_tokens=1500, max_turns=2
        )
    }
    tree, engine, _ = play(script, agents)
    is_due = wanted == "always" or (wanted == "on_overflow" and ending != "answered")
    assert tree.planner.status == ending
    assert ("\\boxed{s}" in tree.said) == is_due
    if is_due and ending == "overflow":  # the cut turn is closed before the request
        assert tree.planner.turns[2].text.startswith("<|im_end|>\n<|im_start|>user\n[SYSTEM]")
        assert "You ran out of context" in tree.planner.turns[2].text
    if wanted != "never":
        assert engine.max_tokens[0] == min(
            4096, 6000 - 1 - 1500 - len(tree.planner.turns[0].token_ids)
        )


def test_worker_summary_is_the_report() -> None:
    def script(conversation: str, turn: int, text: str) -> str:
        if conversation.endswith(".p"):
            return [delegate("a"), "done"][turn]
        return ["raw findings", "# Final Response: neat"][turn]

    agents = AGENTS | {
        "browser": replace(AGENTS["browser"], final_summary="always", summary_reserve_tokens=1000)
    }
    tree, _, _ = play(script, agents)
    assert "# Final Response: neat" in tree.planner.turns[2].text
    request = tree.workers[0].turns[2].text
    assert f'The main task was: "{TASK}"' in request and "Contribution to Main Task" in request


def test_a_failing_tool_ends_the_episode_and_cancels_the_rest() -> None:
    class Tools(FakeToolBox):
        async def call(self, server, tool, arguments):  # type: ignore[no-untyped-def]
            if arguments["q"] == "down":
                raise ToolError("web: the server is gone")
            return await super().call(server, tool, arguments)

    tools = Tools(delays_s={"slow": 3.0})
    tree, _, _ = play(by_role([search("slow") + search("down")], []), SINGLE, tools)
    assert tree.planner.status is Status.TOOL_FAILURE
    assert tree.planner.error == "web: the server is gone"
    assert tools.num_cancelled == 1


def test_a_failing_worker_ends_the_episode() -> None:
    def script(conversation: str, turn: int, text: str) -> str | BaseException:
        if conversation.endswith(".p"):
            return delegate("first") + delegate("second")
        return EngineTimeout("e: no answer") if conversation.endswith("w1") else "report"

    tree, _, _ = play(script)
    assert tree.planner.status is Status.ENGINE_FAILURE
    assert [worker.status for worker in tree.workers] == [Status.ANSWERED, Status.ENGINE_FAILURE]
    assert [worker.error for worker in tree.workers] == ["", "e: no answer"]


def test_the_deadline_names_its_setting() -> None:
    limits = replace(LIMITS, timeout_s=0.05)
    tree, _, _ = play(MATPO, limits=limits, delay_s=0.03)
    assert tree.planner.status is Status.DEADLINE
    assert tree.planner.error == "no end after 0.05 s (rollout.episode_timeout_s)"


def test_prompts_of_the_recipe_replace_the_built_in_ones() -> None:
    agents = {
        "planner": replace(AGENTS["planner"], system_prompt="Plan. {tools} {JSON}"),
        "browser": replace(
            AGENTS["browser"], user_template="{subtask} of {task}", description="Looks things up."
        ),
    }
    tree, _, _ = play(MATPO, agents, rollout=replace(ROLLOUT, prompts="rendered"))
    prompt = tree.planner.turns[0].text
    assert "Plan. Here are the functions" in prompt and "{JSON}" in prompt
    assert "## Server name: browser\n### Tool name: search_and_browse\n" in prompt
    assert "Description: Looks things up." in prompt
    assert f"find it of {TASK}" in tree.workers[0].turns[0].text
