"""How fast whole weight pushes are, against a raw broadcast of the same bytes in the same run.

    python benchmarks/weight_sync.py --json

Stock SGLang servers on the CPU with a random Qwen3 of --hidden x --layers (the default has 590 MB
in fp32), one and two of them. Per transport and number of servers, medians over --pushes:

* `push_s`: the whole transaction, from the export's first tensor to the last engine resumed;
* `raw_s`: the same bytes in the same buckets through a gloo group with as many bare receivers;
* `bandwidth_ratio`: `raw_s / push_s`;
* `pause_s`: how much longer than otherwise the slowest of many short generations took meanwhile;
* `paused_s`: from the first request to pause to the last engine resumed, as the trainer sees it;
* `peak_host_bytes`: how much this process (the trainer) grew at most during a push.

The export gives copies of tensors that are in memory, so it is as cheap as an export can be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch import distributed as dist

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.errors import EngineError
from megatron_matpo.launch.ports import free_ports
from megatron_matpo.megatron.hf_io import write_hf_folder
from megatron_matpo.megatron.mapping import hf_shapes
from megatron_matpo.rollout.generation import SamplingParams
from megatron_matpo.weight_sync.broadcast import BroadcastTransport
from megatron_matpo.weight_sync.buckets import make_buckets
from megatron_matpo.weight_sync.disk import DiskTransport
from megatron_matpo.weight_sync.group import form_group
from megatron_matpo.weight_sync.layout import EngineShape
from megatron_matpo.weight_sync.transaction import Transaction, Transport
from megatron_matpo.weight_sync.verify import Verifier
from tests.helpers.sglang_servers import SglangServer, sglang_servers

LIMIT_S = 300.0
KV_HEADS = 16


def write_config(folder: Path, hidden: int, layers: int) -> None:
    """config.json of a Qwen3 with random weights."""
    folder.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": KV_HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": hidden // KV_HEADS,
        "vocab_size": 32000,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "eos_token_id": 3,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _bare_receiver(rank: int, size: int, port: int, sizes: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    group = form_group(
        host="127.0.0.1",
        port=port,
        world_size=size,
        backend="gloo",
        name=f"raw{size}",
        timeout_s=LIMIT_S,
        rank=rank,
    )
    buffers = [torch.empty(count, dtype=torch.uint8) for count in sizes]
    for _ in range(rounds):
        dist.barrier(group=group)
        for buffer in buffers:
            dist.broadcast(buffer, src=0, group=group)
        dist.barrier(group=group)


def raw_broadcast_s(weights: dict[str, Tensor], bucket_bytes: int, num: int, rounds: int) -> float:
    """Median seconds of sending all buckets, made before, to `num` processes that only receive."""
    buckets = [bucket.data for bucket in make_buckets(weights.items(), bucket_bytes)]
    (port,) = free_ports("127.0.0.1", 1)
    sizes = [bucket.numel() for bucket in buckets]
    context = multiprocessing.get_context("spawn")
    receivers = [
        context.Process(
            target=_bare_receiver, args=(i + 1, num + 1, port, sizes, rounds), daemon=True
        )
        for i in range(num)
    ]
    for receiver in receivers:
        receiver.start()
    group = form_group(
        host="127.0.0.1",
        port=port,
        world_size=num + 1,
        backend="gloo",
        name=f"raw{num + 1}",
        timeout_s=LIMIT_S,
    )
    seconds = []
    for _ in range(rounds):
        dist.barrier(group=group)
        started = time.perf_counter()
        for bucket in buckets:
            dist.broadcast(bucket, src=0, group=group)
        dist.barrier(group=group)
        seconds.append(time.perf_counter() - started)
    for receiver in receivers:
        receiver.join()
    return statistics.median(seconds)


class Meanwhile:
    """Short generations on one server, and this process's memory, while pushes run."""

    def __init__(self, server: SglangServer, *, generates: bool) -> None:
        """Begin with `with`."""
        self._server, self._generates = server, generates
        self._is_over = threading.Event()
        self.latencies: list[tuple[float, float]] = []
        """(start, seconds) of every generation."""
        self.peak_bytes = self.start_bytes = psutil.Process().memory_info().rss
        self._threads = [threading.Thread(target=self._watch)]
        if generates:
            self._threads.append(threading.Thread(target=lambda: asyncio.run(self._ask())))

    def __enter__(self) -> Meanwhile:
        """Begin."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End, and wait for what is running."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._is_over.wait(0.005):
            self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)

    async def _ask(self) -> None:
        client = self._server.client(LIMIT_S)
        while not self._is_over.is_set():
            started = time.perf_counter()
            with suppress(EngineError):  # a generation that a pause ends
                await client.generate([5, 6, 7], SamplingParams(max_new_tokens=1))
            self.latencies.append((started, time.perf_counter() - started))
        await client.close()


def measure(
    servers: list[SglangServer],
    weights: dict[str, Tensor],
    transport: Transport,
    verify: str,
    first_version: int,
    pushes: int,
) -> dict[str, float]:
    """Medians of `pushes` pushes, after one that warms up; then one more beside generations."""

    def export() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights.items():
            yield name, tensor.clone()

    shape = EngineShape(1, KV_HEADS, torch.float32, on_cpu=True)
    sync = Transaction(
        export,
        [server.client() for server in servers],
        transport,
        Verifier(verify, shape, on_gpu=False),
        timeout_s=LIMIT_S,
        start_timeout_s=LIMIT_S,
    )
    sync.connect()
    version = first_version
    sync.push(version)
    seconds, paused, verifying, preparing = [], [], [], []
    with Meanwhile(servers[0], generates=False) as quiet:
        for _ in range(pushes):
            version += 1
            started = time.perf_counter()
            sync.push(version)
            seconds.append(time.perf_counter() - started)
            paused.append(sync.report.pause_s)
            verifying.append(sync.report.verify_s)
            preparing.append(sync.report.prepare_s)
    with Meanwhile(servers[0], generates=True) as busy:
        time.sleep(2.0)
        started = time.perf_counter()
        sync.push(version + 1)
        ended = time.perf_counter()
        time.sleep(1.0)
    usual = statistics.median(took for at, took in busy.latencies if at + took < started)
    worst = max(took for at, took in busy.latencies if at < ended and at + took > started)
    sync.close()
    return {
        "push_s": statistics.median(seconds),
        "prepare_s": statistics.median(preparing),
        "verify_s": statistics.median(verifying),
        "paused_s": statistics.median(paused),
        "pause_s": worst - usual,
        "peak_host_bytes": quiet.peak_bytes - quiet.start_bytes,
    }


def main() -> None:
    """Measure all transports; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--pushes", type=int, default=3)
    parser.add_argument("--bucket-mb", type=int, default=128)
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        result = run(Path(name), options)
    if options.json:
        print(json.dumps(result))


def run(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, by transport, verification and number of servers."""
    model = root / "model"
    write_config(model, options.hidden, options.layers)
    hf = HfModelConfig.from_folder(model)
    weights = {name: 0.02 * torch.randn(shape) for name, shape in hf_shapes(hf).items()}

    def write(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        write_hf_folder(folder, tensors, hf, torch.float32, model)

    write_hf_folder(root / "start", iter(weights.items()), hf, torch.float32, model)
    bucket_bytes = options.bucket_mb << 20

    def broadcast() -> Transport:
        (port,) = free_ports("127.0.0.1", 1)
        return BroadcastTransport(
            bucket_bytes=bucket_bytes,
            ranks_per_engine=1,
            host="127.0.0.1",
            port=port,
            backend="gloo",
        )

    kinds: list[tuple[str, str, Callable[[], Transport]]] = [
        ("broadcast", "version", broadcast),
        ("broadcast", "sample", broadcast),
        ("broadcast", "full", broadcast),
        ("disk", "sample", lambda: DiskTransport(root / "weights", write)),
    ]
    num_bytes = sum(4 * tensor.numel() for tensor in weights.values())
    result: dict[str, Any] = {"bytes": num_bytes}
    version = 0
    with sglang_servers(root / "start", root, max(options.servers), mem_fraction=0.3) as servers:
        for num in options.servers:
            raw_s = raw_broadcast_s(weights, bucket_bytes, num, options.pushes)
            for transport, verify, make in kinds:
                seen = measure(servers[:num], weights, make(), verify, version, options.pushes)
                version += options.pushes + 2
                seen |= {
                    "raw_s": raw_s,
                    "bandwidth_ratio": raw_s / seen["push_s"],
                    "gb_s": num_bytes / seen["push_s"] / 1e9,
                }
                key = f"{transport}/{verify}/{num}"
                result[key] = seen
                print(key, _rounded(seen), file=sys.stderr, flush=True)
    return result


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 3) for key, value in values.items()}


if __name__ == "__main__":
    main()
