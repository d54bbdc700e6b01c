"""Engines that give their memory away and take it again around a push, and what failures leave.

Engines are scripted: they refuse to sample without weights and cache, to release while they sample,
and to take what they have. The transport is real shared memory.
"""

import time

import pytest
import torch

from megatron_matpo.errors import WeightSyncError
from megatron_matpo.weight_sync.disk import DiskTransport
from megatron_matpo.weight_sync.ipc import IpcTransport
from megatron_matpo.weight_sync.shared_buffers import HostBuffer
from megatron_matpo.weight_sync.transaction import Transaction
from megatron_matpo.weight_sync.verify import Verifier
from tests.helpers.scripted_fake_engine import SHAPE, ScriptedFakeEngine, write_safetensors

WEIGHTS = {"model.embed_tokens.weight": torch.rand(64, 4), "model.norm.weight": torch.rand(4)}
RELEASED = ["pause", "wait_idle", "release kv_cache+weights"]
PUSHED = ["pause", "take weights", "load", "version", "checksums", "take kv_cache", "resume"]


def shared(engines, *, timeout_s=30.0, transport=None):
    sync = Transaction(
        lambda: iter(WEIGHTS.items()),
        engines,
        transport
        or IpcTransport(
            bucket_bytes=1 << 20, writers={e.url: (0,) for e in engines}, make_buffer=HostBuffer
        ),
        Verifier("full", SHAPE, on_gpu=False),
        timeout_s=timeout_s,
        start_timeout_s=timeout_s,
    )
    sync.connect()
    return sync


def test_weights_come_before_the_push_and_the_cache_after_the_verification():
    engines = [ScriptedFakeEngine("a"), ScriptedFakeEngine("b")]
    sync = shared(engines)
    sync.release()
    sync.connect()  # the second time, when engines cannot answer: nothing is asked
    for version in (1, 2):
        if version > 1:
            sync.release()
        assert all(engine.is_paused and engine.weights == {} for engine in engines)
        sync.push(version)
        assert not any(engine.is_paused for engine in engines)
    sync.push(3)
    sync.close()
    in_place = [verb for verb in PUSHED if not verb.startswith("take")]
    for engine in engines:
        assert engine.asked == ["wait_ready", *2 * (RELEASED + PUSHED), *in_place]
        assert engine.version == "3"
        torch.testing.assert_close(engine.weights, WEIGHTS, rtol=0, atol=0)


def test_a_folder_does_too(tmp_path):
    engine = ScriptedFakeEngine()
    transport = DiskTransport(tmp_path / "weights", write_safetensors)
    sync = shared([engine], transport=transport)
    sync.release()
    sync.push(1)
    sync.close()
    assert engine.asked[-7:] == ["update" if verb == "load" else verb for verb in PUSHED]


@pytest.mark.parametrize("how", ["refuses", "hangs", "dies"])
@pytest.mark.parametrize("verb", RELEASED)
def test_a_release_that_fails_is_named_and_leaves_nothing_serving(verb, how):
    good, bad = ScriptedFakeEngine("good"), ScriptedFakeEngine("bad", **{verb: how})
    sync = shared([good, bad], timeout_s=0.3)
    started = time.monotonic()
    with pytest.raises(WeightSyncError) as caught:
        sync.release()
    assert time.monotonic() - started < 20
    text = str(caught.value)
    assert text.startswith("handing the engines' memory to the trainer: ")
    assert "fake://bad" in text.split(". ")[0] and "stay paused" in text
    assert how != "hangs" or "weight_sync.timeout_s=0.3" in text
    assert good.is_paused
    with pytest.raises(WeightSyncError, match="an earlier push failed: handing"):
        sync.push(1)
    sync.close()


@pytest.mark.parametrize("how", ["refuses", "hangs", "dies"])
@pytest.mark.parametrize(
    ("verb", "phase", "left"),
    [
        ("pause", "pause", "hold no weights, stay paused"),
        ("take weights", "take weights", "hold no weights, stay paused"),
        ("load", "deliver", "parts of two versions"),
        ("checksums", "verify", "parts of two versions"),
        ("take kv_cache", "take cache", "the new weights, verified"),
        ("resume", "resume", "the new weights, verified"),
    ],
)
def test_there_is_no_old_version_to_go_back_to(verb, phase, left, how):
    good, bad = ScriptedFakeEngine("good"), ScriptedFakeEngine("bad")
    sync = shared([good, bad], timeout_s=0.3)
    sync.release()
    bad.fails = {verb: how}
    with pytest.raises(WeightSyncError) as caught:
        sync.push(7)
    text = str(caught.value)
    assert f"weights of version 7, phase '{phase}'" in text
    assert "fake://bad" in text.split(". ")[0]
    assert left in text
    assert phase == "resume" or (good.is_paused and bad.is_paused)
    sync.close()


def test_an_export_that_fails_does_not_resume_engines_without_weights():
    def broken():
        raise RuntimeError("a rank is gone")
        yield

    engine = ScriptedFakeEngine()
    sync = shared([engine])
    sync.release()
    sync._export = broken
    with pytest.raises(RuntimeError, match="a rank is gone"):
        sync.push(1)
    assert engine.is_paused and engine.released
    sync.close()
