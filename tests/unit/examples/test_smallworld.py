"""Proves that the small world agrees with the package that runs it, and that it is deterministic.

Its texts have copies of what the package writes (tool replies, corrections): a policy that was
trained on other texts than it meets would be at a loss. Does not prove that the policy learns.
"""

import json
import random
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from megatron_matpo.agents import prompts
from megatron_matpo.agents.grammar import CallOutcome
from megatron_matpo.agents.roster import SUBTASK_SCHEMA
from megatron_matpo.agents.tools import ToolSpec
from megatron_matpo.agents.xml_calls import XmlCalls
from megatron_matpo.data.chat import Chat
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.mcp_tools.corpus import Corpus
from megatron_matpo.mcp_tools.corpus_server import TOOLS, CorpusTools, Limits

FOLDER = Path(__file__).parents[3] / "examples" / "smallworld"
sys.path.insert(0, str(FOLDER))
import lexicon as lx  # noqa: E402
import make_demos  # noqa: E402
import make_world  # noqa: E402

BROWSE = ToolSpec(lx.PLANNER_SERVER, lx.PLANNER_TOOL, "", SUBTASK_SCHEMA)
WEB = [ToolSpec(lx.WEB_SERVER, tool["name"], "", tool["inputSchema"]) for tool in TOOLS]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    make_world.write_world(out, seed=1)
    return out


@pytest.fixture(scope="module")
def web(world: Path) -> CorpusTools:
    return CorpusTools(Corpus.open(world / "documents.jsonl"), Limits(2, 300, 20_000))


def test_same_seed_same_bytes(world: Path, tmp_path: Path) -> None:
    make_world.write_world(tmp_path, seed=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        file.name for file in world.iterdir()
    )
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (world / file.name).read_bytes()


def test_splits_are_disjoint_and_modes_hold_the_same_questions(world: Path) -> None:
    tables = {file.stem: pq.read_table(file).to_pylist() for file in world.glob("*.parquet")}
    asked = {name: [row["extra_info"]["question"] for row in rows] for name, rows in tables.items()}
    assert not set(asked["matpo_train"]) & set(asked["matpo_eval"])
    assert asked["matpo_train"] == asked["single_agent_train"]
    assert asked["matpo_eval"] == asked["single_agent_eval"]
    for rows in tables.values():
        for row in rows:
            assert [message["role"] for message in row["prompt"]] == ["system", "user"]
            assert row["prompt"][1]["content"].endswith(lx.BOXED_SUFFIX)


def test_every_fact_is_found_first_and_replies_are_as_demonstrated(web: CorpusTools) -> None:
    facts = make_world.make_facts(random.Random(1))
    for name, page in facts.items():
        for relation in page:
            query = lx.ask(relation, name)
            reply, is_error = web.call("google_search", {"q": query, "gl": "us", "hl": "en"})
            hits = json.loads(reply)["organic"]
            assert not is_error and len(hits) == 2
            assert hits[0]["title"] == name and hits[0]["snippet"] == lx.page_intro(name)
            assert reply == lx.search_reply(query, [(hit["title"], hit["snippet"]) for hit in hits])
        reply, _ = web.call("scrape", {"url": lx.BASE_URL + name})
        assert reply == lx.scrape_reply(name, lx.page_text(name, page))


@pytest.mark.parametrize(
    ("call", "tools"),
    [
        (lx.browse_call, [BROWSE]),
        (lx.search_call, WEB),
        (lx.scrape_call, WEB),
    ],
)
def test_calls_are_what_the_grammar_takes_them_for(call, tools) -> None:
    (good,) = XmlCalls().parse(call("founder of Zorvex"), tools)
    assert good.outcome is CallOutcome.OK
    text = call("founder of Zorvex", closed=False)
    (bad,) = XmlCalls().parse(text, tools)
    assert bad.outcome is CallOutcome.UNCLOSED
    assert prompts.correction(bad, XmlCalls()) == lx.correction(text)
    assert prompts.missing_report("invalid_call") == lx.MISSING_REPORT


def test_recipe_texts_are_those_of_the_lexicon() -> None:
    recipe = FOLDER.parents[1] / "recipes" / "smallworld.yaml"
    agents = yaml.safe_load(recipe.read_text(encoding="utf-8"))["agents"]
    worker = agents[lx.PLANNER_SERVER]
    assert worker["system_prompt"] == lx.WORKER_SYSTEM
    assert worker["user_template"] == lx.WORKER_USER_TEMPLATE
    assert prompts.fill(worker["system_prompt"], tools="x") == lx.WORKER_SYSTEM


def test_policy_tokenizes_turn_by_turn_as_at_once() -> None:
    tokenizer = Tokenizer.load(FOLDER / "policy")
    chat = Chat(tokenizer)
    rng = random.Random(1)
    for _ in range(200):
        _, messages = make_demos.make_demo(rng)
        ids = list(chat.initial_ids(messages[0]["content"], messages[1]["content"])[0])
        for message, following in zip(messages[2:], [*messages[3:], None], strict=True):
            if message["role"] == "assistant":
                sampled = [*tokenizer.encode(message["content"]), chat.end_of_turn_id]
                ids += sampled
                if following:
                    ids += chat.environment_ids([following["content"]], sampled)[0]
        whole = tokenizer.render(messages, add_generation_prompt=False)
        assert [*ids, *tokenizer.encode("\n")] == tokenizer.encode(whole)
        assert len(ids) < 320


def test_prompts_are_single_tokens_for_the_policy() -> None:
    tokenizer = Tokenizer.load(FOLDER / "policy")
    for text in (*lx.PHRASES, *lx.RELATIONS, *lx.GUILDS, *lx.PEOPLE):
        assert len(tokenizer.encode(text)) == 1, text
