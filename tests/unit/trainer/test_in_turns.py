"""The order in which devices change hands, and that each side waits until it has room.

Trainer, engines and the device are stand-ins that keep one account of its memory.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_matpo.errors import HandoverError, RolloutError
from megatron_matpo.obs.status import PhaseWriter
from megatron_matpo.trainer.clock import Clock
from megatron_matpo.trainer.device_memory import DeviceMemory
from megatron_matpo.trainer.loop import train
from megatron_matpo.trainer.placement import InTurns
from megatron_matpo.trainer.run import Run
from tests.unit.trainer.test_loop import CONFIG, SPEED, StubActor, StubLearner, StubRollouts

GIB = 2**30


class Device(DeviceMemory):
    """80 GiB; what is asked for and not there is an error at once."""

    def __init__(self):
        super().__init__(timeout_s=0.1)
        self.free = 80 * GIB

    def free_bytes(self):
        return self.free

    def take(self, num_bytes):
        assert num_bytes <= self.free, "out of memory"
        self.free -= num_bytes


@pytest.fixture(autouse=True)
def _device_number(monkeypatch):
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)


class Side:
    """Both sides and the loop's other parts; writes down what happens."""

    def __init__(self, folder, *, keeps=0, grows=0, has_engine=True):
        self.device, self.events = Device(), []
        self.keeps, self.grows = keeps, grows
        self.device.take(56 * GIB)  # engines are there first
        clock = Clock(PhaseWriter(folder, "trainer", 0))
        self.clock = clock
        self.placement = InTurns(
            self, lambda: self.events.append("meet"), self.device, clock, has_engine=has_engine
        )

    def release(self):
        self.events.append("release")
        self.device.take(-(56 * GIB - self.keeps))

    def build(self):
        self.placement.start()
        self.events.append("build")
        self.device.take(7 * GIB + 40 * GIB)
        self.placement.own(self)

    def park(self):
        self.events.append("park")
        self.device.take(-40 * GIB + self.grows)
        return 40 * GIB

    def unpark(self):
        self.events.append("unpark")
        self.device.take(40 * GIB)

    def connect(self):
        pass

    def push(self, version):
        self.events.append(f"push {version}")
        self.device.take(56 * GIB - self.keeps)
        return version

    def close(self):
        self.events.append("close")

    @property
    def order(self):
        return [event for event in self.events if event != "meet"]


class Learner(StubLearner):
    def __init__(self, side):
        self.side = side

    def prepare(self, samples):
        self.side.events.append("score")
        return super().prepare(samples)

    def learn(self, *args):
        self.side.events.append("learn")
        return super().learn(*args)


class Rollouts(StubRollouts):
    def __init__(self, side, fail_at=None):
        super().__init__(fail_at)
        self.side = side

    def collect(self, step, version, split="train", *, position=0):
        self.side.events.append(f"collect {split}")
        return super().collect(step, version, split, position=position)


class Actor(StubActor):
    def __init__(self, side):
        self.side = side

    def save(self, folder, step, extra, further):
        self.side.events.append("save")
        super().save(folder, step, extra, further)


def whole_run(side, folder, steps=2, actor=None, fail_at=None):
    side.build()
    every = replace(CONFIG.checkpoint, every=1)
    eval_ = replace(CONFIG.eval, sets=["gaia.parquet"], every=1, before_train=True)
    config = replace(CONFIG, run=replace(CONFIG.run, steps=steps), checkpoint=every, eval=eval_)
    rollouts = Rollouts(side, fail_at)
    parts = (actor or Actor(side), Learner(side), rollouts, side, side.placement, side.clock)
    train(Run(config, folder, *parts, None, SPEED))


STEP = ["collect train", "release", "unpark", "score", "learn", "park"]
START = ["release", "build", "park"]


def test_the_order_of_a_run(tmp_path):
    side = Side(tmp_path)
    whole_run(side, tmp_path)
    served = ["collect gaia", "save"]
    assert side.order == [
        *(*START, "push 0", "collect gaia"),
        *(*STEP, "push 1", *served, *STEP, "push 2", *served, "close"),
    ]
    # Rank 0 asks engines when all ranks have measured, and goes on when all have answers.
    at = [i for i, event in enumerate(side.events) if event == "release"]
    for i in at:
        assert side.events[i - 2 : i + 2] == ["meet", "meet", "release", "meet"]
    for i, event in enumerate(side.events):
        if event.startswith("push"):
            assert side.events[i - 2 : i] == ["park", "meet"]
    assert side.device.free == (80 - 56 - 7) * GIB


def test_a_resumed_run_begins_in_the_same_order(tmp_path):
    first = Side(tmp_path)
    actor = Actor(first)
    with pytest.raises(RolloutError):
        whole_run(first, tmp_path, steps=3, actor=actor, fail_at=2)
    assert json.loads(actor.saved)["step"] == 1
    assert first.order[-1] == "collect train", "engines serve; nothing else was handed over"
    second = Side(tmp_path)
    actor.side = second
    whole_run(second, tmp_path, steps=2, actor=actor)
    assert second.order[:4] == [*START, "push 1"]
    assert second.order[4:] == [*STEP, "push 2", "collect gaia", "save", "close"]


def test_engines_that_answer_and_keep_their_memory_are_found_out_at_the_start(tmp_path):
    side = Side(tmp_path, keeps=56 * GIB)
    with pytest.raises(HandoverError, match=r"device 3: the trainer needs .* did not give its"):
        side.build()
    assert "build" not in side.order


def test_a_rank_without_an_engine_on_its_device_waits_for_no_memory(tmp_path):
    side = Side(tmp_path, keeps=56 * GIB, has_engine=False)
    side.device.free = 80 * GIB
    whole_run(side, tmp_path)
    assert side.device.free == (80 - 7) * GIB


def test_engines_that_keep_too_much_later_are_found_out_before_the_trainer_takes_it(tmp_path):
    side = Side(tmp_path)
    side.build()
    side.placement.to_rollout()
    side.push(0)
    side.keeps = 50 * GIB
    with pytest.raises(HandoverError) as caught:
        side.placement.to_train()
    text = str(caught.value)
    assert "the trainer's gradients, optimizer and work needs 40.00 GiB" in text
    assert "weight_sync.timeout_s=0.1" in text
    assert side.order[-1] == "release"


def test_a_trainer_that_keeps_too_much_is_found_out_before_the_engines_take_it(tmp_path):
    side = Side(tmp_path, grows=20 * GIB)
    side.build()
    with pytest.raises(HandoverError, match=r"the engine's weights and KV cache needs 56\.00 GiB"):
        side.placement.to_rollout()
    assert side.order[-1] == "park"


def test_memory_that_comes_late_is_waited_for(tmp_path, monkeypatch):
    device = Device()
    device.free = 0

    def comes(_):
        device.free += 2 * GIB

    monkeypatch.setattr("megatron_matpo.trainer.device_memory.time.sleep", comes)
    assert device.wait_free(5 * GIB, "the trainer") == 6 * GIB
