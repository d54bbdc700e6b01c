"""Proves what a push leaves behind for every way in which an engine can fail in every phase.

Engines are scripted fakes in this process; the transport is `disk`, for real. Bytes through a
process group are in test_broadcast.py, SGLang's servers in tests/smoke.
"""

import time

import pytest
import torch

from megatron_matpo.errors import EngineTimeout, WeightSyncError
from megatron_matpo.obs import metrics as registry
from megatron_matpo.weight_sync.disk import DiskTransport
from megatron_matpo.weight_sync.membership import FixedMembership, Recovery
from megatron_matpo.weight_sync.transaction import Transaction
from megatron_matpo.weight_sync.unpushed import NoEngines, PushOnce
from megatron_matpo.weight_sync.verify import Verifier
from tests.helpers.scripted_fake_engine import SHAPE, ScriptedFakeEngine, write_safetensors

WEIGHTS = {
    "model.embed_tokens.weight": torch.rand(64, 4),
    "model.layers.0.self_attn.q_proj.weight": torch.rand(8, 4),
    "model.layers.0.self_attn.k_proj.weight": torch.rand(4, 4),
    "model.layers.0.self_attn.v_proj.weight": torch.rand(4, 4),
    "model.norm.weight": torch.rand(4),
}


def transaction(engines, folder, *, verify="full", timeout_s=30.0, weights=WEIGHTS, recovery=None):
    return Transaction(
        lambda: iter(weights.items()),
        engines,
        DiskTransport(folder / "weights", write_safetensors),
        Verifier(verify, SHAPE, on_gpu=False),
        timeout_s=timeout_s,
        start_timeout_s=timeout_s,
        recovery=recovery,
    )


def pushed(engines, folder, *versions, **settings):
    sync = transaction(engines, folder, **settings)
    sync.connect()
    try:
        return [sync.push(version) for version in versions]
    finally:
        sync.close()


def test_engines_are_paused_loaded_verified_and_resumed_in_this_order(tmp_path):
    engines = [ScriptedFakeEngine("a"), ScriptedFakeEngine("b")]
    assert pushed(engines, tmp_path, 3, 4) == [3, 4]
    one_push = ["pause", "update", "version", "checksums", "resume"]
    for engine in engines:
        assert engine.asked == ["wait_ready", *one_push, *one_push]
        assert engine.version == "4"
        assert not engine.is_paused
        torch.testing.assert_close(engine.weights, WEIGHTS, rtol=0, atol=0)


def test_disk_keeps_the_served_version_only_and_nothing_after_the_run(tmp_path):
    sync = transaction([ScriptedFakeEngine()], tmp_path)
    (tmp_path / "weights" / "left_by_a_killed_run").mkdir(parents=True)
    sync.connect()
    for version in (1, 2, 3):
        sync.push(version)
        assert [p.name for p in (tmp_path / "weights").iterdir()] == [f"version_{version}"]
    assert sync.report.num_bytes > sum(4 * t.numel() for t in WEIGHTS.values())
    metrics = sync.metrics
    registry.check(metrics, partial=True)
    assert metrics["sync/bytes"] == sync.report.num_bytes
    assert 0 < metrics["sync/deliver_s"] + metrics["sync/verify_s"] < metrics["sync/pause_s"]
    seconds = metrics["sync/prepare_s"] + metrics["sync/pause_s"]
    assert metrics["sync/gb_per_s"] == pytest.approx(metrics["sync/bytes"] / seconds / 1e9)
    sync.close()
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("how", ["refuses", "hangs", "dies"])
@pytest.mark.parametrize(
    ("verb", "phase"),
    [
        ("pause", "pause"),
        ("update", "deliver"),
        ("version", "verify"),
        ("checksums", "verify"),
        ("resume", "resume"),
    ],
)
def test_a_failure_is_named_in_time_and_no_engine_serves_a_mixture(tmp_path, verb, phase, how):
    good, bad = ScriptedFakeEngine("good"), ScriptedFakeEngine("bad", **{verb: how})
    for engine in (good, bad):
        engine.weights = {"old": torch.zeros(1)}
    sync = transaction([good, bad], tmp_path, timeout_s=0.3)
    sync.connect()
    started = time.monotonic()
    with pytest.raises(WeightSyncError) as caught:
        sync.push(7)
    assert time.monotonic() - started < 20, "a deadline of 0.3 s, and what is told afterwards"
    text = str(caught.value)
    assert f"weights of version 7, phase '{phase}'" in text
    assert "fake://bad" in text.split(". ")[0], "the engine is named in the cause itself"
    assert how != "hangs" or "weight_sync.timeout_s=0.3" in text
    assert "Now: " in text
    for engine in (good, bad):
        serves_old = engine.version == "0" and "old" in engine.weights
        is_verified = phase == "resume"
        assert engine.is_paused or serves_old or is_verified, engine.url
    if phase in ("deliver", "verify"):
        assert good.is_paused
        assert "stay paused" in text
    if phase == "pause":
        assert not good.is_paused, "nothing was sent, so it serves on"
    with pytest.raises(WeightSyncError, match="an earlier push failed"):
        sync.push(8)
    sync.close()


@pytest.mark.parametrize(
    ("script", "verify", "message"),
    [
        ("forgets", "version", "fake://bad reports weight version '0' after version 1"),
        ("forgets", "full", "fake://bad reports weight version '0' after version 1"),
        ("corrupts", "full", r"fake://bad, rank 0: .* has checksum \w{16}, the trainer sent"),
        ("corrupts", "sample", r"fake://bad, rank 0: .* has checksum"),
    ],
)
def test_another_version_or_other_weights_are_never_served(tmp_path, script, verify, message):
    bad = ScriptedFakeEngine("bad", update=script)
    with pytest.raises(WeightSyncError, match=message):
        pushed([ScriptedFakeEngine("good"), bad], tmp_path, 1, verify=verify)
    assert bad.is_paused


def test_a_sample_meets_every_parameter_once_in_eight_pushes(tmp_path):
    verifier = Verifier("sample", SHAPE, on_gpu=False)
    met = []
    for push in range(9):
        assert dict(verifier.watch(iter(WEIGHTS.items()))).keys() == WEIGHTS.keys()
        if push:
            met += verifier.expected
        else:
            assert len(verifier.expected) == 3, "q, k and v are one parameter of the engine"
    assert sorted(met) == [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.norm.weight",
    ]


def test_engines_that_differ_between_each_other_are_told(tmp_path):
    """What the trainer has no expectation of, as experts: their layout is the engine's affair."""
    experts = {**WEIGHTS, "model.layers.0.mlp.experts.0.down_proj.weight": torch.rand(2, 2)}
    engines = [ScriptedFakeEngine("a"), ScriptedFakeEngine("b")]
    original = engines[1].weight_checksums

    async def with_other_experts(**kwargs):
        return [rank | {"experts.w2_weight": "0" * 16} for rank in await original(**kwargs)]

    engines[1].weight_checksums = with_other_experts
    with pytest.raises(WeightSyncError, match=r"hold different weights: experts\.w2_weight"):
        pushed(engines, tmp_path, 1, weights=experts)


def test_a_full_disk_leaves_the_old_version_serving(tmp_path):
    engine = ScriptedFakeEngine()
    sync = transaction([engine], tmp_path)
    sync.connect()

    def refuse(folder, tensors):
        raise OSError(28, "No space left on device")

    sync._transport._write = refuse
    with pytest.raises(WeightSyncError, match=r"phase 'prepare': writing .*No space left"):
        sync.push(1)
    assert not engine.is_paused
    assert engine.version == "0"
    sync.close()


def test_an_engine_that_never_starts_is_told_with_its_setting(tmp_path):
    engine = ScriptedFakeEngine()

    async def wait_ready(*, deadline_s):
        raise EngineTimeout(f"not ready after {deadline_s:g} s")

    engine.wait_ready = wait_ready
    sync = transaction([engine], tmp_path, timeout_s=1.0)
    with pytest.raises(EngineTimeout, match=r"run\.start_timeout_s"):
        sync.connect()
    sync.close()


def test_ranks_without_engines_only_take_part_in_the_export(tmp_path):
    seen = []
    words = [b"go", b"again", b"go", b"done", b"nobody"]
    agree = lambda word: words.pop(0)  # noqa: E731
    sync = transaction([], tmp_path, recovery=Recovery(FixedMembership(0), agree, retries=1))
    sync._export = lambda: iter([seen.append(1)])
    sync.connect()
    assert sync.push(5) == 5
    assert seen == [1, 1], "rank 0 tried twice"
    sync.refit(5)
    assert seen == [1, 1] and not words
    sync.close()


def test_push_once_lets_only_the_first_through(tmp_path):
    engine = ScriptedFakeEngine()
    sync = PushOnce(transaction([engine], tmp_path))
    sync.connect()
    assert sync.push(3) == 3
    assert sync.metrics["sync/bytes"] > 0
    assert [sync.push(v) for v in (4, 5)] == [3, 3]
    assert sync.metrics == {}, "nothing was sent"
    sync.close()
    assert engine.asked.count("update") == 1
    assert NoEngines().push(9) == 9
