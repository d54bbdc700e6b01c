"""Proves what is decided about a server's command line; that SGLang takes it is a smoke test's."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_matpo.config.plan import EnginePlace
from megatron_matpo.config.root import Config
from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.rollout.engine_command import SERVE, EngineSpec, engine_command, engine_spec

SPEC = EngineSpec(python="py", model_path="a model", port=30000, internal_port=30001)


def option(argv: tuple[str, ...], name: str) -> str:
    """The value that SGLang takes for `name`: the last one given."""
    values = [argv[i + 1] for i, word in enumerate(argv) if word == name]
    assert values, f"{name} is not given"
    return values[-1]


def test_runs_serve_py_with_the_rollout_python() -> None:
    command = engine_command(SPEC)
    assert command.argv[:2] == ("py", str(SERVE))
    assert SERVE.is_file()
    assert str(command).startswith("py ") and "'a model'" in str(command)


def test_the_key_is_in_the_environment_only() -> None:
    spec = replace(SPEC, api_key="hush")
    command = engine_command(spec)
    assert command.env["MATPO_ENGINE_KEY"] == "hush"
    assert "hush" not in " ".join(command.argv)
    for shown in (str(command), repr(command), repr(spec)):
        assert "hush" not in shown
    assert "MATPO_ENGINE_KEY" not in engine_command(SPEC).env


def test_binds_to_loopback_unless_told_otherwise() -> None:
    assert option(engine_command(SPEC).argv, "--host") == "127.0.0.1"
    other = engine_command(replace(SPEC, host="10.0.0.5"))
    assert option(other.argv, "--host") == "10.0.0.5"


def test_two_servers_share_no_port() -> None:
    first = engine_command(SPEC).argv
    second = engine_command(replace(SPEC, port=30002, internal_port=30003)).argv
    ports = [option(argv, name) for argv in (first, second) for name in ("--port", "--nccl-port")]
    assert ports == ["30000", "30001", "30002", "30003"]


def test_only_an_engine_on_a_shared_gpu_has_the_memory_saver() -> None:
    flag = "--enable-memory-saver"
    for device in ("cpu", "cuda"):
        for gives in (False, True):
            spec = replace(SPEC, device=device, gives_memory_back=gives)
            assert (flag in engine_command(spec).argv) == (device == "cuda" and gives)
    shared = ClusterConfig(gpus_per_node=1, placement="colocated")
    place = EnginePlace(0, 0, "127.0.0.1", 1, 2, (0,))
    for config in (replace(Config(), cluster=shared), Config()):
        spec = engine_spec(config, place, "k", serves_own_weights=False)
        assert spec.gives_memory_back == (config.cluster.placement == "colocated")


def test_cpu_and_cuda_differ_where_they_must() -> None:
    cpu = engine_command(SPEC)
    assert option(cpu.argv, "--attention-backend") == "torch_native"
    assert cpu.env["SGLANG_USE_CPU_ENGINE"] == "1" and cpu.env["OMP_NUM_THREADS"] == "1"
    assert "--base-gpu-id" not in cpu.argv
    cuda = engine_command(replace(SPEC, device="cuda", base_gpu_id=4, tensor_parallel=2))
    assert option(cuda.argv, "--base-gpu-id") == "4"
    assert option(cuda.argv, "--tensor-parallel-size") == "2"
    assert "--attention-backend" not in cuda.argv
    assert "SGLANG_USE_CPU_ENGINE" not in cuda.env and "OMP_NUM_THREADS" not in cuda.env


@pytest.mark.parametrize(
    ("device", "given", "expected"), [("cpu", 0, "800"), ("cpu", 99, "99"), ("cuda", 99, "99")]
)
def test_kv_cache_size(device: str, given: int, expected: str) -> None:
    spec = replace(
        SPEC, device=device, max_total_tokens=given, max_running_requests=8, context_length=100
    )
    assert option(engine_command(spec).argv, "--max-total-tokens") == expected


def test_a_gpu_server_sizes_its_own_cache_by_default() -> None:
    command = engine_command(replace(SPEC, device="cuda", context_length=100))
    assert "--max-total-tokens" not in command.argv


def test_extra_arguments_come_last_and_win() -> None:
    command = engine_command(replace(SPEC, extra_args=("--mem-fraction-static", "0.3")))
    assert option(command.argv, "--mem-fraction-static") == "0.3"


def test_spec_from_a_plan() -> None:
    place = EnginePlace(1, 0, "127.0.0.1", 30000, 30001, gpus=(6, 7))
    config = Config(cluster=ClusterConfig(gpus_per_node=8))
    spec = engine_spec(config, place, "key", serves_own_weights=False)
    assert (spec.device, spec.base_gpu_id, spec.dtype) == ("cuda", 6, "bfloat16")
    assert (spec.port, spec.internal_port, spec.api_key) == (30000, 30001, "key")
    other = engine_spec(config, replace(place, index=2), "key", serves_own_weights=True)
    assert other.seed != spec.seed, "equal seeds would give equal samples"
    on_cpu = engine_spec(Config(), replace(place, gpus=()), "key", serves_own_weights=True)
    assert (on_cpu.device, on_cpu.base_gpu_id, on_cpu.dtype) == ("cpu", 0, "float32")


def test_needs_neither_torch_nor_sglang() -> None:
    code = (
        "import sys, megatron_matpo.rollout.engine_command;"
        "assert not {'torch', 'sglang', 'aiohttp'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
