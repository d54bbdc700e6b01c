"""Proves that the examples with a calculator and a database agree with what the package does.

Their texts have copies of what tools and agents write, and their policy knows the prompts that are
rendered from their recipes: if either changes, it has to be trained again. Also that a further
worker is a matter of the recipe alone. Does not prove that the policy learns.
"""

from __future__ import annotations

import random
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_matpo.agents import prompts
from megatron_matpo.agents.grammar import CallOutcome
from megatron_matpo.agents.roster import make_roster
from megatron_matpo.agents.tools import ToolSpec
from megatron_matpo.agents.xml_calls import XmlCalls
from megatron_matpo.config import load_recipe
from megatron_matpo.data.chat import Chat
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.mcp_tools.python_sandbox import Sandbox, SandboxLimits, find_isolation
from megatron_matpo.mcp_tools.sqlite_read import Database, QueryError, ReadLimits
from megatron_matpo.rewards.graders import grader

FOLDER = Path(__file__).parents[3] / "examples" / "workers"
sys.path.insert(0, str(FOLDER))
import make_data  # noqa: E402
import make_worker_demos  # noqa: E402
import texts as tx  # noqa: E402

SPLITS = ("calculator_train", "calculator_eval", "sqlite_train", "sqlite_eval")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox(SandboxLimits(), find_isolation())
    yield box
    box.close()


def specs() -> list[ToolSpec]:
    return [
        ToolSpec(server, tool["name"], tool["description"], tool["inputSchema"])
        for server, tools in tx.EXAMPLES.values()
        for tool in tools
    ]


def rows(name: str, folder: Path = FOLDER / "data") -> list[dict]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def shop_content(path: Path) -> list[str]:
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        lines = list(connection.iterdump())
    connection.close()
    return lines


def test_the_committed_data_is_what_the_script_writes(tmp_path: Path) -> None:
    make_data.write_data(tmp_path, seed=1)
    assert shop_content(tmp_path / "shop.sqlite") == shop_content(FOLDER / "data" / "shop.sqlite")
    for name in SPLITS:
        assert rows(name, tmp_path) == rows(name)


def test_splits_are_disjoint() -> None:
    asked = {name: {row["extra_info"]["question"] for row in rows(name)} for name in SPLITS}
    assert not asked["calculator_train"] & asked["calculator_eval"]
    assert not asked["sqlite_train"] & asked["sqlite_eval"]
    assert all(len(rows(name)) == len(asked[name]) for name in SPLITS)


def test_tools_lead_to_the_ground_truth_and_answer_as_demonstrated(sandbox: Sandbox) -> None:
    database = Database(FOLDER / "data" / "shop.sqlite", ReadLimits(max_rows=20))
    for row in rows("sqlite_eval"):
        *relations, name = row["extra_info"]["question"].removeprefix("What is the ").split(" of ")
        for relation in reversed(relations):
            column, table = relation.removeprefix("the "), "products"
            table = "products" if name in tx.PRODUCTS else "companies"
            name = name.removesuffix("?")
            table = "products" if name in tx.PRODUCTS else "companies"
            reply = database.query(f"SELECT {column} FROM {table} WHERE name = '{name}'")
            name = reply.splitlines()[1]
            assert reply == tx.table_reply(column, [name])
        assert name == row["reward_model"]["ground_truth"]
    rng = random.Random(1)
    for _ in range(10):
        problem = make_data.draw_problem(rng, has_two=True)
        for left, operator, right, result in problem.steps:
            code = f"print({tx.expression(left, operator, right)})"
            assert sandbox.run(code).text == str(result)


def test_error_replies_are_as_demonstrated(sandbox: Sandbox) -> None:
    assert sandbox.run("print(12 * 7").text == tx.syntax_error("12 * 7")
    database = Database(FOLDER / "data" / "shop.sqlite", ReadLimits())
    with pytest.raises(QueryError) as caught:
        database.query("SELECT maker FROM companies WHERE name = 'Allanso'")
    assert f"Error: {caught.value}" == tx.no_column("maker")
    assert prompts.missing_report("invalid_call") == tx.MISSING_REPORT


@pytest.mark.parametrize(
    ("example", "call"),
    [
        ("calculator", lambda end: tx.delegate(tx.CALCULATE_OPEN, "12 * 7", end)),
        ("calculator", lambda end: tx.code_call("12 * 7", end)),
        ("sqlite", lambda end: tx.delegate(tx.ASK_OPEN, "maker of Zorvelax", end)),
        ("sqlite", lambda end: tx.sql_call("maker", "products", "Zorvelax", end)),
    ],
)
def test_calls_are_what_the_grammar_takes_them_for(example: str, call) -> None:
    config = load_recipe(str(tx.RECIPES / f"example_{example}.yaml"), [])
    roster = make_roster(config.agents, config.rollout, specs())
    tools = [*roster.planner.tools, *(t for w in roster.workers.values() for t in w.tools)]
    (good,) = XmlCalls().parse(call("good"), tools)
    assert good.outcome is CallOutcome.OK
    (bad,) = XmlCalls().parse(call("unclosed"), tools)
    assert bad.outcome is CallOutcome.UNCLOSED
    assert prompts.correction(bad, XmlCalls()) == tx.correction(call("unclosed"))


def test_the_policy_knows_the_prompts_that_the_recipes_render() -> None:
    tokenizer = Tokenizer.load(FOLDER / "policy")
    for example in tx.EXAMPLES:
        for prompt in tx.system_prompts(example):
            assert "## Server name: " in prompt and "Input JSON schema: {" in prompt
            assert len(tokenizer.encode(prompt)) <= 24, "foreign to it: train it again (README.md)"
    for text in (*tx.PHRASES, *tx.NUMBERS, *tx.PRODUCTS, *tx.COMPANIES, *tx.CITIES, *tx.PEOPLE):
        assert len(tokenizer.encode(text)) == 1, text


def test_demonstrations_are_tokenized_as_rollouts_are() -> None:
    tokenizer = Tokenizer.load(FOLDER / "policy")
    chat = Chat(tokenizer)
    rng = random.Random(1)
    rendered = {example: tx.system_prompts(example) for example in tx.EXAMPLES}
    for _ in range(200):
        _, messages = make_worker_demos.make_demo(rng, rendered)
        ids = list(chat.initial_ids(messages[0]["content"], messages[1]["content"])[0])
        for message, following in zip(messages[2:], [*messages[3:], None], strict=True):
            if message["role"] == "assistant":
                sampled = [*tokenizer.encode(message["content"]), chat.end_of_turn_id]
                ids += sampled
                if following:
                    ids += chat.environment_ids([following["content"]], sampled)[0]
        whole = tokenizer.render(messages, add_generation_prompt=False)
        assert [*ids, *tokenizer.encode("\n")] == tokenizer.encode(whole)
        assert len(ids) < 200


def test_answers_are_graded_as_the_recipe_says() -> None:
    config = load_recipe(str(tx.RECIPES / "example_calculator.yaml"), [])
    assert config.reward.grader == "numeric"
    assert grader("numeric")("115.0", "115") == 1.0
    assert grader("numeric")("116", "115") == 0.0


def test_a_planner_with_both_workers_is_a_few_lines_of_yaml(tmp_path: Path) -> None:
    """The recipe of docs/agents.md."""
    text = (Path(__file__).parents[3] / "docs" / "agents.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("<!-- recipe: both workers -->\n```yaml\n")
    recipe = tmp_path / "both.yaml"
    recipe.write_text(rest.partition("```")[0].replace("base: ", f"base: {tx.RECIPES}/"))
    config = load_recipe(str(recipe), [])
    roster = make_roster(config.agents, config.rollout, specs())
    assert roster.planner.delegates == {"calculator", "analyst"}
    assert {tool.server for tool in roster.workers["analyst"].tools} == {"database"}
    prompt = roster.planner.system_prompt("ignored: the recipe's agents say it all")
    for part in ("## Server name: calculator", "### Tool name: ask_database", "looks one fact up"):
        assert part in prompt
    worker = roster.workers["analyst"].system_prompt("")
    assert "### Tool name: describe_table" in worker and "run_python" not in worker
