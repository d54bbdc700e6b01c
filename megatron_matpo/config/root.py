"""The whole configuration of a run. Sections live in one file each; defaults only on the fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.algo import AlgoConfig
from megatron_matpo.config.data import DataConfig
from megatron_matpo.config.doctor import DoctorConfig
from megatron_matpo.config.evaluation import EvalConfig
from megatron_matpo.config.fp8 import Fp8Config
from megatron_matpo.config.lora import LoraConfig
from megatron_matpo.config.reward import RewardConfig
from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.config.run import CheckpointConfig, ClusterConfig, ObsConfig, RunConfig
from megatron_matpo.config.tools import ToolsConfig
from megatron_matpo.config.train import (
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    SftConfig,
    TrainConfig,
    WeightSyncConfig,
)


@dataclass(frozen=True)
class Config:
    """A resolved run: what `runs/NAME/config.yaml` holds and every process reads."""

    run: RunConfig = field(default_factory=RunConfig)
    compat: str = "corrected"
    """`corrected | reference`: `reference` reproduces what the original MATPO code does for worker
    advantages (C1), updates per step (C6) and the format reward (C10); see docs/algorithm.md."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: str = "auto"
    """`auto | fp32 | bf16 | fp8`; auto is fp32 on CPU, and on GPU fp8 where the device has it and
    bf16 where not (docs/precision.md)."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    agents: dict[str, AgentConfig] = field(default_factory=dict[str, AgentConfig])
    """Agents by name; `rollout.planner` names the one that answers the question."""
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    obs: ObsConfig = field(default_factory=ObsConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    doctor: DoctorConfig = field(default_factory=DoctorConfig)

    @property
    def run_dir(self) -> str:
        """Folder of the run: `RUN.DIR/RUN.NAME`."""
        return f"{self.run.dir}/{self.run.name}"

    @property
    def transport(self) -> str:
        """`weight_sync.transport` with `auto` decided."""
        if self.weight_sync.transport != "auto":
            return self.weight_sync.transport
        return "ipc" if self.cluster.placement == "colocated" else "broadcast"

    @property
    def command(self) -> Literal["train", "sft", "eval"]:
        """What the recipe has data for: `train`, `sft` or `eval`."""
        return "eval" if self.is_evaluation else "sft" if self.sft.data else "train"

    @property
    def is_evaluation(self) -> bool:
        """The recipe has questions to evaluate and none to train on: it is for `matpo eval`."""
        has_training = self.data.train or self.rollout.replay or self.sft.data
        return bool(self.eval.sets) and not has_training
