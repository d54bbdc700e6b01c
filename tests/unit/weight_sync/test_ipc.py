"""Transport `ipc` to scripted engines, through real shared memory of this machine.

Proves: bytes arrive under their names from two buffers in turns, every failure is a named error,
and no memory has a name that could be left behind. Several trainer ranks are in tests/dist; that
stock SGLang opens it is a smoke test's.
"""

import io
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from megatron_matpo.errors import WeightSyncError
from megatron_matpo.weight_sync.ipc import IpcTransport
from megatron_matpo.weight_sync.shared_buffers import HostBuffer, write
from megatron_matpo.weight_sync.transaction import Transaction
from megatron_matpo.weight_sync.verify import Verifier
from tests.helpers.scripted_fake_engine import SHAPE, ScriptedFakeEngine

WEIGHTS = {
    "model.embed_tokens.weight": torch.rand(64, 4),
    "model.layers.0.self_attn.q_proj.weight": torch.rand(8, 4),
    "model.layers.0.self_attn.k_proj.weight": torch.rand(4, 4),
    "model.layers.0.self_attn.v_proj.weight": torch.rand(4, 4),
    "model.norm.weight": torch.rand(4),
}


class Counting:
    """Makes buffers and counts them."""

    def __init__(self):
        self.made = []

    def __call__(self, num_bytes):
        self.made.append(HostBuffer(num_bytes))
        return self.made[-1]


def sync_with(engines, *, make=HostBuffer, bucket_bytes=200, timeout_s=30.0, keeps=True):
    return Transaction(
        lambda: iter(WEIGHTS.items()),
        engines,
        IpcTransport(
            bucket_bytes=bucket_bytes,
            writers={engine.url: (0,) for engine in engines},
            make_buffer=make,
            keeps_buffers=keeps,
        ),
        Verifier("full", SHAPE, on_gpu=False),
        timeout_s=timeout_s,
        start_timeout_s=timeout_s,
    )


def test_all_tensors_arrive_through_two_buffers():
    engines, make = [ScriptedFakeEngine("a"), ScriptedFakeEngine("b")], Counting()
    sync = sync_with(engines, make=make)
    sync.connect()
    for version in (3, 4):
        for engine in engines:
            engine.weights = {}
        assert sync.push(version) == version
        for engine in engines:
            torch.testing.assert_close(engine.weights, WEIGHTS, rtol=0, atol=0)
            assert engine.version == str(version) and not engine.is_paused
    # Buckets: the embedding (larger than one), query and key, value and norm.
    assert engines[0].asked.count("load") == 2 * 3
    assert [buffer.data.numel() for buffer in make.made] == [1024, 200]
    assert sync.report.num_bytes == sum(4 * t.numel() for t in WEIGHTS.values())
    sync.close()
    assert all(buffer.data.numel() == 0 for buffer in make.made), "closed"


def test_a_slot_grows_for_a_large_tensor_and_is_freed_where_others_need_the_memory():
    weights = {"a": torch.rand(3), "b": torch.rand(3), "c": torch.rand(90), "d": torch.rand(3)}
    engine, make = ScriptedFakeEngine(), Counting()
    sync = sync_with([engine], make=make, bucket_bytes=12, keeps=False)
    sync._export = lambda: iter(weights.items())
    sync._verifier = Verifier("version", SHAPE, on_gpu=False)
    sync.connect()
    sync.push(1)
    torch.testing.assert_close(engine.weights, weights, rtol=0, atol=0)
    # Slots in turns: a and then c in the first, which grows; b and d in the second.
    assert len(make.made) == 3
    assert all(buffer.data.numel() == 0 for buffer in make.made)
    sync.close()


@pytest.mark.parametrize("how", ["refuses", "hangs", "dies"])
def test_a_failure_is_named_in_time_and_all_stay_paused(how):
    good, bad = ScriptedFakeEngine("good"), ScriptedFakeEngine("bad", load=how)
    sync = sync_with([good, bad], timeout_s=0.5)
    sync.connect()
    with pytest.raises(WeightSyncError) as caught:
        sync.push(7)
    text = str(caught.value)
    assert (
        "weights of version 7, phase 'deliver': bucket 0 (from model.embed_tokens.weight)" in text
    )
    assert "fake://bad" in text and "stay paused" in text
    assert how != "hangs" or "weight_sync.timeout_s=0.5" in text
    assert good.is_paused and good.version == "0"
    sync.close()


def test_an_export_that_fails_half_way_is_the_error():
    def export():
        yield from list(WEIGHTS.items())[:3]
        raise RuntimeError("a rank is gone")

    engine = ScriptedFakeEngine()
    sync = sync_with([engine])
    sync._export = export
    sync.connect()
    with pytest.raises(WeightSyncError, match=r"'deliver': .*trainer's export: a rank is gone"):
        sync.push(1)
    assert engine.is_paused
    sync.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_another_process_reads_what_is_written_and_a_killed_writer_leaves_no_file(tmp_path, dtype):
    before = set(os.listdir("/dev/shm"))
    buffer = HostBuffer(1 << 16)
    tensors = [("a", torch.rand(5, 3).to(dtype)), ("b", torch.rand(7).to(dtype))]
    (tmp_path / "payload").write_bytes(write(buffer, tensors))
    reader = """
import pickle, sys, torch
flat = pickle.load(open(sys.argv[1], "rb"))
data = flat["flattened_tensor"]
parts = [data[m.start_idx : m.end_idx].view(m.dtype).view(m.shape) for m in flat["metadata"]]
torch.save([part.float() for part in parts], sys.argv[1] + ".read")
print([m.name for m in flat["metadata"]], data.numel())
"""
    command = [sys.executable, "-c", reader, str(tmp_path / "payload")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"['a', 'b'] {22 * dtype.itemsize}"
    read = torch.load(tmp_path / "payload.read")
    for (_, sent), got in zip(tensors, read, strict=True):
        torch.testing.assert_close(got, sent.float(), rtol=0, atol=0)
    killed = """
import os, signal
from megatron_matpo.weight_sync.shared_buffers import HostBuffer
HostBuffer(1 << 20).data.fill_(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -9
    assert {name for name in set(os.listdir("/dev/shm")) - before if "matpo" in name} == set()
    path = Path(buffer._path)
    assert path.exists()
    buffer.close()
    assert not path.exists()


def test_payloads_name_only_what_sglang_lets_through():
    """Modules that SGLang's `SafeUnpickler` allows; the real one is asked in tests/smoke."""
    met = set()

    class Watching(pickle.Unpickler):
        def find_class(self, module, name):
            met.add((module.split(".")[0], name))
            return super().find_class(module, name)

    buffer = HostBuffer(64)
    payload = write(buffer, [("a", torch.rand(3))])
    Watching(io.BytesIO(payload)).load()
    buffer.close()
    assert {module for module, _ in met} <= {"builtins", "functools", "torch", "types"}
    assert not {name for _, name in met} & {"eval", "exec", "compile", "FunctionType", "CodeType"}


def test_no_thread_is_left():
    before = set(threading.enumerate())
    sync = sync_with([ScriptedFakeEngine()])
    sync.connect()
    sync.push(1)
    sync.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread.name
