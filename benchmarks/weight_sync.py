"""How fast whole weight pushes are, against a raw broadcast of the same bytes in the same run.

    python benchmarks/weight_sync.py --json

Stock SGLang servers on the CPU with a random Qwen3 of --hidden x --layers (the default has 1.37 GB
in fp32), one and two of them. Per transport and number of servers (`broadcast` -> `1` -> ...),
medians over --pushes, before each of which the raw broadcast is timed:

* `push_s`: the whole transaction, from the export's first tensor to the last engine resumed;
* `raw_s`: the same bytes through a gloo group with as many bare receivers (`raw_broadcast.py`);
* `bandwidth_ratio`: median of `raw_s / push_s` of neighbours in time;
* `pause_s`: how much longer than otherwise the slowest of many short generations took meanwhile;
* `paused_s`: from the first request to pause to the last engine resumed, as the trainer sees it;
* `peak_host_bytes`: how much this process (the trainer) grew at most during the pushes.

The export gives tensors that are in memory, as the trainer's does where nothing is gathered. This
process has the environment of a trainer rank on a CPU (`KEEP_FREED_MEMORY`).

Between processes of one machine sending is hardly slower than copying, so whatever copies looks
expensive. With `--link-gbit N` (as root) everything happens in a network namespace whose loopback
carries N Gbit/s, and the link is the limit, as it is between nodes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file: `benchmarks` and `tests` are no installed packages

import psutil  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.raw_broadcast import RawBroadcast  # noqa: E402
from megatron_matpo.config.hf_model import HfModelConfig  # noqa: E402
from megatron_matpo.errors import EngineError  # noqa: E402
from megatron_matpo.megatron.hf_io import write_hf_folder  # noqa: E402
from megatron_matpo.megatron.mapping import hf_shapes  # noqa: E402
from megatron_matpo.ports import free_ports  # noqa: E402
from megatron_matpo.rollout.engine_command import KEEP_FREED_MEMORY  # noqa: E402
from megatron_matpo.rollout.generation import SamplingParams  # noqa: E402
from megatron_matpo.weight_sync.broadcast import BroadcastTransport  # noqa: E402
from megatron_matpo.weight_sync.buckets import make_buckets  # noqa: E402
from megatron_matpo.weight_sync.disk import DiskTransport  # noqa: E402
from megatron_matpo.weight_sync.ipc import IpcTransport  # noqa: E402
from megatron_matpo.weight_sync.layout import EngineShape  # noqa: E402
from megatron_matpo.weight_sync.shared_buffers import HostBuffer  # noqa: E402
from megatron_matpo.weight_sync.transaction import Transaction  # noqa: E402
from megatron_matpo.weight_sync.transport import Transport  # noqa: E402
from megatron_matpo.weight_sync.verify import Verifier  # noqa: E402
from tests.helpers.sglang_servers import SglangServer, sglang_servers  # noqa: E402

LIMIT_S = 300.0
KV_HEADS = 16
IS_LIMITED = "MATPO_BENCHMARK_LINK"
"""Set in the environment of the process that has its network."""


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
    raw: RawBroadcast,
    options: argparse.Namespace,
    versions: Iterator[int],
) -> dict[str, float]:
    """Medians of `--pushes` pushes, after one that warms up; then one more beside generations."""
    shape = EngineShape(1, KV_HEADS, torch.float32, on_cpu=True)
    sync = Transaction(
        lambda: iter(weights.items()),
        [server.client() for server in servers],
        transport,
        Verifier(options.verify, shape, on_gpu=False),
        timeout_s=LIMIT_S,
        start_timeout_s=LIMIT_S,
    )
    sync.connect()
    raw_s, push_s, reports = [], [], []
    with Meanwhile(servers[0], generates=False) as quiet:
        sync.push(next(versions))
        for _ in range(options.pushes):
            raw_s.append(raw.seconds())
            started = time.perf_counter()
            sync.push(next(versions))
            push_s.append(time.perf_counter() - started)
            reports.append(sync.report)
    with Meanwhile(servers[0], generates=True) as busy:
        time.sleep(2.0)
        started = time.perf_counter()
        sync.push(next(versions))
        ended = time.perf_counter()
        time.sleep(1.0)
    usual = statistics.median(took for at, took in busy.latencies if at + took < started)
    worst = max(took for at, took in busy.latencies if at < ended and at + took > started)
    sync.close()
    return {
        "bandwidth_ratio": statistics.median(r / p for r, p in zip(raw_s, push_s, strict=True)),
        "pause_s": worst - usual,
        "peak_host_bytes": quiet.peak_bytes - quiet.start_bytes,
        "raw_s": statistics.median(raw_s),
        "push_s": statistics.median(push_s),
        "prepare_s": statistics.median(report.prepare_s for report in reports),
        "deliver_s": statistics.median(report.deliver_s for report in reports),
        "verify_s": statistics.median(report.verify_s for report in reports),
        "paused_s": statistics.median(report.pause_s for report in reports),
    }


def main() -> None:
    """Measure all transports; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pushes", type=int, default=5)
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--transports", nargs="+", default=["broadcast", "ipc", "disk"])
    parser.add_argument("--verify", choices=("full", "sample", "version"), default="sample")
    parser.add_argument("--link-gbit", type=float, default=0.0, help="0: no limit")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    prepare_process(options.link_gbit)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        result = run(Path(name), options)
    if options.json:
        print(json.dumps(result))


def prepare_process(link_gbit: float) -> None:
    """Start this program anew where its environment or its network is not what is wanted."""
    env = {**os.environ, **KEEP_FREED_MEMORY}
    if link_gbit and IS_LIMITED not in os.environ:
        limit = f"ip link set lo up && tc qdisc add dev lo root tbf rate {link_gbit}gbit"
        script = f'{limit} burst 1mb latency 50ms && exec "$@"'
        command = ["unshare", "--net", "sh", "-c", script, "sh", sys.executable, *sys.orig_argv[1:]]
        os.execvpe(command[0], command, {**env, IS_LIMITED: "1"})
    if not env.items() <= os.environ.items():
        # The allocator reads its settings once, when a process starts.
        os.execve(sys.executable, sys.orig_argv, env)


def run(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, by transport and number of servers."""
    model = root / "model"
    write_config(model, options.hidden, options.layers)
    hf = HfModelConfig.from_folder(model)
    weights = {name: 0.02 * torch.randn(shape) for name, shape in hf_shapes(hf).items()}

    def write(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        write_hf_folder(folder, tensors, hf, torch.float32, model)

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

    def ipc() -> Transport:
        writers = {server.url: (0,) for server in servers}
        return IpcTransport(bucket_bytes=bucket_bytes, writers=writers, make_buffer=HostBuffer)

    transports: dict[str, Callable[[], Transport]] = {
        "broadcast": broadcast,
        "ipc": ipc,
        "disk": lambda: DiskTransport(root / "weights", write),
    }
    flat = make_buckets(weights.items(), bucket_bytes, flat=True)
    buckets = [part for bucket in flat for part in bucket.parts]
    result: dict[str, Any] = {
        "bytes": sum(bucket.nbytes for bucket in buckets),
        "verify": options.verify,
        "link_gbit": options.link_gbit,
        **{name: {} for name in options.transports},
    }
    versions = itertools.count(1)
    write(root / "start", iter(weights.items()))
    with sglang_servers(root / "start", root, max(options.servers), mem_fraction=0.3) as servers:
        for num in options.servers:
            with RawBroadcast(buckets, num) as raw:
                for name in options.transports:
                    transport = transports[name]()
                    seen = measure(servers[:num], weights, transport, raw, options, versions)
                    result[name][str(num)] = seen
                    shown = {key: round(value, 3) for key, value in seen.items()}
                    print(name, num, shown, file=sys.stderr, flush=True)
    return result


if __name__ == "__main__":
    main()
