"""What only a GPU can show of shared devices: CUDA IPC, and that memory really becomes free.

Skipped without CUDA; docs/gpu_results.md says whether and when this was run.
"""

from __future__ import annotations

import multiprocessing
import pickle
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.parallel import destroy_parallel, init_parallel
from megatron_matpo.trainer.device_memory import DeviceMemory
from megatron_matpo.weight_sync.shared_buffers import DeviceBuffer, write
from tests.helpers.dist import free_port
from tests.helpers.gpu_actor import gpu_config, learnable_batch, make_gpu_model
from tests.helpers.tiny import weighted_loss

pytestmark = pytest.mark.gpu
MIB = 1 << 20


def _engine(pipe: Connection) -> None:
    """SGLang's side of `update_weights_from_tensor`: its own way to find a device by UUID."""
    from torch.multiprocessing import reductions

    original = reductions.rebuild_cuda_tensor

    def by_uuid(*args: object) -> torch.Tensor:
        uuids = [
            str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())
        ]
        return original(*args[:6], uuids.index(str(args[6])), *args[7:])

    reductions.rebuild_cuda_tensor = by_uuid
    while payload := pipe.recv_bytes():
        flat = pickle.loads(payload)
        data = flat["flattened_tensor"]
        read = {
            item.name: data[item.start_idx : item.end_idx].view(item.dtype).view(item.shape).cpu()
            for item in flat["metadata"]
        }
        del data, flat
        pipe.send_bytes(
            pickle.dumps({name: value.float().tolist() for name, value in read.items()})
        )


@pytest.mark.timeout(180)
def test_another_process_opens_what_is_written_again_and_again() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_engine, args=(theirs,), daemon=True)
    process.start()
    buffers = [DeviceBuffer(8 * MIB) for _ in range(2)]
    try:
        for i in range(6):
            tensors = [("a", torch.full((1000, 7), float(i)).cuda().bfloat16())]
            tensors.append(("b", torch.arange(9.0).cuda().bfloat16() + i))
            ours.send_bytes(write(buffers[i % 2], tensors))
            assert ours.poll(120)
            read = pickle.loads(ours.recv_bytes())
            assert read == {name: value.float().tolist() for name, value in tensors}
    finally:
        process.kill()
        process.join()
    before = torch.cuda.mem_get_info()[0]
    for buffer in buffers:
        buffer.close()
    assert torch.cuda.mem_get_info()[0] >= before


def test_parked_memory_is_free_for_others_and_training_goes_on(tmp_path: Path) -> None:
    folder = make_gpu_model(tmp_path / "model", layers=8, hidden=1024)
    config = gpu_config(folder, "bf16")
    state = init_parallel(config, rank=0, world_size=1, master_port=free_port())
    try:
        stories = []
        for parks in (False, True):
            torch.manual_seed(0)
            actor = MegatronActor(config, HfModelConfig.from_folder(folder), state)
            actor.load_initial()
            losses = []
            for i in range(3):
                losses.append(actor.update([learnable_batch(512, i)], weighted_loss, i).loss)
                if not parks:
                    continue
                memory = DeviceMemory(timeout_s=5.0)
                before = memory.free_bytes()
                given = actor.park()
                num_parameters = sum(p.numel() for m in actor._models for p in m.parameters())
                assert given >= 16 * num_parameters, "fp32 gradients, parameters and two moments"
                assert memory.free_bytes() - before >= 0.9 * given
                assert all(t.is_pinned() for t in actor._parking._host.values())
                actor.unpark()
            stories.append((losses, {n: t.cpu() for n, t in actor.export()}))
            del actor
        # Not bit for bit: attention's backward pass adds in any order.
        assert stories[1][0] == pytest.approx(stories[0][0], rel=1e-2)
        torch.testing.assert_close(stories[1][1], stories[0][1], rtol=1e-2, atol=1e-3)
    finally:
        destroy_parallel()
        torch.cuda.empty_cache()
