"""What our training step costs beside a bare Megatron loop, and what packing saves.

    python benchmarks/actor_step.py --json

One rank on the CPU, a random Qwen3 (--layers x --hidden) whose output layer has about the share of
the work that Qwen3-14B's has (5 %). Lengths are those of `matpo_lengths.py`, divided by
--shrink (40: a context of 1,024 tokens), as is the token budget.

* `overhead`: seconds of `PolicyLearner.learn` over those of a loop that is Megatron's schedule,
  its `GPTModel` with its own cross-entropy of all logits, its DDP and its optimizer's step, on the
  same packed micro-batches and with the same attention, minus 1. All tokens are trained, so that
  both have the same output layer to compute; ours computes its logits twice, to keep none.
  Rounds alternate; each number is the median over them.
* `packed_speedup`: seconds of the step on padded micro-batches over those on packed ones, the same
  trajectories and code. Padded: neighbours in length share a micro-batch and are padded to the
  longest, as many as the budget holds (the best that padding can do); what is padded is masked.
  `padded_arrival_speedup` is the same with micro-batches in the order of arrival.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file: `benchmarks` is no installed package

import torch  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.checkpoint import write_model  # noqa: E402
from benchmarks.matpo_lengths import matpo_step  # noqa: E402
from megatron_matpo.config import Config  # noqa: E402
from megatron_matpo.config.hf_model import HfModelConfig  # noqa: E402
from megatron_matpo.config.train import ModelConfig, OptimConfig, TrainConfig  # noqa: E402
from megatron_matpo.data.schedule import schedule  # noqa: E402
from megatron_matpo.megatron import optimizer  # noqa: E402
from megatron_matpo.megatron.actor import MegatronActor  # noqa: E402
from megatron_matpo.megatron.attention import PackedAttention, packed_params  # noqa: E402
from megatron_matpo.megatron.batch import MicroBatch, PlacedBatch, place  # noqa: E402
from megatron_matpo.megatron.layer_spec import block_spec  # noqa: E402
from megatron_matpo.megatron.model import (  # noqa: E402
    padded_vocab_size,
    transformer_config,
    wrap_ddp,
)
from megatron_matpo.megatron.parallel import (  # noqa: E402
    ParallelState,
    destroy_parallel,
    init_parallel,
)
from megatron_matpo.trainer.learner import PolicyLearner  # noqa: E402
from megatron_matpo.trainer.tensors import to_micro_batch  # noqa: E402
from megatron_matpo.types import Role, TrainSample  # noqa: E402
from tests.helpers.dist import free_port  # noqa: E402

VOCAB_SIZE = 1024


@dataclass(frozen=True)
class Options:
    """Of the command line."""

    hidden: int
    layers: int
    trajectories: int
    shrink: int
    rounds: int
    seed: int


def samples_of(lengths: Sequence[int], seed: int) -> list[TrainSample]:
    """Random trajectories of these lengths, all of whose tokens are trained."""
    generator = torch.Generator().manual_seed(seed)
    samples: list[TrainSample] = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, VOCAB_SIZE, (length + 1,), generator=generator).tolist()
        samples.append(
            TrainSample(
                trajectory_id=str(number),
                episode_id=str(number),
                role=Role.PLANNER,
                input_ids=ids[:-1],
                labels=ids[1:],
                loss_mask=[1] * length,
                rollout_logprobs=[-7.0] * length,
                advantage=1.0 if number % 2 else -1.0,
            )
        )
    return samples


def padded(group: Sequence[TrainSample]) -> list[TrainSample]:
    """The samples of a micro-batch with masked tokens after them, up to the longest."""
    longest = max(len(sample.input_ids) for sample in group)
    result: list[TrainSample] = []
    for sample in group:
        rest = [0] * (longest - len(sample.input_ids))
        result.append(
            replace(
                sample,
                input_ids=sample.input_ids + rest,
                labels=sample.labels + rest,
                loss_mask=sample.loss_mask + rest,
                rollout_logprobs=sample.rollout_logprobs + [0.0] * len(rest),
            )
        )
    return result


def padded_bins(samples: Sequence[TrainSample], budget: int) -> list[list[TrainSample]]:
    """Consecutive samples share a micro-batch while samples x longest fits the budget."""
    bins: list[list[TrainSample]] = []
    for sample in samples:
        group = [*bins[-1], sample] if bins else []
        longest = max((len(item.input_ids) for item in group), default=0)
        if group and len(group) * longest <= budget:
            bins[-1] = group
        else:
            bins.append([sample])
    return [padded(group) for group in bins]


class BareLoop:
    """Megatron's own parts, and nothing of ours but attention and the description of the model."""

    def __init__(self, config: Config, hf: HfModelConfig, state: ParallelState) -> None:
        """Random weights."""
        megatron = transformer_config(config, hf, state)
        megatron.calculate_per_token_loss = False
        model: Any = GPTModel(
            megatron,
            block_spec(megatron, hf, state, None, PackedAttention),  # type: ignore[arg-type]
            vocab_size=padded_vocab_size(hf, 1),
            max_sequence_length=hf.max_positions,
            position_embedding_type="rope",
            rotary_base=hf.rope_theta,  # type: ignore[arg-type]
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        self._models: list[Any] = wrap_ddp(config, [model])
        self._optimizer = optimizer.build_optimizer(config, self._models)
        self._state = state

    def step(self, batches: Sequence[MicroBatch]) -> None:
        """One update of the mean cross-entropy."""
        for model in self._models:
            model.train()
            model.zero_grad_buffer()
        self._optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_bare_forward,
            data_iterator=iter([place(batch, self._state) for batch in batches]),
            model=self._models,
            num_microbatches=len(batches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        self._optimizer.step()


def _bare_forward(batches: Iterator[PlacedBatch], model: Any) -> tuple[Tensor, Any]:
    placed = next(batches)
    losses = model(
        placed.batch.input_ids[None],
        None,
        None,
        labels=placed.batch.labels[None],
        packed_seq_params=packed_params(placed),
    )
    mask = placed.batch.loss_mask

    def finish(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (output[0] * mask).sum() / mask.sum()
        return loss, {"loss": loss.detach()}

    return losses, finish


def medians(actions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each; the actions take turns, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in actions]
    for round_number in range(rounds + 1):
        for action, taken in zip(actions, seconds, strict=True):
            started = time.perf_counter()
            action()
            if round_number:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def measure(options: Options, folder: Path) -> dict[str, float]:
    """All figures."""
    write_model(folder / "model", options.hidden, options.layers)
    budget = 40_960 // options.shrink
    config = Config(
        model=ModelConfig(path=str(folder / "model"), random_init=True),
        optim=OptimConfig(lr=1e-5),
        train=TrainConfig(micro_batch_tokens=budget),
    )
    hf = HfModelConfig.from_folder(config.model.path)
    episodes = matpo_step(options.seed, options.trajectories)
    lengths = [max(2, n // options.shrink) for episode in episodes for n in episode]
    samples = samples_of(lengths[: options.trajectories], options.seed)
    state = init_parallel(config, rank=0, world_size=1, master_port=free_port())
    try:
        actor = MegatronActor(config, hf, state)
        actor.load_initial()
        learner = PolicyLearner(config, actor, state, folder / "run")
        bare = BareLoop(config, hf, state)
        plan = schedule(samples, budget, 1)[0]
        batches = [to_micro_batch(group, state.device) for group in plan]
        packed = learner.prepare(samples)
        in_order = sorted(samples, key=lambda sample: len(sample.input_ids))
        by_length, by_arrival = (
            _with_batches(packed, padded_bins(order, budget), state)
            for order in (in_order, samples)
        )
        ours, plain, sorted_s, arrival_s = medians(
            [
                lambda: learner.learn(packed, 0, 0),
                lambda: bare.step(batches),
                lambda: learner.learn(by_length, 0, 0),
                lambda: learner.learn(by_arrival, 0, 0),
            ],
            options.rounds,
        )
    finally:
        destroy_parallel()
    return {
        "overhead": ours / plain - 1,
        "packed_speedup": sorted_s / ours,
        "padded_arrival_speedup": arrival_s / ours,
        "step_s": ours,
        "bare_s": plain,
        "tokens": sum(len(sample.input_ids) for sample in samples),
        "micro_batches": len(batches),
    }


def _with_batches(updates: Any, bins: list[list[TrainSample]], state: ParallelState) -> Any:
    (update,) = updates
    return [replace(update, batches=[to_micro_batch(group, state.device) for group in bins])]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--trajectories", type=int, default=48)
    parser.add_argument("--shrink", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Options(**given), Path(folder))
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:24} {value:.4g}")


if __name__ == "__main__":
    main()
