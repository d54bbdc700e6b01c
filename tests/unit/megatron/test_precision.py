"""The policy as Megatron's settings, and training in bf16 on the CPU.

Not proved here: FP8 and NVIDIA's kernels, which need a GPU (`tests/gpu/test_precision_gpu.py`).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_matpo.config import Config
from megatron_matpo.config.fp8 import Fp8Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.precision import FP8_RECIPES, Platform, decide_precision
from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.megatron import memory
from megatron_matpo.megatron import precision as here
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.parallel import destroy_parallel, init_parallel
from tests.helpers.dist import free_port
from tests.helpers.tiny import make_batch, make_tiny_model, tiny_config, weighted_loss


def fp8_config(recipe: str, **fp8) -> Config:
    return Config(
        cluster=ClusterConfig(gpus_per_node=8),
        precision="fp8",
        fp8=Fp8Config(recipe=recipe, **fp8),
    )


@pytest.mark.parametrize("recipe", sorted(FP8_RECIPES))
@pytest.mark.parametrize("params", [False, True])
def test_megatron_accepts_the_settings_of_every_recipe(recipe, params):
    layers = 0 if recipe == "delayed" else 2
    config = fp8_config(recipe, first_last_layers_bf16=layers, params=params)
    precision = decide_precision(config, Platform())
    megatron = TransformerConfig(
        num_layers=8,
        hidden_size=64,
        num_attention_heads=4,
        **here.transformer_settings(config, precision),
    )
    assert (megatron.fp8_recipe, megatron.fp8_param) == (recipe, params)
    assert megatron.fp8 == ("hybrid" if recipe in ("tensorwise", "delayed") else "e4m3")
    assert megatron.params_dtype is torch.bfloat16
    assert megatron.first_last_layers_bf16 == (layers > 0)
    kept = [megatron.num_layers_at_start_in_bf16, megatron.num_layers_at_end_in_bf16]
    assert kept == [layers, layers]
    ddp = DistributedDataParallelConfig(**here.ddp_settings(config, precision))
    assert ddp.fp8_param_gather == params
    assert ddp.reuse_grad_buf_for_mxfp8_param_ag == (params and recipe == "mxfp8")
    optimizer = OptimizerConfig(**here.optimizer_settings(config, precision))
    assert optimizer.fp8_recipe == (recipe if params else None)
    assert (optimizer.bf16, optimizer.params_dtype) == (True, torch.bfloat16)


def test_without_fp8_nothing_of_it_is_set():
    config = Config()
    settings = here.transformer_settings(config, here.resolve_precision(config))
    float32 = torch.float32
    assert settings == {"params_dtype": float32, "pipeline_dtype": float32, "bf16": False}


@pytest.mark.parametrize(
    ("text", "expected"), [("2.11.0+c188b53", (2, 11)), ("13.0", (13, 0)), ("", None)]
)
def test_versions(text, expected):
    assert here.parse_version(text) == expected


def test_the_log_line_says_what_and_why():
    assert here.describe(Config()) == (
        "precision: fp32: the CPU platform; apex: not on the CPU platform"
    )


def test_apex_is_used_where_it_is_and_never_required(monkeypatch):
    monkeypatch.setattr(here.importlib.util, "find_spec", lambda name: None)
    assert not here.fused_kernels("cuda").grad_accumulation
    monkeypatch.setattr(here.importlib.util, "find_spec", lambda name: object())
    assert here.fused_kernels("cuda").grad_accumulation
    assert not here.fused_kernels("cpu").grad_accumulation


def test_a_device_without_fp8_is_refused_by_the_trainer_too(monkeypatch):
    monkeypatch.setattr(here, "this_platform", lambda device: Platform((8, 0), (2, 11), (13, 0)))
    with pytest.raises(ConfigError, match=r"this GPU \(sm_80\) has no FP8"):
        here.parameter_dtype(fp8_config("auto"))


def test_bf16_trains_on_the_cpu_as_fp32_does(tmp_path):
    """Two updates. bf16 keeps 8 bits, so that single log-probs differ by about 1 %."""
    folder = make_tiny_model(tmp_path / "model", tied=False)
    batches = [make_batch((3, 17), 0), make_batch((2, 9), 1)]
    losses = {}
    for word, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        config = dataclasses.replace(tiny_config(folder), precision=word)
        state = init_parallel(config, rank=0, world_size=1, master_port=free_port())
        try:
            actor = MegatronActor(config, HfModelConfig.from_folder(folder), state)
            actor.load_initial()
            assert {p.dtype for model in actor._models for p in model.parameters()} == {dtype}
            grads = {b.grad_data.dtype for model in actor._models for b in model.buffers}
            assert grads == {torch.float32}
            before = {name: value.clone() for name, value in actor.export()}
            results = [actor.update(batches, weighted_loss, i) for i in range(2)]
            after = dict(actor.export())
            # A step of 1e-3 is below bf16's resolution at 1, where the norms' weights are.
            moved = {name for name in after if not torch.equal(before[name], after[name])}
            assert moved >= {name for name in after if "norm" not in name}
            losses[word] = [(r.loss, r.grad_norm) for r in results]
        finally:
            destroy_parallel()
    for fp32, bf16 in zip(losses["fp32"], losses["bf16"], strict=True):
        assert bf16 != fp32
        assert bf16 == pytest.approx(fp32, rel=0.03)


def test_memory_is_measured_only_on_a_gpu(monkeypatch, tmp_path):
    assert memory.PeakMemory(Config(), 0).metrics(1) == {}
    folder = make_tiny_model(tmp_path / "model", tied=False)
    config = dataclasses.replace(
        tiny_config(folder), cluster=ClusterConfig(gpus_per_node=1), precision="bf16"
    )
    monkeypatch.setattr(here, "this_platform", lambda device: Platform((8, 0)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    said = memory.PeakMemory(config, 0).metrics(1)
    assert said["memory/peak_gib"] == 3
    # 18 bytes per parameter, padding included, are there all the time.
    assert said["memory/plan_gib"] > 18 * 49888 / 2**30
