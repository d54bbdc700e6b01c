"""Writes the small world: a document collection and multi-hop questions in the MATPO-data schema.

    python examples/smallworld/make_world.py --out DIR [--seed 1]

Writes `documents.jsonl` ({"id", "url", "title", "text"}) and, for both agent modes,
`matpo_train.parquet`, `matpo_eval.parquet`, `single_agent_train.parquet` and
`single_agent_eval.parquet`. Takes about a second.

Invariants:
* the same seed writes the same bytes;
* no question is in both splits;
* both modes hold the same questions in the same order, only the system prompt and the tools differ.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import lexicon as lx

NUM_EVAL = 64
ONE_HOP_EVERY = (
    8  # one question in eight has one hop, so that "always delegate twice" is not the whole answer
)
DATA_SOURCE = "smallworld"

Facts = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Question:
    """One question: `relations` in the order of their look-up, `hops` the answers on the way."""

    guild: str
    relations: tuple[str, ...]
    hops: tuple[str, ...]

    @property
    def text(self) -> str:
        """The question as asked, without the boxed-answer suffix."""
        return lx.question_text(self.relations, self.guild)

    @property
    def answer(self) -> str:
        """The name that answers the question."""
        return self.hops[-1]


def make_facts(rng: random.Random) -> Facts:
    """Draws a world: four facts per guild and per person, each naming another person."""
    facts: Facts = {}
    for name in lx.GUILDS + lx.PEOPLE:
        relations = lx.GUILD_RELATIONS if name in lx.GUILDS else lx.PERSON_RELATIONS
        # Distinct values on one page: reading the wrong line then always gives a wrong answer.
        values = rng.sample([person for person in lx.PEOPLE if person != name], len(relations))
        facts[name] = dict(zip(relations, values, strict=True))
    return facts


def resolve(facts: Facts, guild: str, relations: tuple[str, ...]) -> tuple[str, ...]:
    """The names met on the way from a guild along `relations`; the last one is the answer."""
    hops: list[str] = []
    name = guild
    for relation in relations:
        name = facts[name][relation]
        hops.append(name)
    return tuple(hops)


def make_questions(facts: Facts, rng: random.Random) -> tuple[list[Question], list[Question]]:
    """All two-hop questions and some one-hop questions, shuffled and split into (train, eval)."""
    two = [(first, second) for first in lx.GUILD_RELATIONS for second in lx.PERSON_RELATIONS]
    long = [Question(g, path, resolve(facts, g, path)) for g in lx.GUILDS for path in two]
    short = [
        Question(g, (r,), resolve(facts, g, (r,))) for g in lx.GUILDS for r in lx.GUILD_RELATIONS
    ]
    rng.shuffle(long)
    rng.shuffle(short)
    mixed: list[Question] = []
    while long and (len(mixed) % ONE_HOP_EVERY or short):
        mixed.append(long.pop() if len(mixed) % ONE_HOP_EVERY else short.pop())
    return mixed[NUM_EVAL:], mixed[:NUM_EVAL]


def make_row(question: Question, index: int, split: str, mode: str) -> dict:
    """One row in the schema of the MATPO-data training configs (`matpo_train_musique`, ...)."""
    system = lx.PLANNER_SYSTEM if mode == "matpo" else lx.SINGLE_SYSTEM
    kwargs = {"create_kwargs": {"ground_truth": question.answer}}
    return {
        "dataset": DATA_SOURCE,
        "data_source": DATA_SOURCE,
        "prompt": [
            {"content": system, "role": "system"},
            {"content": question.text + lx.BOXED_SUFFIX, "role": "user"},
        ],
        "ability": "qa",
        "reward_model": {"ground_truth": question.answer, "style": "rule"},
        "extra_info": {
            "answer": question.answer,
            "evidence_list": None,
            "index": index,
            "need_tools_kwargs": True,
            "question": question.text,
            "question_type": f"{len(question.relations)}hop",
            "split": split,
            "tools_kwargs": {"google_search": kwargs, "scrape": kwargs},
        },
    }


def arrow_schema():
    """The Arrow schema of `matpo_train_musique` and `single_agent_train_musique`."""
    import pyarrow as pa

    text = pa.string()
    kwargs = pa.struct([("create_kwargs", pa.struct([("ground_truth", text)]))])
    extra = pa.struct(
        [
            ("answer", text),
            ("evidence_list", pa.list_(pa.null())),
            ("index", pa.int64()),
            ("need_tools_kwargs", pa.bool_()),
            ("question", text),
            ("question_type", text),
            ("split", text),
            ("tools_kwargs", pa.struct([("google_search", kwargs), ("scrape", kwargs)])),
        ]
    )
    return pa.schema(
        [
            ("dataset", text),
            ("data_source", text),
            ("prompt", pa.list_(pa.struct([("content", text), ("role", text)]))),
            ("ability", text),
            ("reward_model", pa.struct([("ground_truth", text), ("style", text)])),
            ("extra_info", extra),
        ]
    )


def documents(facts: Facts) -> list[dict[str, str]]:
    """The document collection, one page per name."""
    return [
        {
            "id": name,
            "url": lx.BASE_URL + name,
            "title": name,
            "text": lx.page_text(name, facts[name]),
        }
        for name in lx.GUILDS + lx.PEOPLE
    ]


def write_world(out: Path, seed: int) -> None:
    """Writes documents and questions below `out`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    facts = make_facts(rng)
    train, evaluation = make_questions(facts, rng)
    with (out / "documents.jsonl").open("w", encoding="utf-8") as file:
        for document in documents(facts):
            file.write(json.dumps(document) + "\n")
    for mode in ("matpo", "single_agent"):
        for split, questions in (("train", train), ("eval", evaluation)):
            rows = [
                make_row(question, index, split, mode) for index, question in enumerate(questions)
            ]
            table = pa.Table.from_pylist(rows, schema=arrow_schema())
            pq.write_table(table, out / f"{mode}_{split}.parquet")
    print(
        f"{len(lx.GUILDS + lx.PEOPLE)} documents, {len(train)} train and "
        f"{len(evaluation)} eval questions in {out}"
    )


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write_world(args.out, args.seed)


if __name__ == "__main__":
    main()
