"""Proves that a stock SGLang server is started, spoken to, refitted and ended as the package says.

One real server on the CPU with a random Qwen3 of a few thousand parameters; transformers is the
oracle. Says nothing about GPUs, about tensor parallelism inside a server, or about speed.
The tests share the server and run in order: later ones change its weights, the last one ends it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from megatron_matpo.errors import EngineRejected
from megatron_matpo.rollout.engine_client import EngineClient
from megatron_matpo.rollout.engine_command import EngineSpec, engine_command
from megatron_matpo.rollout.generation import Generation, SamplingParams
from megatron_matpo.types import VersionSpan
from megatron_matpo.weight_sync.buckets import make_buckets
from megatron_matpo.weight_sync.group import form_group
from tests.helpers.tiny import VOCAB_SIZE, make_tiny_model

ROLLOUT_PYTHON = Path(__file__).parents[2] / ".venv-rollout" / "bin" / "python"
KEY = "a-key-that-must-not-be-seen"
START_LIMIT_S = 240.0
LIMIT_S = 60.0
# Starts its arguments, says the process id and waits: the parent that the last test kills.
PARENT = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:])
print(child.pid, flush=True)
child.wait()
"""

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.slow,
    pytest.mark.skipif(not ROLLOUT_PYTHON.exists(), reason="no .venv-rollout: run make setup"),
]


@dataclass(frozen=True)
class Server:
    url: str
    model: Any
    parent: subprocess.Popen[str]
    pid: int
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("engine")
    model_path = make_tiny_model(folder / "model", tied=False)
    port, internal_port = free_ports(2)
    command = engine_command(
        EngineSpec(
            python=str(ROLLOUT_PYTHON),
            model_path=str(model_path),
            port=port,
            internal_port=internal_port,
            dtype="float32",
            max_total_tokens=8192,
            mem_fraction=0.1,
            api_key=KEY,
        )
    )
    log = folder / "engine.log"
    with log.open("w") as sink:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, *command.argv],
            env={**os.environ, **command.env},
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
        )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    # What follows on the pipe is the server's own output; it is read so that it never fills up.
    threading.Thread(target=parent.stdout.read, daemon=True).start()
    url = f"http://127.0.0.1:{port}"
    try:

        async def wait(client: EngineClient) -> None:
            await client.wait_ready(
                deadline_s=START_LIMIT_S, process_alive=lambda: parent.poll() is None
            )

        try:
            with_client(url, wait)
        except Exception as error:
            pytest.fail(f"{error}\n{log.read_text()[-3000:]}")
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        yield Server(url, model, parent, pid, log)
    finally:
        parent.kill()
        parent.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def with_client(
    url: str, use: Callable[[EngineClient], Coroutine[Any, Any, Any]], key: str = KEY
) -> Any:
    async def run() -> Any:
        client = EngineClient(url, key, request_timeout_s=LIMIT_S)
        try:
            return await use(client)
        finally:
            await client.close()

    return asyncio.run(run())


def expected_logprobs(
    model: Any, prompt: list[int], sampled: Generation, temperature: float
) -> Tensor:
    """[M] what transformers says of the sampled tokens."""
    tokens = torch.tensor([[*prompt, *sampled.token_ids]])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(sampled.token_ids)[:, None]).squeeze(-1)


def assert_agrees(
    model: Any, prompt: list[int], sampled: Generation, temperature: float = 1.0
) -> None:
    expected = expected_logprobs(model, prompt, sampled, temperature)
    torch.testing.assert_close(
        torch.tensor(sampled.logprobs, dtype=torch.float64), expected, atol=1e-4, rtol=0
    )


def test_logprobs_agree_with_transformers(server: Server) -> None:
    prompts = [[5 + i, *range(20, 30 + 3 * i)] for i in range(6)]
    params = SamplingParams(max_new_tokens=12, temperature=0.7)

    async def ask(client: EngineClient) -> list[Generation]:
        return await asyncio.gather(*[client.generate(prompt, params) for prompt in prompts])

    for prompt, sampled in zip(prompts, with_client(server.url, ask), strict=True):
        assert_agrees(server.model, prompt, sampled, temperature=0.7)
        assert sampled.versions == (VersionSpan(0, len(sampled.token_ids)),)


def test_second_turn_behind_a_cached_prefix_agrees(server: Server) -> None:
    params = SamplingParams(max_new_tokens=8)

    async def converse(client: EngineClient) -> None:
        context = list(range(40, 60))
        for reply in ([7, 8, 9], [11, 12], []):
            sampled = await client.generate(context, params)
            assert_agrees(server.model, context, sampled)
            context += [*sampled.token_ids, *reply]

    with_client(server.url, converse)


def test_greedy_takes_the_most_probable_token(server: Server) -> None:
    prompt = [9, 8, 7]
    params = SamplingParams(max_new_tokens=1, temperature=0.0)
    sampled = with_client(server.url, lambda client: client.generate(prompt, params))
    with torch.no_grad():
        assert tuple(sampled.token_ids) == (
            int(server.model(torch.tensor([prompt])).logits[0, -1].argmax()),
        )
    assert_agrees(server.model, prompt, sampled)
    assert sampled.finish_reason == "length"


def test_the_token_that_stops_is_returned(server: Server) -> None:
    params = SamplingParams(max_new_tokens=50, stop_token_ids=tuple(range(0, VOCAB_SIZE, 2)))
    sampled = with_client(server.url, lambda client: client.generate([30, 31], params))
    assert sampled.finish_reason == "stop"
    assert sampled.token_ids[-1] % 2 == 0 or sampled.token_ids[-1] == 3
    assert all(token % 2 for token in sampled.token_ids[:-1])
    assert_agrees(server.model, [30, 31], sampled)


def test_the_key_is_needed_and_not_shown(server: Server) -> None:
    params = SamplingParams(max_new_tokens=1)
    with pytest.raises(EngineRejected, match="HTTP 401"):
        with_client(server.url, lambda client: client.generate([5], params), key="wrong")
    pids = [server.pid, *children(server.pid)]
    assert len(pids) >= 3, "server, scheduler, detokenizer"
    for pid in pids:
        assert KEY not in Path(f"/proc/{pid}/cmdline").read_text()
    assert KEY not in server.log.read_text()
    assert "server_args=" in server.log.read_text(), "the line that would show it is there"


@pytest.mark.parametrize("version", [1, 2])
def test_weights_are_replaced_in_a_running_server(server: Server, version: int) -> None:
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for parameter in server.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    (port,) = free_ports(1)
    name = f"weights-{version}"

    async def push(client: EngineClient) -> Generation:
        own, _ = await asyncio.gather(
            asyncio.to_thread(
                form_group,
                host="127.0.0.1",
                port=port,
                world_size=2,
                backend="gloo",
                name=name,
                timeout_s=LIMIT_S,
            ),
            client.init_weights_update_group(
                master_address="127.0.0.1",
                master_port=port,
                rank_offset=1,
                world_size=2,
                group_name=name,
                backend="gloo",
                deadline_s=LIMIT_S,
            ),
        )
        await client.pause(mode="retract", deadline_s=LIMIT_S)
        buckets = list(make_buckets(server.model.state_dict().items(), 8192))
        assert len(buckets) > 2
        for bucket in buckets:
            is_last = bucket is buckets[-1]
            await asyncio.gather(
                asyncio.to_thread(dist.broadcast, bucket.data, src=0, group=own),
                client.update_weights_from_distributed(
                    names=bucket.names,
                    dtypes=bucket.dtypes,
                    shapes=bucket.shapes,
                    group_name=name,
                    weight_version=str(version) if is_last else None,
                    load_format="flattened_bucket",
                    flush_cache=is_last,
                    deadline_s=LIMIT_S,
                ),
            )
            expected = version if is_last else version - 1
            assert await client.weight_version(deadline_s=LIMIT_S) == str(expected)
        await client.resume(deadline_s=LIMIT_S)
        await client.destroy_weights_update_group(group_name=name, deadline_s=LIMIT_S)
        return await client.generate([5, 6, 7, 8], SamplingParams(max_new_tokens=6))

    sampled = with_client(server.url, push)
    assert sampled.versions == (VersionSpan(version, len(sampled.token_ids)),)
    assert_agrees(server.model, [5, 6, 7, 8], sampled)


def test_nothing_is_left_when_the_parent_is_killed(server: Server) -> None:
    pids = [server.pid, *children(server.pid)]
    os.kill(server.parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def children(pid: int) -> list[int]:
    found: list[int] = []
    for entry in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (entry / "children").read_text().split()]
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
