"""What NeMo-Run runs for a recipe: the one command that every node runs, as a `run.Script`.

The task's side alone. Where it runs is an executor's business: `matpo launch` makes executors from
a cluster file, `recipes/nemo.py` takes NeMo-Run's own. A script needs nothing but `matpo` where it
runs; a `run.Partial` would need NeMo-Run there, too.
"""

# No `from __future__ import annotations`: NeMo-Run's command line reads types as objects,
# and knows `Optional` but not `int | None`.
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_matpo.config import Config, load_recipe
from megatron_matpo.errors import ConfigError

if TYPE_CHECKING:
    from nemo_run import Script


@dataclass(kw_only=True)
class RecipeJob:
    """A recipe and what one run changes in it; not frozen, because NeMo-Run sets fields."""

    recipe: str
    """YAML file, relative to `folder`."""
    model: str = ""
    """Folder with weights; empty: the recipe's `model.path`. Evaluations need one."""
    name: str = ""
    """`run.name`; empty: the recipe's, for evaluations `matpo eval`'s choice."""
    data_folder: str = ""
    """`data.folder`; empty: the recipe's."""
    steps: int = 0
    """`run.steps`; 0: the recipe's."""
    num_nodes: int = 0
    """`cluster.num_nodes`; 0: the recipe's."""
    overrides: list[str] = field(default_factory=list[str])
    """Further `dotted.key=value`; they win over the fields above."""
    folder: str = ""
    """The repository where the job runs; empty: here."""
    python: str = ".venv/bin/python"
    """Of the environment with `matpo`, relative to `folder`."""

    @property
    def settings(self) -> list[str]:
        """All overrides, in the order in which they count."""
        values: list[tuple[str, str | int]] = [
            ("run.name", self.name),
            ("data.folder", self.data_folder),
            ("run.steps", self.steps),
            ("cluster.num_nodes", self.num_nodes),
            ("model.path", self.model),
        ]
        found = [f"{key}={value}" for key, value in values if value]
        return [*found, *self.overrides]


def job_config(job: RecipeJob) -> Config:
    """The job's configuration, for what an executor must know of it (`cluster`).

    Raises:
        ConfigError: the recipe or an override is wrong; one line for every violation.
    """
    return load_recipe(os.path.join(job.folder, job.recipe), job.settings)


def job_task(job: RecipeJob) -> "Script":
    """`matpo train`, `matpo sft` or `matpo eval`, as the recipe has questions for.

    Raises:
        ConfigError: the recipe or an override is wrong, or an evaluation has no `model`. A folder
            on another machine is not looked at, and its recipe is for training.
    """
    if job.folder and not os.path.isdir(job.folder):
        return _script(job, ["train", job.recipe, *job.settings])
    config = job_config(job)
    if config.is_evaluation:
        if not job.model:
            raise ConfigError(f"{job.recipe}: is an evaluation, which needs `model`: a folder")
        settings = [item for item in job.settings if not item.startswith("model.path=")]
        return _script(job, ["eval", job.recipe, "--model", job.model, *settings])
    return _script(job, [config.command, job.recipe, *job.settings])


def train_task(recipe: str, overrides: Sequence[str] = (), *, folder: str = "") -> "Script":
    """`matpo train RECIPE key=value ...` from the top of the repository at `folder`, or here.

    Raises:
        ConfigError: as `job_task`.
    """
    return job_task(RecipeJob(recipe=recipe, overrides=list(overrides), folder=folder))


def executor_shape(job: RecipeJob) -> dict[str, int]:
    """What a `run.SlurmExecutor` must be told of the job: one task per node, and all of its GPUs.

    Raises:
        ConfigError: the recipe or an override is wrong.
    """
    cluster = job_config(job).cluster
    shape = {"nodes": cluster.num_nodes, "ntasks_per_node": 1}
    return {**shape, "gpus_per_node": cluster.gpus_per_node} if cluster.gpus_per_node else shape


def _script(job: RecipeJob, words: list[str]) -> "Script":
    """Inline, because NeMo-Run's executors start in a folder of their own."""
    import nemo_run

    folder = job.folder or os.getcwd()
    command = shlex.join([job.python, "-m", "megatron_matpo", *words])
    return nemo_run.Script(inline=f"cd {shlex.quote(folder)} || exit 2\nexec {command}\n")
