"""One rank of the collective checks: an all-reduce over all ranks, then a group as weight sync's.

`python -m megatron_matpo.doctor.collectives '{"master": ...}'`. It says on stdout how far it has
come, one JSON object per line, so that whoever started it can tell where it hangs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist

from megatron_matpo.bound_store import bound_store
from megatron_matpo.weight_sync.group import form_group

_ROUNDS = 3


@dataclass(frozen=True)
class Rank:
    """What one rank is told."""

    master: str
    port: int
    """Of the store where all ranks meet."""
    sync_port: int
    """Of the weight-sync group's own store."""
    rank: int
    world_size: int
    gpu: int
    """-1: the CPU, over gloo."""
    sync_rank: int
    """In the weight-sync group, which has one rank of each node; -1: not a member."""
    sync_size: int
    num_bytes: int
    timeout_s: float

    @property
    def backend(self) -> str:
        """Of both groups."""
        return "nccl" if self.gpu >= 0 else "gloo"


def say(stage: str, **values: object) -> None:
    """A line for whoever started this rank."""
    print(json.dumps({"stage": stage, **values}), flush=True)


def bus_gb_s(num_bytes: int, seconds: float, world_size: int) -> float:
    """Bus bandwidth of an all-reduce, which does not depend on the number of ranks.

    Source: github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md.
    """
    return 2 * (world_size - 1) / world_size * num_bytes / seconds / 1e9


def _all_reduce(rank: Rank, device: torch.device) -> float:
    """The best of some rounds, in GB/s."""
    elements = max(1, rank.num_bytes // 4)
    best = float("inf")
    for _ in range(_ROUNDS):
        tensor = torch.ones(elements, device=device)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        if rank.gpu >= 0:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        assert float(tensor[-1]) == rank.world_size, "an all-reduce of ones is their number"
    return bus_gb_s(4 * elements, best, rank.world_size)


def _sync(rank: Rank, device: torch.device) -> float:
    """Forms the group and sends one bucket from rank 0; the seconds of the forming."""
    say("weight-sync group")
    start = time.perf_counter()
    group = form_group(
        host=rank.master,
        port=rank.sync_port,
        world_size=rank.sync_size,
        backend=rank.backend,
        name="matpo-doctor",
        timeout_s=rank.timeout_s,
        rank=rank.sync_rank,
    )
    say("broadcast")
    bucket = torch.arange(1024, dtype=torch.float32, device=device)
    expected = float(bucket.sum())
    if rank.sync_rank > 0:
        bucket.zero_()
    dist.broadcast(bucket, 0, group=group)
    assert float(bucket.sum()) == expected, "the bucket arrived whole"
    return time.perf_counter() - start


def run(rank: Rank) -> None:
    """Both checks, said stage by stage."""
    say("meet")
    if rank.gpu >= 0:
        torch.cuda.set_device(rank.gpu)
    device = torch.device("cuda", rank.gpu) if rank.gpu >= 0 else torch.device("cpu")
    timeout = timedelta(seconds=rank.timeout_s)
    store = bound_store(
        rank.master, rank.port, rank.world_size, is_master=rank.rank == 0, timeout=timeout
    )
    dist.init_process_group(
        rank.backend, store=store, rank=rank.rank, world_size=rank.world_size, timeout=timeout
    )
    say("all-reduce")
    gb_s = _all_reduce(rank, device)
    sync_s = _sync(rank, device) if rank.sync_rank >= 0 else 0.0
    dist.barrier()  # nobody leaves with a store that others still read
    say("done", gb_s=gb_s, sync_s=sync_s)


def main() -> None:
    """Entry; the exit code says whether it worked, stderr why not."""
    say("start")
    run(Rank(**json.loads(sys.argv[1])))
    sys.stdout.flush()
    # Without Python's shutdown, in which gloo's threads may abort the process.
    os._exit(0)


if __name__ == "__main__":
    main()
