"""The simulation for people: one screen."""

from __future__ import annotations

from megatron_matpo.simulation.command import Simulation
from megatron_matpo.simulation.placements import Outcome

_COLUMNS = (
    ("step s", "step_s"),
    ("rollout", "rollout_s"),
    ("score", "score_s"),
    ("train", "train_s"),
    ("push", "sync_s"),
    ("save", "checkpoint_s"),
    ("switch", "switch_s"),
    ("other", "other_s"),
)


def as_text(simulation: Simulation) -> str:
    """The lines to print."""
    lines = [*_head(simulation), "", *_table(simulation)]
    for outcome in simulation.outcomes:
        if outcome.rollout:
            lines += ["", *_rollout(outcome)]
    if simulation.warnings:
        lines += ["", *(f"note       {warning}" for warning in simulation.warnings)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _head(simulation: Simulation) -> list[str]:
    config, engine = simulation.config, simulation.engine
    cluster = config.cluster
    where = (
        f"{cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu or 'GPUs'}"
        if cluster.device == "cuda"
        else "CPU"
    )
    running = min(config.rollout.max_running_requests, 32)
    context = running * round(simulation.mean_tokens / 2)
    full = running / engine.step_s(running, context)
    alone = 1 / engine.step_s(1, simulation.mean_tokens / 2)
    error = simulation.fit_error
    return [
        f"recipe     {simulation.request.recipe}: {config.model.path} on {where}",
        f"rates      {simulation.rates.source}"
        + (f"; typical error of the fit {100 * error:.0f} %" if error is not None else ""),
        f"engine     {alone:.0f} tokens/s alone, {full:.0f} with {running} sequences; cache of "
        f"{simulation.kv_tokens} tokens",
        f"episodes   {simulation.lengths_source}",
        f"step       {simulation.num_episodes} episodes; each {simulation.mean_agents:.1f} "
        f"contexts of {simulation.mean_tokens:.0f} tokens, {simulation.mean_turns:.1f} "
        f"generations, {simulation.mean_sampled:.0f} sampled tokens",
        f"training   updates per step: {simulation.num_updates}; micro-batches per update "
        f"and rank: {simulation.micro_batches}; pipeline bubble "
        f"{100 * simulation.bubble_frac:.0f} %",
    ]


def _table(simulation: Simulation) -> list[str]:
    """One row per placement, the recipe's own marked."""
    head = "".join(f"{name:>9}" for name, _ in _COLUMNS)
    lines = [
        f"{'':<16}{head}{'engines':>9}{'trainer':>9}{'tools':>7}{'tokens/s':>10}",
        f"{'':<16}{'':<{9 * len(_COLUMNS)}}{'busy':>9}{'busy':>9}{'busy':>7}{'/device':>10}",
    ]
    for index, outcome in enumerate(simulation.outcomes):
        values = "".join(f"{_seconds(getattr(outcome, key)):>9}" for _, key in _COLUMNS)
        mark = "* " if index == 0 else "  "
        lines.append(
            f"{mark}{outcome.placement:<14}{values}{100 * outcome.engines_busy:>8.0f}%"
            f"{100 * outcome.trainer_busy:>8.0f}%{100 * outcome.tools_busy:>6.0f}%"
            f"{outcome.tokens_per_s_device:>10.1f}"
        )
    return [
        *lines,
        "* the recipe's own; asynchronous: rollout.max_staleness="
        f"{simulation.staleness}, rollout is the wait for episodes",
    ]


def _rollout(outcome: Outcome) -> list[str]:
    """Where the engines' time goes."""
    times, total = outcome.rollout, outcome.rollout_s
    assert times is not None
    rows = (
        ("decode", times.decode_s, f"{times.mean_running:.1f} sequences on average, at most "
         f"{times.max_running}"),
        ("prefill", times.prefill_s, ""),
        ("waiting", times.wait_s, "for tools, and for workers on other engines; a call waits "
         f"{times.tool_queue_s:.2f} s for a free place"),
        ("tail", times.tail_s, f"an engine has nothing left to do; the last tenth of the episodes "
         f"takes {100 * times.last_tenth_s / total:.0f} % of the rollout"),
    )  # fmt: skip
    return [
        f"{outcome.placement}: rollout of {_seconds(total)} s on {outcome.num_engines} engines "
        f"(episodes take {_seconds(times.episode_s_mean)} s, at most "
        f"{_seconds(times.episode_s_max)})",
        *(
            f"  {name:<10}{_seconds(seconds):>9} s {100 * seconds / total:>5.0f} %  {what}"
            for name, seconds, what in rows
        ),
    ]


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"
