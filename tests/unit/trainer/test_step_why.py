"""Proves that a run writes why a step was slow, and knows after a resume what is usual.

Model, learner and engines are stand-ins; each cause has its test in tests/unit/obs/test_why.py.
"""

import json
import time
from dataclasses import replace

from megatron_matpo.config.run import ObsConfig
from megatron_matpo.obs import why
from megatron_matpo.obs.metrics import REQUIRED
from megatron_matpo.obs.metrics_log import read_why
from megatron_matpo.obs.status import PhaseWriter
from megatron_matpo.obs.step_spans import StepSpans
from megatron_matpo.trainer.clock import Clock
from megatron_matpo.trainer.learner import LearnResult
from megatron_matpo.trainer.loop import train
from megatron_matpo.trainer.placement import Apart
from megatron_matpo.trainer.run import Run, RunLog
from tests.helpers.episodes import make_batch
from tests.unit.trainer.test_loop import CONFIG, SPEED, StubActor, StubRollouts, StubSync

OBS = ObsConfig(wandb_mode="disabled", record_rollouts=False, report_every=0)
STEP_S = 0.1


class Learner:
    def prepare(self, samples):
        return [samples]

    def learn(self, updates, first_update, step):
        return LearnResult(dict.fromkeys(REQUIRED - {"step"}, 1.0), 1)


class TailedRollouts(StubRollouts):
    """In step 2 the last episode takes ten times as long as the others."""

    def collect(self, step, version, split="train", *, position=0):
        time.sleep(STEP_S)
        batch = make_batch(step)
        episodes = [episode for group in batch.groups for episode in group.episodes]
        last = episodes[-1].id if step == 2 else ""
        groups = tuple(
            replace(
                group,
                episodes=tuple(
                    replace(e, start_s=0.0, duration_s=STEP_S if e.id == last else STEP_S / 10)
                    for e in group.episodes
                ),
            )
            for group in batch.groups
        )
        metrics = dict.fromkeys(REQUIRED - {"step"}, 1.0) | {"time/collect_s": STEP_S}
        return replace(batch, step=step, groups=groups, metrics=metrics, next_position=step)


def test_a_slow_step_says_why_in_its_line_of_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(why, "MIN_S", 0.0)
    config = replace(CONFIG, run=replace(CONFIG.run, steps=3), obs=OBS)
    spans = StepSpans(tmp_path, "trainer-0")
    clock = Clock(PhaseWriter(tmp_path, "trainer", 0), spans)
    log = RunLog(config, tmp_path)
    parts = (StubActor(), Learner(), TailedRollouts(), StubSync(), Apart(), clock, log, SPEED)
    train(Run(config, tmp_path, *parts))
    told = read_why(tmp_path)
    assert "tail: 1 of " in told[2]
    assert "tail" not in told.get(1, "") + told.get(3, "")


def test_a_resumed_run_knows_what_is_usual(tmp_path):
    line = {"time/rollout_s": 50.0, "time/train_s": 20.0, "time/sync_s": 1.0, "time/step_s": 71.0}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 6):
            slow = {"time/train_s": 900.0} if step > 3 else {}
            file.write(json.dumps({"step": step, **line, **slow}) + "\n")
    log = RunLog(replace(CONFIG, obs=OBS), tmp_path)
    log.resume_after(3)
    values = line | {"time/train_s": 40.0, "time/step_s": 91.0}
    assert log.why(values, (), ()) == "train 40 s: usually 20 s"
    assert log.why(line, (), ()) == ""
