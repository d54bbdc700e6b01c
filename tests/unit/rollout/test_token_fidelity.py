"""Proves token-in/token-out on 1,000 multi-turn episodes of a random policy.

What the trainer sees of a trajectory is compared with the log that the engine keeps for itself:
the ids that it was asked to continue and the ids that it returned. The policy is a seeded chaos of
calls, workers, invalid calls, thoughts, turns cut by length, and of ids that are not what a
tokenizer would make of their text (including bytes that are no text at all).
"""

from __future__ import annotations

import asyncio
import random
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron_matpo import wire
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.data import DataConfig
from megatron_matpo.data.chat import Chat
from megatron_matpo.data.samples import to_samples
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.rollout.collect import RolloutManager
from megatron_matpo.types import Role, RolloutBatch, Status, TrainSample, TurnKind, VersionSpan
from tests.helpers.rollouts import (
    CHATML,
    LLAMA3,
    MISTRAL,
    THINKING,
    FakeGeneration,
    FakeToolBox,
    call,
    delegate,
    make_config,
    make_question,
    search,
)

NUM_ROWS, NUM_SAMPLES = 25, 10  # of each template: 4 x 250 episodes
SPECIALS = (
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<s>", "</s>", "[INST]", "[/INST]"),
)
MERGES = ["t h", "th e", "i n", "s e", "e r", "_ n", "a r", "c h", "o o", "oo l", "Ġ a", "u s"]


def merging_tokenizer(template: str) -> Tokenizer:
    """Bytes and a few merges: most texts have many tokenizations."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    bpe = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    bos = "<|begin_of_text|>" if template == LLAMA3 else "<s>"
    return Tokenizer(bpe, template, {"bos_token": bos, "eos_token": "</s>"}, "test")


@dataclass
class ChaoticEngine:
    """Speaks `Sampler`; logs what it was asked and what it returned, by conversation."""

    tokenizer: Tokenizer
    end_id: int
    opens_thinking: bool
    asked: dict[str, list[list[int]]] = field(default_factory=dict)
    returned: dict[str, list[tuple[list[int], list[float]]]] = field(default_factory=dict)
    num_not_canonical: int = 0

    async def sample(
        self, ids: Sequence[int], max_tokens: int, conversation_id: str
    ) -> FakeGeneration:
        turns = self.returned.setdefault(conversation_id, [])
        rng = random.Random(f"{conversation_id}/{len(turns)}")
        self.asked.setdefault(conversation_id, []).append(list(ids))
        out = self._turn(rng, is_planner=conversation_id.endswith(".p"))
        is_cut = len(out) > max_tokens or rng.random() < 0.03
        out = out[: min(max_tokens, rng.randrange(1, len(out) + 1))] if is_cut else out
        logprobs = [-rng.random() for _ in out]
        turns.append((out, logprobs))
        await asyncio.sleep(0)
        return FakeGeneration(
            tuple(out),
            tuple(logprobs),
            "length" if is_cut else "stop",
            (VersionSpan(3, len(out)),),
        )

    def _turn(self, rng: random.Random, is_planner: bool) -> list[int]:
        parts = [rng.choice(["the user is in there", "ü中😀", "<think>so", "</think>", "\n", ""])]
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            good = delegate("find the user") if is_planner else search(rng.choice(["x", "error"]))
            bad = rng.choice([search("x", closed=False), call("web", "nothing"), "<tool_call>{}"])
            parts.append(good if rng.random() < 0.85 else bad)
        if len(parts) == 1:
            parts.append(rng.choice(["\\boxed{Ada}", "\\boxed{Bob}", "nobody"]))
        if self.opens_thinking and rng.random() < 0.9:
            parts.insert(0, "let us see</think>")
        text = "".join(parts)
        ids = self._scrambled(text, rng)
        self.num_not_canonical += ids != self.tokenizer.encode(text)
        return [*ids, self.end_id]

    def _scrambled(self, text: str, rng: random.Random) -> list[int]:
        """Ids of `text`, cut at random places first, at times with a byte that is no text."""
        ids: list[int] = []
        while text:
            size = rng.randrange(1, 12)
            ids += self.tokenizer.encode(text[:size])
            text = text[size:]
        if rng.random() < 0.1:
            ids.insert(0, rng.randrange(128, 200))
        return ids


def collect(template: str) -> tuple[RolloutBatch, list[TrainSample], ChaoticEngine, Chat]:
    """A step of 250 episodes, as the trainer gets it."""
    base = make_config(context_length=5500)
    config = replace(
        base,
        data=DataConfig(prompts_per_step=NUM_ROWS, samples_per_prompt=NUM_SAMPLES),
        agents={
            "planner": AgentConfig(
                role="planner",
                tools=["browser"],
                max_turns=5,
                max_invalid_calls=2,
                summary_reserve_tokens=1500,
                system_prompt="You plan.",
            ),
            "browser": AgentConfig(
                tools=["web"],
                max_turns=4,
                max_invalid_calls=2,
                summary_reserve_tokens=1600,
                context_length=3800,
                system_prompt="You work.",
            ),
        },
    )
    tokenizer = merging_tokenizer(template)
    chat = Chat(tokenizer)
    engine = ChaoticEngine(tokenizer, chat.end_of_turn_id, chat.opens_thinking)
    rows = [make_question(f"Who is the {index}th <|im_end|> user?") for index in range(NUM_ROWS)]
    manager = RolloutManager(config, lambda _: engine, FakeToolBox(), chat, {"train": rows})
    batch = asyncio.run(manager.collect(1, 3))
    batch = wire.decode(wire.encode(batch), "test")
    advantages = {e.id: 1.0 for group in batch.groups for e in group.episodes if e.reward}
    return batch, to_samples(batch, advantages), engine, chat


@pytest.mark.parametrize("template", [CHATML, THINKING, LLAMA3, MISTRAL])
def test_the_trainer_sees_what_the_engine_saw_and_returned(template: str) -> None:
    batch, samples, engine, chat = collect(template)
    assert {sample.trajectory_id for sample in samples} == set(engine.asked)
    for sample in samples:
        ids = [*sample.input_ids, sample.labels[-1]]
        assert sample.labels[:-1] == sample.input_ids[1:]
        asked, returned = engine.asked[sample.trajectory_id], engine.returned[sample.trajectory_id]
        mask, logprobs = [0] * len(ids), [0.0] * len(ids)
        for context, (out, values) in zip(asked, returned, strict=True):
            # The engine continued exactly what the trainer sees, and what it said follows.
            assert ids[: len(context)] == context
            assert ids[len(context) : len(context) + len(out)] == out
            mask[len(context) : len(context) + len(out)] = [1] * len(out)
            logprobs[len(context) : len(context) + len(out)] = array("f", values)
        assert len(ids) == len(asked[-1]) + len(returned[-1][0]), "nothing stands after the last"
        assert list(sample.loss_mask) == mask[1:]
        assert list(sample.rollout_logprobs) == logprobs[1:]
    check_environment(batch, engine, chat)
    check_variety(batch, engine)


def check_environment(batch: RolloutBatch, engine: ChaoticEngine, chat: Chat) -> None:
    """What is not sampled is the text of the turn, tokenized once, and nothing else."""
    for group in batch.groups:
        for item in (item for episode in group.episodes for item in episode.trajectories):
            for turn in item.turns:
                if turn.kind is not TurnKind.MODEL:
                    assert list(turn.token_ids) == engine.tokenizer.encode(turn.text)
            # Outside text cannot end a turn: the question's marker is not the special token.
            ends = [token == chat.end_of_turn_id for token in item.turns[0].token_ids]
            assert sum(ends) <= 2, "at most the system's and the user's own"


def check_variety(batch: RolloutBatch, engine: ChaoticEngine) -> None:
    """The chaos was chaotic, or the test proves little."""
    episodes = [episode for group in batch.groups for episode in group.episodes]
    items = [item for episode in episodes for item in episode.trajectories]
    assert len(episodes) == NUM_ROWS * NUM_SAMPLES
    assert all(episode.reward is not None for episode in episodes), "nothing was left out"
    statuses = Counter(item.status for item in items)
    wanted = {Status.ANSWERED, Status.MAX_TURNS, Status.OVERFLOW, Status.INVALID_CALL}
    assert wanted <= set(statuses), statuses
    assert sum(item.role is Role.WORKER for item in items) > 200
    assert sum(item.num_model_turns > 2 for item in items) > 200
    assert engine.num_not_canonical > 200
