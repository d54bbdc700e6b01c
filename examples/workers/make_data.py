"""Writes what the examples ask: word problems, a database, and questions about it.

    python examples/workers/make_data.py --out DIR [--seed 1]

Writes `shop.sqlite` and, in the schema of the MATPO-data training configs,
`calculator_train.parquet`, `calculator_eval.parquet`, `sqlite_train.parquet` and
`sqlite_eval.parquet`. The rows' system message offers no tools: the prompts of the examples are
rendered from their recipes.

Invariants:
* the same seed writes the same questions and the same database content;
* no question is in both splits.
"""

from __future__ import annotations

import argparse
import random
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import texts as tx

from megatron_matpo.data.schema import DataSet, arrow_schema

NUM_TRAIN, NUM_EVAL = 400, 48
# One question in so many takes one step only, so that "always ask twice" is not the whole answer.
ONE_STEP_EVERY = 5
SYSTEM = "You answer questions."

Rows = dict[str, dict[str, dict[str, str]]]
"""Table -> name -> column -> value."""


@dataclass(frozen=True)
class Question:
    """One question with its answer."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Problem:
    """A word problem: `left operator right`, then perhaps `result operator right`."""

    first: tuple[str, int, int]
    second: tuple[str, int] | None

    @property
    def steps(self) -> list[tuple[int, str, int, int]]:
        """(left, operator, right, result) of each step."""
        operator, left, right = self.first
        steps = [(left, operator, right, compute(left, operator, right))]
        if self.second is not None:
            result = steps[0][3]
            steps.append((result, *self.second, compute(result, *self.second)))
        return steps

    @property
    def is_fit(self) -> bool:
        """All results can be written as numbers of the vocabulary."""
        return all(0 < step[3] <= tx.MAX_NUMBER for step in self.steps)


def compute(left: int, operator: str, right: int) -> int:
    """The result of one step."""
    return {"*": left * right, "+": left + right, "-": left - right}[operator]


def draw_problem(rng: random.Random, has_two: bool) -> Problem:
    """A word problem whose results are all in range."""
    while True:
        operator = rng.choice(tx.OPERATORS)
        high = 15 if operator == "*" else 99
        first = operator, rng.randint(2, high), rng.randint(2, high)
        second = (rng.choice("+-"), rng.randint(2, 99)) if has_two else None
        problem = Problem(first, second)
        if problem.is_fit:
            return problem


def draw_row(rng: random.Random, columns: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """One row's values, all different: reading a wrong column then always shows."""
    while True:
        row = {column: rng.choice(values) for column, values in columns.items()}
        if len(set(row.values())) == len(row):
            return row


def make_rows(rng: random.Random) -> Rows:
    """The database's content."""
    return {
        "products": {name: draw_row(rng, tx.PRODUCT_COLUMNS) for name in tx.PRODUCTS},
        "companies": {name: draw_row(rng, tx.COMPANY_COLUMNS) for name in tx.COMPANIES},
    }


def write_database(path: Path, rows: Rows) -> None:
    """The SQLite file, written anew."""
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as database:
        for table, columns in tx.TABLES.items():
            typed = (
                f"{column} {'INTEGER' if values is tx.NUMBERS else 'TEXT'}"
                for column, values in columns.items()
            )
            database.execute(f"CREATE TABLE {table} (name TEXT PRIMARY KEY, {', '.join(typed)})")
            marks = ", ".join("?" * (len(columns) + 1))
            for name, row in rows[table].items():
                database.execute(f"INSERT INTO {table} VALUES ({marks})", (name, *row.values()))
    database.close()


def calculator_questions(rng: random.Random) -> list[Question]:
    """Different word problems, shuffled."""
    found: dict[str, Question] = {}
    while len(found) < NUM_TRAIN + NUM_EVAL:
        problem = draw_problem(rng, has_two=len(found) % ONE_STEP_EVERY != 0)
        text = tx.calculation(problem.first, problem.second)
        answer = str(problem.steps[-1][3])
        found[text] = Question(text, answer, f"{len(problem.steps)}step")
    return list(found.values())


def sqlite_questions(rng: random.Random, rows: Rows) -> list[Question]:
    """Questions of one and of two look-ups, shuffled."""
    one = [(product, (column,)) for product in tx.PRODUCTS for column in tx.PRODUCT_COLUMNS]
    two = [
        (product, (link, column))
        for product in tx.PRODUCTS
        for link in tx.LINKS
        for column in tx.COMPANY_COLUMNS
    ]
    chosen = rng.sample(one, len(two) // (ONE_STEP_EVERY - 1)) + two
    rng.shuffle(chosen)
    questions: list[Question] = []
    for product, columns in chosen:
        answer = rows["products"][product][columns[0]]
        if len(columns) > 1:
            answer = rows["companies"][answer][columns[1]]
        questions.append(Question(tx.lookup(columns, product), answer, f"{len(columns)}step"))
    return questions


def make_row(question: Question, index: int, split: str, source: str) -> dict:
    """One row in the schema of the MATPO-data training configs (`matpo_train_musique`, ...)."""
    return {
        "dataset": source,
        "data_source": source,
        "prompt": [
            {"content": SYSTEM, "role": "system"},
            {"content": question.text + tx.BOXED_SUFFIX, "role": "user"},
        ],
        "ability": "qa",
        "reward_model": {"ground_truth": question.answer, "style": "rule"},
        "extra_info": {
            "answer": question.answer,
            "evidence_list": None,
            "index": index,
            "need_tools_kwargs": False,
            "question": question.text,
            "question_type": question.kind,
            "split": split,
            "tools_kwargs": None,
        },
    }


def write_data(out: Path, seed: int) -> None:
    """Writes the database and the questions below `out`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.mkdir(parents=True, exist_ok=True)
    schema = arrow_schema(DataSet("musique", "matpo"))
    rows = make_rows(random.Random(f"rows-{seed}"))
    write_database(out / "shop.sqlite", rows)
    asked = {
        "calculator": calculator_questions(random.Random(f"calculator-{seed}")),
        "sqlite": sqlite_questions(random.Random(f"sqlite-{seed}"), rows),
    }
    for name, questions in asked.items():
        for split, part in (("train", questions[NUM_EVAL:]), ("eval", questions[:NUM_EVAL])):
            table = [make_row(question, i, split, name) for i, question in enumerate(part)]
            pq.write_table(
                pa.Table.from_pylist(table, schema=schema), out / f"{name}_{split}.parquet"
            )
        print(f"{name}: {len(questions) - NUM_EVAL} train and {NUM_EVAL} eval questions in {out}")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write_data(args.out, args.seed)


if __name__ == "__main__":
    main()
