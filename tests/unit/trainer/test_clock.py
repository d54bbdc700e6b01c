"""Proves that phases are measured once: the same times in the metrics and in the spans."""

import asyncio
import contextvars
import time

import pytest

from megatron_matpo.obs.span_files import read_spans
from megatron_matpo.obs.spans import record_from_now_on, recording, span
from megatron_matpo.obs.status import PhaseWriter, read_status
from megatron_matpo.obs.step_spans import StepSpans
from megatron_matpo.trainer.clock import Clock


def make(folder):
    spans = StepSpans(folder, "trainer-0")
    spans.trace(1)
    return Clock(PhaseWriter(folder, "trainer", 0), spans), spans


def test_phases_are_spans_with_the_times_of_the_metrics(tmp_path):
    clock, spans = make(tmp_path)
    with recording(spans):
        clock.enter("load")
        for step in (1, 2):
            with clock.step(step):
                for phase in ("rollout", "score", "train", "sync"):
                    with clock.phase(phase), span("inside"):
                        time.sleep(0.002)
            clock.enter("evaluate")
            clock.enter("log")
            metrics = clock.metrics
            named = {item.name: item for item in clock.spans if item.name != "inside"}
            assert list(named) == ["rollout", "score", "train", "sync", "evaluate"]
            for phase in ("rollout", "score", "train", "sync"):
                item = named[phase]
                assert metrics[f"time/{phase}_s"] == item.end_s - item.start_s
            phases = sum(
                metrics[f"time/{name}_s"] for name in ("rollout", "score", "train", "sync")
            )
            assert phases <= metrics["time/step_s"]
        spans.close()
    (file,) = read_spans(tmp_path, 2)
    inner = [item for item in file.spans if item.name == "inside"]
    outer = [item for item in file.spans if item.name != "inside"][:4]
    for one, around in zip(inner, outer, strict=True):
        assert around.start_us <= one.start_us <= one.end_us <= around.end_us
    assert {item.name for item in read_spans(tmp_path, 1)[0].spans} >= {"evaluate", "log"}


def test_a_phase_that_fails_stays_the_current_one(tmp_path):
    clock, _ = make(tmp_path)
    with pytest.raises(ValueError, match="x"), clock.step(1), clock.phase("train"):
        raise ValueError("x")
    assert clock.current == "train"
    (status,) = read_status(tmp_path)
    assert (status.phase, status.step) == ("train", 1)


def test_spans_of_an_event_loop_that_is_made_later_are_recorded(tmp_path):
    """Weight sync keeps a runner, whose tasks see the context of its first call."""

    async def push():
        with span("bucket"):
            pass

    def work():
        spans = StepSpans(tmp_path, "trainer-0")
        record_from_now_on(spans)
        with asyncio.Runner() as runner:
            for step in (1, 2):
                spans.begin(step)
                runner.run(push())
                assert [item.name for item in spans.spans] == ["bucket"]

    contextvars.copy_context().run(work)
