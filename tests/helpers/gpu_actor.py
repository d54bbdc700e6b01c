"""An actor on one GPU, and batches that make it work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megatron_matpo.config import Config
from megatron_matpo.config.fp8 import Fp8Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.megatron import layer_spec
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.batch import MicroBatch
from megatron_matpo.megatron.parallel import destroy_parallel, init_parallel
from tests.helpers.dist import free_port
from tests.helpers.tiny import tiny_config


def make_gpu_model(folder: Path, *, layers: int = 4, hidden: int = 512) -> Path:
    """A random Qwen3 whose sizes are multiples of what FP8 products need."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            head_dim=64,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            eos_token_id=3,
        )
    ).save_pretrained(folder)
    return folder


def gpu_config(folder: Path, precision: str, recipe: str = "auto", **train: object) -> Config:
    """One GPU; the chunk of log-probs is small beside the activations."""
    base = tiny_config(folder, **train)
    return replace(
        base,
        cluster=ClusterConfig(gpus_per_node=1),
        precision=precision,
        fp8=Fp8Config(recipe=recipe),
        optim=replace(base.optim, lr=1e-4, eps=1e-8, clip_grad=1.0),
    )


@contextlib.contextmanager
def gpu_actor(config: Config) -> Iterator[MegatronActor]:
    """Built, loaded, and gone with its process group afterwards."""
    state = init_parallel(config, rank=0, world_size=1, master_port=free_port())
    try:
        actor = MegatronActor(config, HfModelConfig.from_folder(config.model.path), state)
        actor.load_initial()
        yield actor
    finally:
        destroy_parallel()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def local_layers() -> Iterator[None]:
    """Inside the block models are built of the local layers on a GPU too, as on a CPU.

    Our attention, and Megatron's own linears; the final norm stays Transformer Engine's.
    """
    engine_layer = layer_spec._engine_layer
    layer_spec._engine_layer = layer_spec._local_layer
    try:
        yield
    finally:
        layer_spec._engine_layer = engine_layer


def learnable_batch(tokens: int, seed: int) -> MicroBatch:
    """A row of a short repeating pattern: its loss falls within a few updates."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(0, 4096, (16,), generator=generator)
    row = pattern.repeat(tokens // 16 + 1)[: tokens + 1]
    ones = torch.ones(tokens)
    return MicroBatch(
        input_ids=row[:-1],
        labels=row[1:],
        loss_mask=ones,
        old_logprobs=ones * 0,
        rollout_logprobs=ones * 0,
        advantages=ones,
        loss_weights=ones,
        is_worker=ones * 0,
        lengths=(tokens,),
        sample_ids=(str(seed),),
    )
