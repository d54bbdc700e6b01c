"""Low-rank adapters beside frozen Megatron linears.

    y = W x + alpha / rank * B A x

The function is that of PEFT (`LoraConfig` without dropout): one pair (A, B) for every Hugging Face
layer named in `lora.targets`. Megatron fuses q, k, v and gate, up into one linear each; its adapter
stacks the As of its targets, and B is one matrix whose rows lie and are split exactly as those of
the fused weight (`mapping.py`). Rows of B that belong to no target stay 0.

Invariants:

* a base parameter keeps its name, never has a gradient, and is never written after loading;
* A of a column-parallel linear and B of a row-parallel one are equal on all tensor-parallel ranks,
  and so are their gradients: the reductions happen in rank dimensions, never in hidden ones;
* every adapter parameter carries Megatron's marks, so the gradient norm counts it once.

The adapter is a child module named `lora` of its linear, and adds to its output in a forward hook:
so Megatron, the mapping of names and checkpoints find the linear as it was.

Letters in shapes: s tokens of a sequence (of this rank's part with sequence parallelism), b
sequences, r rank, n targets of a linear, i its inputs, o its outputs (i, o: local to this rank).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.lora import LoraConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.megatron.families import Sharding
from megatron_matpo.megatron.mapping import Placed, local_part, placed_rules
from megatron_matpo.megatron.parallel import ParallelState

_CHILD = "lora"


@dataclass(frozen=True)
class Adapted:
    """A linear that gets an adapter."""

    rule: Placed
    targets: tuple[str, ...]
    """Hugging Face weights with a pair (A, B) of their own, a part of `rule.hf`."""
    owner: Tensor | None
    """[o, n]: 1 where a row of the fused weight belongs to a target; None for a row-parallel one.
    """


class Adapter(nn.Module):
    """A and B of one linear."""

    owner: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        adapted: Adapted,
        lora: LoraConfig,
        config: TransformerConfig,
        state: ParallelState,
    ) -> None:
        """Attach to `base`; parameters are undefined until `lora_io.init_adapters` or a restore."""
        super().__init__()
        weight = base.weight
        assert isinstance(weight, nn.Parameter)
        self.adapted, self.settings, self.state = adapted, lora, state
        self.is_active = True
        self._sequence_parallel = config.sequence_parallel
        self._eps = config.layernorm_epsilon
        num_outputs, num_inputs = weight.shape
        self.A = nn.Parameter(weight.new_empty(len(adapted.targets) * lora.rank, num_inputs))
        self.B = nn.Parameter(weight.new_empty(num_outputs, lora.rank))
        owner = None if adapted.owner is None else adapted.owner.to(weight)
        self.register_buffer("owner", owner, persistent=False)
        split, dim, whole = (self.A, 1, self.B) if self.is_row else (self.B, 0, self.A)
        set_tensor_model_parallel_attributes(split, True, dim, 1)
        # Megatron sums gradients of parameters with this mark over the tensor-parallel ranks, each
        # of which has seen its part of the tokens only.
        whole.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        base.add_module(_CHILD, self)
        base.register_forward_hook(self._add_to_output)
        weight.adapter = self  # type: ignore[attr-defined]

    @property
    def is_row(self) -> bool:
        """Inputs are split over the tensor-parallel ranks, not outputs."""
        return self.adapted.rule.sharding is Sharding.ROW

    def _add_to_output(
        self, base: nn.Module, args: tuple[Tensor, ...], result: tuple[Tensor, Any]
    ) -> tuple[Tensor, Any] | None:
        """Forward hook: (output [s, b, o], bias) -> the same with the adapter's part added."""
        if not self.is_active:
            return None
        output, bias = result
        (x,) = args
        norm = getattr(base, "layer_norm_weight", None)
        if norm is not None:
            # Transformer Engine's fused linear normalises its input and keeps the result.
            x = F.rms_norm(x, x.shape[-1:], norm, self._eps)
        u = F.linear(x, self.A) * self.settings.scale
        if self.is_row:
            reduce = (
                reduce_scatter_to_sequence_parallel_region
                if self._sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            u = reduce(u)
        elif self._sequence_parallel:
            u = gather_from_sequence_parallel_region(u)
        else:
            # Identity here; in the backward pass the sum over the ranks' outputs.
            u = copy_to_tensor_model_parallel_region(u)
        wide = widen(self.B, self.owner)
        flat = torch.addmm(output.flatten(0, -2), u.flatten(0, -2), wide.t())
        return flat.view_as(output), bias


def widen(b: Tensor, owner: Tensor | None) -> Tensor:
    """[o, n * r]: B [o, r] with each row in its target's columns, so that one product serves all.

    n times the arithmetic of separate products, which is little beside the base's, and nothing of
    the size of an activation has to be rearranged.
    """
    return b if owner is None else (b.unsqueeze(1) * owner.unsqueeze(2)).flatten(1)


@torch.no_grad()
def merge(weight: Tensor, a: Tensor, b: Tensor, owner: Tensor | None, scale: float) -> Tensor:
    """[o, i] float32, new: W + scale * B A, of whole matrices or of one rank's parts."""
    wide = widen(b.float(), None if owner is None else owner.float())
    return weight.to(torch.float32, copy=True).addmm_(wide, a.float(), alpha=scale)


def adapted_linears(
    hf: HfModelConfig, lora: LoraConfig, state: ParallelState | None = None
) -> list[Adapted]:
    """All linears with adapters, of all stages, in export order.

    Only `owner` differs between ranks. Without `state`: of the model as one rank would hold it.

    Raises:
        ConfigError: a target exists as experts of a mixture.
    """
    result: list[Adapted] = []
    tp_rank, tp_size = (state.tp_rank, state.tp_size) if state else (0, 1)
    layout = (state.pp_size, state.vp_size, state.ep_size) if state else ()
    for rule in placed_rules(hf, *layout):
        weights = [name for name in rule.hf if _layer(name) in lora.layers]
        experts = [name for name in weights if ".experts." in name]
        if experts:
            raise ConfigError(
                f"lora.targets={lora.targets}: {_layer(experts[0])} of this model are experts, "
                "which cannot have adapters; use q_proj, k_proj, v_proj, o_proj"
            )
        if weights:
            owner = None
            if rule.sharding is not Sharding.ROW:
                rows = [_rows_of(name, rule, hf, tp_rank, tp_size) for name in weights]
                owner = torch.cat(rows, dim=1)
            result.append(Adapted(rule, tuple(weights), owner))
    return result


def _layer(weight: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`; nothing for a bias or an embedding."""
    *_, name, kind = weight.split(".")
    return name if kind == "weight" else ""


def _rows_of(target: str, rule: Placed, hf: HfModelConfig, tp_rank: int, tp_size: int) -> Tensor:
    """[o, 1]: 1 where a row of this rank's fused weight is one of `target`'s."""

    def read(name: str, dim: int | None, start: int, stop: int) -> Tensor:
        assert dim == 0, "a column-parallel weight is cut by rows"
        return torch.full((stop - start, 1), float(name == target))

    return local_part(rule, read, hf, tp_rank, tp_size)


def add_adapters(
    models: Sequence[Any], hf: HfModelConfig, lora: LoraConfig, state: ParallelState
) -> None:
    """Freeze this rank's chunks and give their linears adapters. Before the DDP wrapper.

    Every trainer rank calls; nothing is communicated. Without `lora.rank` nothing happens.

    Raises:
        ConfigError: a target exists as experts of a mixture.
    """
    if not lora.rank:
        return
    for model in models:
        model.requires_grad_(False)
    for adapted in adapted_linears(hf, lora, state):
        if adapted.rule.stage == state.pp_rank:
            model = models[adapted.rule.chunk]
            parameters = dict(model.named_parameters())
            name = next(name for name in adapted.rule.megatron if name in parameters)
            base = model.get_submodule(name.removesuffix(".weight"))
            Adapter(base, adapted, lora, model.config, state)
    for model in models:
        if model.pre_process:
            model.embedding.register_forward_hook(_want_grad)


def _want_grad(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook: recomputed layers get gradients only if an input of theirs wants one."""
    return output.requires_grad_()


def adapters(models: Sequence[Any]) -> Iterator[Adapter]:
    """All adapters of this rank's chunks, in the order in which Megatron made the linears."""
    for model in models:
        yield from (module for module in model.modules() if isinstance(module, Adapter))


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter, not to the base."""
    return f".{_CHILD}." in name


def merged_weight(parameter: Tensor) -> Tensor:
    """A base parameter as inputs meet it: W + alpha / rank * B A in float32 if it has an adapter.

    The parameter itself is never changed; without an adapter the result shares its memory.
    """
    own: Adapter | None = getattr(parameter, "adapter", None)
    if own is None:
        return parameter.detach()
    return merge(parameter.detach(), own.A, own.B, own.owner, own.settings.scale)


@contextmanager
def switched_off(models: Sequence[Any]) -> Iterator[None]:
    """The model is its base inside the block. Local: ranks that share a pass must do the same."""
    mine = list(adapters(models))
    for adapter in mine:
        adapter.is_active = False
    try:
        yield
    finally:
        for adapter in mine:
            adapter.is_active = True


def settings_of(model: Any) -> dict[str, Any]:
    """What a checkpoint must agree with; nothing without adapters."""
    found = next(adapters([model]), None)
    if found is None:
        return {}
    lora = found.settings
    return {"lora": {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.layers)}}


def describe_shards(model: Any, sharded: dict[str, Any]) -> dict[str, Any]:
    """`model.sharded_state_dict()` with the split parameters of adapters described as split.

    Megatron's linears describe every parameter but their own as equal on all tensor-parallel ranks.
    """
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            key, dim = (f"{name}.A", 1) if module.is_row else (f"{name}.B", 0)
            sharded[key] = _split(sharded[key], dim, module)
    return sharded


def _split(whole: ShardedTensor, dim: int, adapter: Adapter) -> Any:
    """`whole` as this tensor-parallel rank's part along `dim`."""
    # Axes before the tensor's own tell layers apart and have size 1 locally.
    outer = [
        (axis, whole.global_offset[axis], whole.axis_fragmentations[axis])  # type: ignore[index]
        for axis in range(whole.prepend_axis_num)
    ]
    assert isinstance(whole.replica_id, tuple)
    part = ShardedTensor.from_rank_offsets(
        whole.key,
        whole.data,  # type: ignore[arg-type]
        *outer,
        (dim + len(outer), adapter.state.tp_rank, adapter.state.tp_size),
        replica_id=(0, 0, whole.replica_id[-1]),
        prepend_axis_num=len(outer),
    )
    is_gated = adapter.adapted.rule.sharding is Sharding.GATED
    return apply_swiglu_sharded_factory(part, outer) if is_gated else part
