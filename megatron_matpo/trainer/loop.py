"""The training loop, on one screen.

    collect -> score -> learn -> push weights -> evaluate? -> log -> checkpoint?

`run.placement` hands devices over that trainer and engines share (`trainer/placement.py`).

| phase   | produces                     | waits for                  | released by               |
|---------|------------------------------|----------------------------|---------------------------|
| collect | episodes of policy v         | engines serving v          | manager, or the recording |
| score   | old and reference log-probs  | the step's episodes        | every rank's forward pass |
| learn   | policy v + 1                 | the step's episodes        | the optimizer             |
| sync    | engines serving v + 1        | policy v + 1               | every engine's answer     |
"""

from __future__ import annotations

from megatron_matpo.trainer.credit import step_advantages, step_samples
from megatron_matpo.trainer.run import Run
from megatron_matpo.trainer.stopping import StopRequested


def train(run: Run) -> None:
    """Train from the run's last checkpoint (or the start) to `run.steps`. All ranks call.

    A request to end early is met before a step trains: what came before is saved.

    Raises:
        RolloutError, DeadlineError: the step's episodes did not come.
        NonFiniteError: before the optimizer moved; the last checkpoint is whole.
        WeightSyncError: the engines did not take the weights.
        HandoverError: memory that engines and trainer share did not become free.
    """
    config = run.config
    progress = run.resume()
    run.connect()
    run.placement.to_rollout()
    with run.clock.phase("sync"):
        served = run.sync.push(progress.policy_version)
    run.evaluate_start(progress, served)
    try:
        while progress.step < config.run.steps:
            step = progress.step + 1
            with run.clock.step(step):
                with run.clock.phase("rollout"):
                    batch = run.rollouts.collect(step, served, position=progress.data_position)
                advantages = step_advantages(config, batch.groups)
                samples = step_samples(config, batch, advantages)
                run.placement.to_train()
                with run.clock.phase("score"):
                    updates = run.learner.prepare(samples)
                with run.clock.phase("train"):
                    result = run.learner.learn(updates, progress.num_updates, progress.step)
                progress = progress.after(result.num_updates, batch.next_position)
                run.placement.to_rollout()
                with run.clock.phase("sync"):
                    served = run.sync.push(progress.policy_version)
            evaluation = run.evaluate(step, served)
            run.record(step, batch, samples, advantages, result, evaluation)
            run.save(progress)
    except StopRequested:
        run.stop_early(progress)
    else:
        run.finish()
