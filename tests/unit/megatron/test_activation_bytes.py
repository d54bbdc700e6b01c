"""The plan's activations of a layer against what torch keeps for the backward pass, to the byte.

Measured: the local layer spec in fp32 on the CPU. Not measured here: Transformer Engine's layers,
for which `tests/gpu/test_memory_gpu.py` compares peaks where there is a GPU.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron.model import build_model
from megatron_matpo.megatron.parallel import destroy_parallel, init_parallel
from megatron_matpo.planning.activations import layer_bytes_per_token
from megatron_matpo.planning.shape import job_of
from tests.helpers.dist import free_port
from tests.helpers.tiny import make_tiny_model, tiny_config


@pytest.mark.parametrize("tokens", [64, 96])
def test_a_layer_keeps_what_the_formula_says(tmp_path, tokens):
    folder = make_tiny_model(tmp_path / "model", tied=False)
    config, hf = tiny_config(folder), HfModelConfig.from_folder(folder)
    state = init_parallel(config, rank=0, world_size=1, master_port=free_port())
    try:
        (model,) = build_model(config, hf, state)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}
        alive: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)  # so that no address is used twice
            return tensor

        hidden = torch.randn(tokens, 1, hf.hidden_size, requires_grad=True) * 1
        rotary = model.rotary_pos_emb(tokens, packed_seq=True)
        # Two samples: what attention keeps does not depend on where they begin.
        offsets = torch.tensor([0, tokens // 4, tokens], dtype=torch.int32)
        longest = tokens - tokens // 4
        packing = PackedSeqParams("thd", offsets, offsets, None, None, longest, longest)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.decoder.layers[1](
                hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=packing
            )
    finally:
        destroy_parallel()
    assert sum(kept.values()) == tokens * layer_bytes_per_token(job_of(config, hf))
