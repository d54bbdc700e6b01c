"""Writes the demonstrations of the warm start: right and wrong behaviour, mixed on purpose.

    python examples/workers/make_worker_demos.py --out demos.jsonl [--num 40000] [--seed 1]

One line is `{"id", "role", "messages"}`; the loss is meant for the assistant messages alone. As in
the small world (examples/smallworld/make_demos.py), every demonstration draws its own facts and its
own behaviour, so that the policy learns to read and to choose at random, and reinforcement learning
has something to choose from. A result is whatever the tool says, never something to be computed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import texts as tx
from make_data import Rows, compute, draw_problem, draw_row

PLANNER = {"right": 0.50, "one_step": 0.20, "wrong_step": 0.17, "guess": 0.08, "unclosed": 0.05}
# At a question of one step: "extra" goes on and answers with something nobody asked for.
PLANNER_ONE_STEP = {"right": 0.65, "extra": 0.20, "guess": 0.10, "unclosed": 0.05}
CALCULATOR = {"right": 0.72, "wrong_code": 0.12, "guess": 0.06, "broken": 0.06, "unclosed": 0.04}
ANALYST = {"right": 0.70, "wrong_column": 0.13, "guess": 0.06, "no_column": 0.07, "unclosed": 0.04}
# How often a worker comes back without a report, or with a wrong one.
NO_REPORT, WRONG_REPORT = 0.03, 0.15
# How often lines of the system prompt are missing or out of order: it may change a little.
CHANGED_PROMPT = 0.1

Message = dict[str, str]


@dataclass(frozen=True)
class Step:
    """One thing that a planner asks, and one answer that is not right."""

    subtask: str
    result: str


@dataclass(frozen=True)
class Plan:
    """A question with the steps to its answer."""

    example: str
    question: str
    steps: tuple[Step, ...]
    rows: Rows


def pick(rng: random.Random, weights: dict[str, float]) -> str:
    """Draws a key with probability proportional to its weight."""
    return rng.choices(list(weights), list(weights.values()))[0]


def other(rng: random.Random, options: tuple[str, ...], taken: str) -> str:
    """Draws an option that is not taken."""
    return rng.choice([option for option in options if option != taken])


def draw_calculation(rng: random.Random) -> Plan:
    """A word problem. Half of the operands are foreign to the real questions, results are."""
    problem = draw_problem(rng, has_two=rng.random() < 0.75)
    steps = tuple(
        Step(tx.expression(left, operator, right), str(result))
        for left, operator, right, result in problem.steps
    )
    return Plan("calculator", tx.calculation(problem.first, problem.second), steps, {})


def draw_lookup(rng: random.Random) -> Plan:
    """A question about a database of two rows that no other demonstration knows."""
    product = rng.choice(tx.PRODUCTS)
    row = draw_row(rng, tx.PRODUCT_COLUMNS)
    rows: Rows = {"products": {product: row}, "companies": {}}
    if rng.random() < 0.25:
        column = rng.choice(tuple(tx.PRODUCT_COLUMNS))
        steps = (Step(tx.ask(column, product), row[column]),)
        return Plan("sqlite", tx.lookup((column,), product), steps, rows)
    link, column = rng.choice(tx.LINKS), rng.choice(tuple(tx.COMPANY_COLUMNS))
    company = rows["companies"][row[link]] = draw_row(rng, tx.COMPANY_COLUMNS)
    steps = (
        Step(tx.ask(link, product), row[link]),
        Step(tx.ask(column, row[link]), company[column]),
    )
    return Plan("sqlite", tx.lookup((link, column), product), steps, rows)


def wrong_step(rng: random.Random, plan: Plan, index: int) -> str:
    """A subtask that does not lead to the answer."""
    subtask = plan.steps[index].subtask
    if plan.example == "calculator":
        left, operator, right = subtask.split()
        if rng.random() < 0.3:
            return tx.expression(int(right), operator, int(left))
        return tx.expression(int(left), other(rng, tx.OPERATORS, operator), int(right))
    column, name = subtask.split(" of ")
    columns = tx.PRODUCT_COLUMNS if name in tx.PRODUCTS else tx.COMPANY_COLUMNS
    return tx.ask(other(rng, tuple(columns), column), name)


def draw_result(rng: random.Random, plan: Plan, subtask: str) -> str:
    """Some value that a worker might report for `subtask`."""
    if plan.example == "calculator":
        return rng.choice(tx.NUMBERS)
    column = subtask.split(" of ")[0]
    return rng.choice((tx.PRODUCT_COLUMNS | tx.COMPANY_COLUMNS)[column])


def reported(plan: Plan, subtask: str, value: str) -> str:
    """A worker's report of `value`."""
    return value if plan.example == "calculator" else tx.report(subtask.split(" of ")[0], value)


def planner_turns(rng: random.Random, plan: Plan) -> Iterator[Message]:
    """The turns of a planner after the question."""
    opening = tx.CALCULATE_OPEN if plan.example == "calculator" else tx.ASK_OPEN
    behaviour = pick(rng, PLANNER if len(plan.steps) > 1 else PLANNER_ONE_STEP)
    if behaviour == "guess":
        yield _assistant(tx.boxed(draw_result(rng, plan, plan.steps[-1].subtask)))
        return
    asked = [step.subtask for step in plan.steps]
    if behaviour == "one_step":
        asked = asked[:1]
    elif behaviour == "wrong_step":
        hop = rng.randrange(len(asked))
        asked[hop] = wrong_step(rng, plan, hop)
    elif behaviour == "extra":
        asked.append("")
    last = ""
    for hop, subtask in enumerate(asked):
        if hop and (last != plan.steps[hop - 1].result if hop < len(plan.steps) else True):
            subtask = follow(rng, plan, hop, last)
            if not subtask:
                break
        if behaviour == "unclosed" and (hop + 1 == len(asked) or rng.random() < 0.5):
            yield _assistant(tx.delegate(opening, subtask, "unclosed"))
            if rng.random() < 0.5:
                return
            behaviour = "right"
            yield _user(tx.correction(opening))
        if rng.random() < NO_REPORT:
            yield _assistant(tx.delegate(opening, subtask))
            yield _user(tx.MISSING_REPORT)
        yield _assistant(tx.delegate(opening, subtask))
        # A worker is not always right; the planner has to take its word for it.
        is_known = hop < len(plan.steps) and subtask == plan.steps[hop].subtask
        is_right = is_known and rng.random() >= WRONG_REPORT
        last = plan.steps[hop].result if is_right else draw_result(rng, plan, subtask)
        yield _user(reported(plan, subtask, last))
    yield _assistant(tx.boxed(last))


def follow(rng: random.Random, plan: Plan, hop: int, last: str) -> str:
    """Step `hop` after a step that gave `last`; empty if there is none to take."""
    if plan.example == "calculator":
        if hop < len(plan.steps):
            _, operator, right = plan.steps[hop].subtask.split()
            return tx.expression(int(last), operator, int(right))
        first = plan.steps[0].subtask.split()
        return tx.expression(int(last), rng.choice("+-"), int(rng.choice((first[0], first[2]))))
    if last not in tx.COMPANIES:
        return ""
    if hop < len(plan.steps):
        return tx.ask(plan.steps[hop].subtask.split(" of ")[0], last)
    return tx.ask(rng.choice(tuple(tx.COMPANY_COLUMNS)), last)


def calculator_turns(rng: random.Random, subtask: str) -> Iterator[Message]:
    """The turns of the worker that computes `subtask`."""
    behaviour = pick(rng, CALCULATOR)
    if behaviour == "guess":
        yield _assistant(rng.choice(tx.NUMBERS))
        return
    code = subtask
    if behaviour == "wrong_code":
        left, operator, right = subtask.split()
        code = tx.expression(int(left), other(rng, tx.OPERATORS, operator), int(right))
    if behaviour in ("broken", "unclosed"):
        call = tx.code_call(code, behaviour)
        yield _assistant(call)
        reply = tx.syntax_error(code) if behaviour == "broken" else tx.correction(call)
        if behaviour == "unclosed" and rng.random() < 0.5:
            return
        yield _user(reply)
        if behaviour == "broken" and rng.random() < 0.5:
            yield _assistant(rng.choice(tx.NUMBERS))
            return
    yield _assistant(tx.code_call(code))
    # Any number: what counts is what the tool says.
    value = str(compute_text(code)) if rng.random() < 0.3 else rng.choice(tx.NUMBERS)
    yield _user(value)
    yield _assistant(value)


def compute_text(code: str) -> int:
    """The value of `left operator right`."""
    left, operator, right = code.split()
    return compute(int(left), operator, int(right))


def analyst_turns(rng: random.Random, plan: Plan, subtask: str) -> Iterator[Message]:
    """The turns of the worker that looks `subtask` up."""
    behaviour = pick(rng, ANALYST)
    column, name = subtask.split(" of ")
    table, foreign = ("products", "companies") if name in tx.PRODUCTS else ("companies", "products")
    if behaviour == "guess":
        yield _assistant(tx.report(column, draw_result(rng, plan, subtask)))
        return
    if behaviour == "unclosed":
        call = tx.sql_call(column, table, name, "unclosed")
        yield _assistant(call)
        if rng.random() < 0.5:
            return
        yield _user(tx.correction(call))
    if behaviour == "no_column":
        yield _assistant(tx.sql_call(column, foreign, name))
        yield _user(tx.no_column(column))
        if rng.random() < 0.5:
            yield _assistant(tx.report(column, draw_result(rng, plan, subtask)))
            return
    read = other(rng, tuple(tx.TABLES[table]), column) if behaviour == "wrong_column" else column
    yield _assistant(tx.sql_call(read, table, name))
    value = rng.choice(tx.TABLES[table][read])
    yield _user(tx.table_reply(read, [value]))
    yield _assistant(tx.report(column, value))


def make_demo(rng: random.Random, prompts: dict[str, tuple[str, str]]) -> tuple[str, list[Message]]:
    """One demonstration: its role and its messages. `prompts` are tx.system_prompts by example."""
    plan = draw_calculation(rng) if rng.random() < 0.5 else draw_lookup(rng)
    planner, worker = prompts[plan.example]
    task = plan.question + tx.BOXED_SUFFIX
    if rng.random() < 0.5:
        opening = [_system(vary(rng, planner)), _user(task)]
        return "planner", [*opening, *planner_turns(rng, plan)]
    hop = rng.randrange(len(plan.steps))
    # The subtask counts, not the main task: planners also ask for what nobody wanted.
    subtask = wrong_step(rng, plan, hop) if rng.random() < 0.3 else plan.steps[hop].subtask
    if plan.example == "calculator" and hop:
        subtask = tx.expression(rng.randint(0, tx.MAX_NUMBER), *subtask.split()[1:])
    opening = [_system(vary(rng, worker)), _user(f"Main task: {task}\nYour subtask: {subtask}")]
    turns = (
        calculator_turns(rng, subtask)
        if plan.example == "calculator"
        else analyst_turns(rng, plan, subtask)
    )
    return "worker", [*opening, *turns]


def vary(rng: random.Random, prompt: str) -> str:
    """`prompt`, now and then without some of its lines, or with lines out of order."""
    if rng.random() >= CHANGED_PROMPT:
        return prompt
    lines = prompt.splitlines(keepends=True)
    kept = [line for line in lines if rng.random() < 0.8] or lines[:1]
    if rng.random() < 0.5:
        rng.shuffle(kept)
    if rng.random() < 0.5:
        kept.insert(rng.randrange(len(kept) + 1), kept[0][: rng.randrange(1, 25)])
    return "".join(kept)


def write_demos(out: Path, num: int, seed: int) -> None:
    """Writes `num` demonstrations, one JSON object per line."""
    rng = random.Random(f"demos-{seed}")
    prompts = {example: tx.system_prompts(example) for example in tx.EXAMPLES}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for index in range(num):
            role, messages = make_demo(rng, prompts)
            line = {"id": f"{role}-{index}", "role": role, "messages": messages}
            file.write(json.dumps(line) + "\n")
    print(f"{num} demonstrations in {out}")


def _system(content: str) -> Message:
    return {"role": "system", "content": content}


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=40000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write_demos(args.out, args.num, args.seed)


if __name__ == "__main__":
    main()
