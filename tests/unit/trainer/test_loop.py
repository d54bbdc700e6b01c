"""Proves that a resumed run goes on in the data where its checkpoint was written.

Model, learner and engines are stand-ins; what the loop does with them is in the smoke tests.
"""

import json
from collections.abc import Mapping
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
from megatron_matpo.trainer.placement import Apart
from megatron_matpo.trainer.run import Run
from megatron_matpo.trainer.stopping import StopRequested
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
    restored = None

    def restore(self, folder):
        return json.loads(self.saved) if self.saved else None

    def load_initial(self):
        pass

    def save(self, folder, step, extra, further):
        self.saved = json.dumps(extra)
        self.further = further

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
    metrics: Mapping[str, float] = {}

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

    def restore(self, checkpoint):
        pass

    def in_flight(self, step):
        return b""

    def collect(self, step, version, split="train", *, position=0):
        if step == self.fail_at:
            raise RolloutError("the judge is gone")
        self.asked.append((step, position))
        return replace(make_batch(step), step=step, next_position=position + 4 + step % 3)


def run(actor, rollouts, folder):
    clock = Clock(PhaseWriter(folder, "trainer", 0))
    parts = (actor, StubLearner(), rollouts, StubSync(), Apart(), clock, None, SPEED)
    train(Run(CONFIG, folder, *parts))


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


def test_groups_in_flight_are_in_the_checkpoint_and_go_back_before_the_first_collection(tmp_path):
    """What is in flight belongs to the step that was trained last, whatever was asked since."""

    class Asynchronous(StubRollouts):
        def in_flight(self, step):
            return f"after {step}".encode()

        def restore(self, checkpoint):
            self.asked.append(checkpoint)

    actor, first, second = StubActor(), Asynchronous(fail_at=6), Asynchronous()
    with pytest.raises(RolloutError):
        run(actor, first, tmp_path)
    assert actor.further == {"in_flight.rollout": b"after 3"}
    actor.restored = tmp_path / "step_3"
    run(actor, second, tmp_path)
    assert first.asked[0] is None
    assert second.asked[0] == tmp_path / "step_3" and second.asked[1][0] == 4
    assert actor.further == {"in_flight.rollout": b"after 8"}


def test_a_stop_saves_although_the_manager_is_gone(tmp_path):
    class Gone(StubRollouts):
        def collect(self, step, version, split="train", *, position=0):
            if step == 5:
                raise StopRequested
            return super().collect(step, version, split, position=position)

        def in_flight(self, step):
            if step == 4:
                raise RolloutError("groups in flight: the rollout manager broke off")
            return b"groups"

    actor = StubActor()
    run(actor, Gone(), tmp_path)
    assert json.loads(actor.saved)["step"] == 4 and actor.further == {}
