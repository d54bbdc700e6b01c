"""The plan for people: one screen."""

from __future__ import annotations

from megatron_matpo.planning.command import RunPlan, trainer_gpus
from megatron_matpo.planning.layouts import Proposal
from megatron_matpo.planning.ledger import Ledger
from megatron_matpo.planning.parameters import total_parameters
from megatron_matpo.planning.pipeline import bubble_frac
from megatron_matpo.planning.shape import Layout

_KINDS = (
    ("weights", "weights"),
    ("gradients (fp32)", "gradients"),
    ("optimizer", "optimizer"),
    ("activations", "activations"),
    ("output layer, log-probs", "head"),
    ("weight push (no activations then)", "weight_sync"),
    ("reserve (assumed)", "reserve"),
)


def as_text(plan: RunPlan) -> str:
    """The lines to print."""
    lines = [*_head(plan), "", *_trainer(plan), "", *_engine(plan)]
    lines += ["", *(f"DOES NOT FIT  {problem}" for problem in plan.problems)]
    if not plan.problems and plan.gpu:
        lines.append("fits")
    if plan.proposals:
        lines += ["", *_proposals(plan)]
    elif plan.gpu and plan.own:
        lines += [
            "",
            f"no layout of {trainer_gpus(plan.config)} GPUs fits; use more or larger ones",
        ]
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


def _head(plan: RunPlan) -> list[str]:
    config = plan.config
    cluster = config.cluster
    gpu = plan.gpu
    where = (
        f"{cluster.num_nodes} x {cluster.gpus_per_node} {gpu.name}, {gpu.memory_gib:.1f} GiB each"
        if gpu
        else "CPU"
        if cluster.device == "cpu"
        else f"{cluster.num_nodes} x {cluster.gpus_per_node} unknown GPUs (name them: cluster.gpu)"
    )
    fp8 = f" with fp8 ({plan.precision.fp8_recipe}) products" if plan.precision.fp8_recipe else ""
    return [
        f"model      {config.model.path}: {_count(total_parameters(plan.job))} parameters",
        f"cluster    {where}",
        f"precision  {plan.precision.parameters}{fp8}: {plan.precision.reason}",
        *([f"assumed    {plan.workload.assumption}"] if plan.own else []),
    ]


def _trainer(plan: RunPlan) -> list[str]:
    if plan.own is None:
        return ["trainer    none: questions in eval.sets and none in data.train, so an evaluation"]
    worst, count = plan.worst, plan.own.num_micro_batches
    bubble = bubble_frac(plan.job.layout, count)
    lines = [
        f"trainer    {plan.job.layout.world_size} ranks: {_describe(plan.job.layout)}",
        f"           {count} micro-batches of at most {plan.job.micro_batch_tokens} tokens per "
        f"update and rank; pipeline bubble {100 * bubble:.0f} %",
        f"           {_unit(worst.total)} per rank, pipeline stage {worst.stage} (the worst of "
        f"{len(plan.stages)}):",
    ]
    unit = _unit(worst.total)
    for name, key in [*_KINDS, ("peak", "total")]:
        lines.append(f"             {name:<34}{_in(_bytes(worst, key), unit):>7}")
    if plan.own.host:
        per_node = plan.own.host * max(1, plan.config.cluster.gpus_per_node)
        lines.append(f"             {'host memory, per node':<34}{_gib(per_node):>7}")
    return lines


def _engine(plan: RunPlan) -> list[str]:
    rollout, engine = plan.config.rollout, plan.engine
    if engine is None:
        return []
    return [
        f"engines    {rollout.num_servers} x {rollout.tensor} GPUs; GiB per GPU:",
        f"             {'weights':<34}{_gib(engine.weights):>7}",
        f"             {'KV cache':<34}{_gib(engine.kv_cache):>7}",
        *(
            [f"             {'weight-sync bucket':<34}{_gib(engine.sync_buckets):>7}"]
            if plan.own
            else []
        ),
        f"           KV cache of an engine: {engine.kv_tokens} tokens, "
        f"{engine.full_trajectories:.1f} trajectories of {rollout.context_length}",
        *_shared(plan),
    ]


def _shared(plan: RunPlan) -> list[str]:
    """Trainer and engine on one GPU; nothing if they are on GPUs of their own."""
    if not plan.phases:
        return []
    rows = [
        f"             {phase.name:<34}{_gib(phase.trainer):>7} +{_gib(phase.engine):>6} ="
        f"{_gib(phase.total):>6}"
        for phase in plan.phases
    ]
    return ["", "colocated  GiB of one GPU in each phase of a step, trainer + engine:", *rows]


def _proposals(plan: RunPlan) -> list[str]:
    lines = [
        f"layouts of {trainer_gpus(plan.config)} GPUs that fit, best first (estimated time of an "
        "update to 5 %, then no offload,",
        "smallest tensor, context and pipeline, least recomputation; tensor inside a node):",
        f"  {'':<4}{'layout':<64}{'GiB':>6}{'micro-batches':>15}",
    ]
    for rank, item in enumerate(plan.proposals, start=1):
        lines.append(
            f"  {rank:<4}{_describe(item.layout):<64}{_gib(item.peak):>6}"
            f"{item.num_micro_batches:>15}"
        )
    best: Proposal = plan.proposals[0]
    return [*lines, f"  the first as overrides: {overrides_of(best.layout)}"]


def overrides_of(layout: Layout) -> str:
    """The layout as `matpo` takes it on the command line."""
    words = [
        f"parallel.tensor={layout.tensor}",
        f"parallel.pipeline={layout.pipeline}",
        f"parallel.context={layout.context}",
        f"parallel.data={layout.data}",
        *([f"parallel.expert={layout.expert}"] if layout.expert > 1 else []),
        f"parallel.sequence={str(layout.sequence).lower()}",
        f"train.recompute={layout.recompute}",
        f"optim.offload={str(layout.offload).lower()}",
    ]
    return " ".join(words)


def _describe(layout: Layout) -> str:
    words = [
        f"TP {layout.tensor}",
        f"PP {layout.pipeline}",
        f"CP {layout.context}",
        f"DP {layout.data}",
    ]
    if layout.expert > 1:
        words.append(f"EP {layout.expert}")
    if layout.virtual > 1:
        words.append(f"virtual {layout.virtual}")
    if layout.sequence:
        words.append("sequence")
    words.append(f"recompute {layout.recompute}")
    if layout.offload:
        words.append("offload")
    return ", ".join(words)


def _bytes(ledger: Ledger, key: str) -> int:
    return {
        "weights": ledger.weights,
        "gradients": ledger.gradients,
        "optimizer": ledger.optimizer,
        "activations": ledger.activations,
        "head": ledger.head,
        "weight_sync": ledger.weight_sync,
        "reserve": ledger.reserve,
        "total": ledger.total,
    }[key]


def _unit(largest: int) -> str:
    return "GiB" if largest >= 2**30 else "MiB"


def _in(num_bytes: int, unit: str) -> str:
    return f"{num_bytes / (2**30 if unit == 'GiB' else 2**20):.1f}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.2f} million"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"
