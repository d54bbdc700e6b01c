"""Writes the demonstrations of the warm start: right and wrong behaviour, mixed on purpose.

    python examples/smallworld/make_demos.py --out demos.jsonl [--num 40000] [--seed 1]

One line is `{"id", "role", "messages"}` with role `planner` or `worker` (an agent that has the web
tools itself is a planner without workers); the loss is meant for the assistant messages alone.

Invariants:
* every demonstration draws its own facts, so that nothing about the real world (make_world.py) can
  be learned by heart: the only way to a low loss is to read the context;
* a behaviour is drawn at random, never as a function of the question: a model trained on this
  samples the same mixture, and reinforcement learning has something to choose from;
* a wrong decision shows at the token where it is taken, and what follows is consistent with it.

A malformed call is a block that is never closed. Half of these demonstrations end there, half go on
with an error reply and the corrected call, for runs that give a malformed call another chance
(`agents.*.max_invalid_calls`).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import lexicon as lx
from make_world import resolve

# Shares among the demonstrations; "single" is the agent that has the web tools itself.
KINDS = {"planner": 0.3, "worker": 0.45, "single": 0.25}

# The planner, at a two-hop question.
PLANNER = {"right": 0.45, "one_hop": 0.25, "wrong_relation": 0.15, "guess": 0.10, "unclosed": 0.05}
# The planner, at a one-hop question: "extra" goes on and answers with a hop nobody asked for.
PLANNER_ONE_HOP = {"right": 0.60, "extra": 0.25, "guess": 0.10, "unclosed": 0.05}
WORKER = {"right": 0.70, "wrong_line": 0.15, "no_scrape": 0.10, "unclosed": 0.05}
SINGLE = {"right": 0.30, "one_hop": 0.30, "wrong_line": 0.25, "guess": 0.10, "unclosed": 0.05}

# How often a worker comes back to the planner without a report.
NO_REPORT = 0.03

# For variety: the environment itself answers a malformed call with lexicon.correction.
ERROR_WORDS = (
    "Error: the tool call could not be parsed. Close the block and try again.",
    "Error: malformed tool call.",
    "The call is not valid: expected one complete <use_mcp_tool> block with JSON arguments.",
    "Invalid tool call: unclosed block, missing </use_mcp_tool>. Send the whole call again.",
    "Error: no tool was run. Please check the format of your call.",
)

Message = dict[str, str]


class LazyFacts(dict):
    """A world whose pages are drawn when first read: a demonstration reads two of 144."""

    def __init__(self, rng: random.Random) -> None:
        """Pages are drawn from `rng`."""
        super().__init__()
        self._rng = rng

    def __missing__(self, name: str) -> dict[str, str]:
        """Draws the page of `name`."""
        relations = list(lx.GUILD_RELATIONS if name in lx.GUILDS else lx.PERSON_RELATIONS)
        people = [person for person in self._rng.sample(lx.PEOPLE, 5) if person != name]
        self[name] = dict(zip(relations, people, strict=False))
        return self[name]


def pick(rng: random.Random, weights: dict[str, float]) -> str:
    """Draws a key with probability proportional to its weight."""
    return rng.choices(list(weights), list(weights.values()))[0]


def other(rng: random.Random, options: tuple[str, ...], *taken: str) -> str:
    """Draws an option that is not taken."""
    return rng.choice([option for option in options if option not in taken])


def draw_question(
    rng: random.Random, facts: LazyFacts
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Draws (guild, relations, hops); one question in five has one hop."""
    guild = rng.choice(lx.GUILDS)
    relations: tuple[str, ...] = (rng.choice(lx.GUILD_RELATIONS),)
    if rng.random() < 0.8:
        relations += (rng.choice(lx.PERSON_RELATIONS),)
    return guild, relations, resolve(facts, guild, relations)


def _relations_of(name: str) -> tuple[str, ...]:
    return lx.GUILD_RELATIONS if name in lx.GUILDS else lx.PERSON_RELATIONS


def planner_turns(
    rng: random.Random, guild: str, relations: tuple[str, ...], facts: LazyFacts
) -> list[Message]:
    """The turns of a planner after the question."""
    behaviour = pick(rng, PLANNER if len(relations) > 1 else PLANNER_ONE_HOP)
    asked = list(relations)
    if behaviour == "one_hop":
        asked = asked[:1]
    elif behaviour == "extra":
        asked.append(rng.choice(lx.PERSON_RELATIONS))
    elif behaviour == "wrong_relation":
        hop = rng.randrange(len(asked))
        asked[hop] = other(rng, lx.GUILD_RELATIONS if hop == 0 else lx.PERSON_RELATIONS, asked[hop])
    elif behaviour == "guess":
        return [_assistant(lx.boxed(rng.choice(lx.PEOPLE)))]
    turns: list[Message] = []
    name = guild
    for hop, relation in enumerate(asked):
        if behaviour == "unclosed" and (hop + 1 == len(asked) or rng.random() < 0.5):
            turns.append(_assistant(lx.browse_call(lx.ask(relation, name), closed=False)))
            if rng.random() < 0.5:
                return turns
            behaviour = "right"
            turns.append(_user(draw_correction(rng, turns[-1])))
        if rng.random() < NO_REPORT:
            # The worker came back with nothing, or with its open call: ask again.
            turns.append(_assistant(lx.browse_call(lx.ask(relation, name))))
            open_call = rng.choice(
                (lx.search_call(lx.ask(relation, name), False), lx.scrape_call(name, False))
            )
            turns.append(_user(rng.choice((lx.MISSING_REPORT, open_call))))
        turns.append(_assistant(lx.browse_call(lx.ask(relation, name))))
        # A worker is not always right; the planner has to take its word for it.
        value = facts[name][relation] if rng.random() < 0.8 else rng.choice(lx.PEOPLE)
        turns.append(_user(lx.report(relation, value)))
        name = value
    return [*turns, _assistant(lx.boxed(name))]


def worker_turns(rng: random.Random, relation: str, name: str, facts: LazyFacts) -> list[Message]:
    """The turns of a worker after its subtask."""
    behaviour = pick(rng, WORKER)
    query = lx.ask(relation, name)
    open_at = rng.randrange(2) if behaviour == "unclosed" else -1
    turns: list[Message] = []
    for step, call in enumerate((lx.search_call, lx.scrape_call)):
        argument = query if step == 0 else name
        if step == open_at:
            turns.append(_assistant(call(argument, closed=False)))
            if rng.random() < 0.5:
                return turns
            turns.append(_user(draw_correction(rng, turns[-1])))
        turns.append(_assistant(call(argument)))
        if step == 0:
            reply, hasty = draw_search_reply(rng, query, name)
            turns.append(_user(reply))
            if behaviour == "no_scrape":
                return [*turns, _assistant(hasty)]
    turns.append(_user(draw_page(rng, name, facts)))
    if behaviour == "wrong_line":
        relation = other(rng, _relations_of(name), relation)
    return [*turns, _assistant(lx.report(relation, facts[name][relation]))]


def single_turns(
    rng: random.Random, guild: str, relations: tuple[str, ...], facts: LazyFacts
) -> list[Message]:
    """The turns of an agent that has the web tools itself."""
    behaviour = pick(rng, SINGLE)
    if behaviour == "guess":
        return [_assistant(lx.boxed(rng.choice(lx.PEOPLE)))]
    asked = relations[:1] if behaviour == "one_hop" else relations
    wrong_hop = rng.randrange(len(asked)) if behaviour == "wrong_line" else -1
    turns: list[Message] = []
    note, name = "", guild
    for hop, relation in enumerate(asked):
        query = lx.ask(relation, name)
        if behaviour == "unclosed" and (hop + 1 == len(asked) or rng.random() < 0.5):
            turns.append(_assistant(note + lx.search_call(query, closed=False)))
            if rng.random() < 0.5:
                return turns
            behaviour = "right"
            turns.append(_user(draw_correction(rng, turns[-1])))
            # The note stands in the message that failed; the corrected message is the call alone.
            note = ""
        turns.append(_assistant(note + lx.search_call(query)))
        turns.append(_user(draw_search_reply(rng, query, name)[0]))
        turns.append(_assistant(lx.scrape_call(name)))
        turns.append(_user(draw_page(rng, name, facts)))
        read = other(rng, _relations_of(name), relation) if hop == wrong_hop else relation
        name = facts[name][read]
        note = lx.report(read, name) + "\n"
    return [*turns, _assistant(note + lx.boxed(name))]


def draw_correction(rng: random.Random, turn: Message) -> str:
    """The reply to a malformed call."""
    return lx.correction(turn["content"]) if rng.random() < 0.8 else rng.choice(ERROR_WORDS)


def draw_search_reply(rng: random.Random, query: str, name: str) -> tuple[str, str]:
    """A search result of one to three pages, and the fact that a hasty reader takes from it.

    The server's snippet is the line that has most words of the query. On the right page that is the
    introduction; on any other page it is a fact that has the relation, or the name, in common.
    """
    relation = query.split(" of ")[0]
    hits = [(name, lx.page_intro(name))]
    hasty = lx.report(relation, rng.choice(lx.PEOPLE))
    for other_name in rng.sample([n for n in lx.GUILDS + lx.PEOPLE if n != name], rng.randrange(3)):
        if rng.random() < 0.1:
            hits.append((other_name, lx.page_intro(other_name)))
            continue
        is_person = name in lx.PEOPLE and rng.random() < 0.3
        fact = lx.report(
            rng.choice(_relations_of(other_name)) if is_person else relation,
            name if is_person else rng.choice(lx.PEOPLE),
        )
        hits.append((other_name, fact + "."))
        hasty = fact
    if rng.random() < 0.1:
        rng.shuffle(hits)
    return lx.search_reply(query, hits), hasty


def draw_page(rng: random.Random, name: str, facts: LazyFacts) -> str:
    """The reply to a scrape; the order of the lines varies, as pages do."""
    lines = list(facts[name].items())
    if rng.random() < 0.5:
        rng.shuffle(lines)
    return lx.scrape_reply(name, lx.page_text(name, dict(lines)))


def make_demo(rng: random.Random) -> tuple[str, list[Message]]:
    """One demonstration with a world of its own: its kind (a key of KINDS) and its messages."""
    facts = LazyFacts(rng)
    kind = pick(rng, KINDS)
    guild, relations, hops = draw_question(rng, facts)
    task = lx.question_text(relations, guild) + lx.BOXED_SUFFIX
    if kind == "planner":
        opening = [_system(lx.PLANNER_SYSTEM), _user(task)]
        turns = planner_turns(rng, guild, relations, facts)
    elif kind == "single":
        opening = [_system(lx.SINGLE_SYSTEM), _user(task)]
        turns = single_turns(rng, guild, relations, facts)
    else:
        hop = rng.randrange(len(relations))
        name = guild if hop == 0 else hops[hop - 1]
        relation = relations[hop]
        # The subtask counts, not the main task: planners also ask for what nobody wanted.
        if rng.random() < 0.25:
            relation = rng.choice(_relations_of(name))
        if rng.random() < 0.25:
            name = rng.choice(lx.GUILDS if hop == 0 else lx.PEOPLE)
        subtask = lx.ask(relation, name)
        opening = [
            _system(lx.WORKER_SYSTEM),
            _user(lx.WORKER_USER_TEMPLATE.replace("{task}", task).replace("{subtask}", subtask)),
        ]
        turns = worker_turns(rng, relation, name, facts)
    return kind, opening + turns


def write_demos(out: Path, num: int, seed: int) -> None:
    """Writes `num` demonstrations, one JSON object per line."""
    rng = random.Random(f"demos-{seed}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for index in range(num):
            kind, messages = make_demo(rng)
            role = "worker" if kind == "worker" else "planner"
            line = {"id": f"{kind}-{index}", "role": role, "messages": messages}
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
