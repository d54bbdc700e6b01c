"""The recipes for users of NeMo-Run: one factory for each, and an entry point on the command line.

From the top of the repository, with any executor that NeMo-Run knows:

    python recipes/nemo.py --dryrun --yes run.executor=local \
        job=matpo_qwen3_4b_1n8g_a800 job.model=/models/Qwen3-4B job.steps=100

In a program:

    import nemo_run as run
    from recipes.nemo import RecipeJob, executor_shape, job_task, recipe_job

    job = recipe_job("matpo_qwen3_14b_16n8g_a800")
    job.model = "/models/Qwen3-14B"
    executor = run.SlurmExecutor(account="me", partition="gpu", **executor_shape(job))
    run.run(job_task(job), executor=executor)

`matpo launch` does more of it for you: a cluster file, requeueing, restarts, logs by role.
"""

# No `from __future__ import annotations`: NeMo-Run's command line reads types as objects.
from collections.abc import Callable
from pathlib import Path

import nemo_run as run

from megatron_matpo.launch.nemo_tasks import RecipeJob, executor_shape, job_task, train_task

__all__ = [
    "RECIPES",
    "RecipeJob",
    "executor_shape",
    "job_task",
    "recipe_job",
    "train",
    "train_task",
]

RECIPES: dict[str, str] = {
    path.stem.replace("-", "_"): f"recipes/{path.name}"
    for path in sorted(Path(__file__).parent.glob("*.yaml"))
}
"""Name of a factory -> recipe. NeMo-Run's names have no dashes."""


def recipe_job(name: str) -> RecipeJob:
    """A recipe by the name of its factory, unchanged."""
    return RecipeJob(recipe=RECIPES[name])


def train(ctx: run.cli.RunContext, job: run.Config[RecipeJob]) -> None:
    """Run a recipe: training, or for recipes without training data an evaluation.

    Args:
        ctx: executor and options of NeMo-Run's command line.
        job: a recipe by name (`job=matpo_qwen3_4b_1n8g_a800`) or file (`job.recipe=...`), and what
            to change in it (`job.model=`, `job.steps=`, `job.overrides=[key=value]`).
    """
    assert isinstance(job, RecipeJob)
    task = job_task(job)
    with run.Experiment(Path(job.recipe).stem) as experiment:
        experiment.add(task, executor=ctx.executor or run.LocalExecutor(), name="matpo")
        ctx.launch(experiment)


def _factory(recipe: str) -> Callable[[], run.Config[RecipeJob]]:
    def make() -> run.Config[RecipeJob]:
        return run.Config(RecipeJob, recipe=recipe)

    return make


def local() -> run.Config[run.LocalExecutor]:
    """This machine."""
    return run.Config(run.LocalExecutor)


run.cli.factory(local, target=run.cli.RunContext, target_arg="executor", name="local")
run.cli.entrypoint(train, name="train", namespace="matpo", type="experiment")
for _name, _recipe in RECIPES.items():
    run.cli.factory(_factory(_recipe), target=train, target_arg="job", name=_name)

if __name__ == "__main__":
    run.cli.main(train)
