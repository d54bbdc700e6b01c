"""Sections `run`, `cluster`, `checkpoint` and `obs`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunConfig:
    """Identity and length of the run."""

    name: str = "default"
    """Folder name under `run.dir`; the same name resumes."""
    dir: str = "runs"
    seed: int = 1
    """Seeds data order, sampling and initialisation."""
    steps: int = 100
    """Training steps (one rollout batch each)."""
    stop_grace_s: float = 10.0
    """How long a role may take to stop on SIGTERM before it is killed."""
    start_timeout_s: float = 300.0
    """How long all roles together may take to become ready; also how long nodes wait for each other
    before anything starts."""
    save_on_stop: bool = False
    """SIGTERM saves a checkpoint before it stops the run, as SIGUSR1 always does; the command then
    ends with exit code 75. For schedulers that announce preemption and time limits."""
    save_timeout_s: float = 900.0
    """How long the trainer may take, once asked, to finish its update, save and end."""


@dataclass(frozen=True)
class ClusterConfig:
    """The machines. One node without GPUs is a laptop or CI."""

    num_nodes: int = 1
    gpus_per_node: int = 0
    """0 means the CPU platform (gloo, fp32, small models)."""
    host: str = "127.0.0.1"
    """Address that this node's servers bind to, on one node; `interface` goes before it."""
    interface: str = ""
    """Network interface whose IPv4 address servers bind to, as `ib0`, and that NCCL and gloo use
    for their own meetings. Empty with several nodes: the one of the default route."""
    trainer_nodes: int = 0
    """Nodes that train, the first ones; 0: as many as the ranks need (without GPUs: one)."""
    placement: str = "disaggregated"
    """`disaggregated`: trainer and engines on GPUs of their own; `colocated`: on the same ones, in
    turns (docs/colocated.md)."""
    node_timeout_s: float = 120.0
    """How long a node may be silent before the others stop the run."""
    gpu: str = ""
    """Model of the GPUs, as `config/gpus.py` names it; empty asks the driver."""
    base_port: int = 0
    """First of the run's consecutive ports; 0 picks free ports."""

    @property
    def device(self) -> str:
        """`cuda` or `cpu`."""
        return "cuda" if self.gpus_per_node > 0 else "cpu"


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and how much to keep."""

    every: int = 20
    """Steps between checkpoints; 0 saves only at the end."""
    keep_last: int = 2
    """Older checkpoints are deleted after a newer one is complete."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are never deleted, nor counted in `keep_last`;
    0: no such steps."""
    asynchronous: bool = True
    """Write files while the training goes on, from a copy in host memory. Costs little more than
    writing at once, which collects the optimizer's state in host memory too (see
    docs/checkpoints.md)."""
    timeout_s: float = 1800.0
    """Deadline of every wait for a checkpoint: for the files of the one before, and at the end."""
    on_failure: str = "stop"
    """`stop | warn`: what a checkpoint that cannot be written does to the run."""
    verify: str = "full"
    """`full | sizes`: before resuming, compare checksums of all files (each rank reads a share), or
    only their sizes."""
    load: str = "latest"
    """What to resume from: `latest`; `whole`: the newest that is not damaged; or `step_N`, also if
    newer ones exist (every start with this setting goes back there)."""
    export_hf: bool = True
    """Write `checkpoints/hf` (Hugging Face format) when the run ends."""


@dataclass(frozen=True)
class ObsConfig:
    """What is recorded."""

    record_rollouts: bool = True
    """Write `rollouts/step_N.jsonl` (for people) and `rollouts/step_N.rollout` (for replay)."""
    report_every: int = 10
    """Steps between rewrites of `report.html`; it is also written when the run ends."""
    trace_every: int = 10
    """Record the spans of the first step and of each Nth (`RUN/trace`, docs/tracing.md); 1: all
    steps, 0: none."""
    wandb_mode: str = "auto"
    """`auto | online | offline | disabled`; auto is online with WANDB_API_KEY, else offline."""
    wandb_project: str = "megatron_matpo"
