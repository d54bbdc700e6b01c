"""Proves that a resumed run goes on in the data where its checkpoint was written.

Model, learner and engines are stand-ins; what the loop does with them is in the smoke tests.
"""

import json
from dataclasses import replace

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.flops import Shape
from megatron_matpo.config.run import CheckpointConfig, RunConfig
from megatron_matpo.errors import CheckpointError, RolloutError
from megatron_matpo.obs.status import PhaseWriter
from megatron_matpo.trainer.clock import Clock
from megatron_matpo.trainer.learner import LearnResult
from megatron_matpo.trainer.loop import train
from megatron_matpo.trainer.run import Run
from megatron_matpo.trainer.throughput import Throughput
from tests.helpers.episodes import make_batch

CONFIG = replace(
    Config(),
    run=RunConfig(name="test", steps=8),
    checkpoint=CheckpointConfig(every=3, export_hf=False),
)


SPEED = Throughput(Shape(2, 8, 16, 4, 24, 101), num_devices=1, peak_flops=0.0)


class StubActor:
    """Keeps what a checkpoint would hold, as JSON."""

    saved = ""

    def restore(self, folder):
        return json.loads(self.saved) if self.saved else None

    def load_initial(self):
        pass

    def save(self, folder, step, extra):
        self.saved = json.dumps(extra)

    def poll_save(self):
        pass

    def finish_save(self):
        pass


class StubLearner:
    def prepare(self, samples):
        return [samples]

    def learn(self, updates, first_update, step):
        return LearnResult({}, len(updates))


class StubSync:
    def connect(self):
        pass

    def push(self, version):
        return version

    def refit(self, version):
        pass

    def close(self):
        pass


class StubRollouts:
    """Dynamic sampling takes a different number of questions in every step."""

    def __init__(self, fail_at=None):
        self.asked, self.fail_at = [], fail_at

    def connect(self):
        pass

    def collect(self, step, version, split="train", *, position=0):
        if step == self.fail_at:
            raise RolloutError("the judge is gone")
        self.asked.append((step, position))
        return replace(make_batch(step), step=step, next_position=position + 4 + step % 3)


def run(actor, rollouts, folder):
    clock = Clock(PhaseWriter(folder, "trainer", 0))
    train(Run(CONFIG, folder, actor, StubLearner(), rollouts, StubSync(), clock, None, SPEED))


def test_a_resumed_run_asks_from_where_its_checkpoint_was(tmp_path):
    whole = StubRollouts()
    run(StubActor(), whole, tmp_path)
    assert [step for step, _ in whole.asked] == list(range(1, 9))
    assert whole.asked[:3] == [(1, 0), (2, 5), (3, 11)]

    actor, first, second = StubActor(), StubRollouts(fail_at=6), StubRollouts()
    with pytest.raises(RolloutError):
        run(actor, first, tmp_path)
    run(actor, second, tmp_path)
    assert first.asked == whole.asked[:5]
    assert second.asked == whole.asked[3:], "from step 4 on: the last checkpoint is that of step 3"


def test_a_checkpoint_without_its_place_in_the_data_is_refused(tmp_path):
    actor = StubActor()
    actor.saved = json.dumps({"step": 3, "policy_version": 3, "num_updates": 3})
    with pytest.raises(CheckpointError, match=r"another run\.name"):
        run(actor, StubRollouts(), tmp_path)
