"""`RUN/rollouts/step_N.jsonl`: a step's trajectories for people, one JSON object per line.

Fields `input, ground_truth, output, score, step, tool_format_reward, accuracy_reward,
combined_reward` are those of MATPO's dumps, so that tools for them read ours. Differs: rewards are
unweighted parts (theirs are multiplied by their weights), and ids, role and parent are fields
instead of the order of lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_matpo.obs.files import write_atomic
from megatron_matpo.types import Episode, Group, RolloutBatch, Trajectory, TurnKind


def write_rollouts_jsonl(
    path: str | Path, batch: RolloutBatch, advantages: Mapping[str, float]
) -> None:
    """Write all trajectories of `batch`, each planner followed by its workers.

    `advantages` maps episode id to the scalar that was trained; episodes without one get null.
    """
    lines = (
        json.dumps(record, ensure_ascii=False)
        for group in batch.groups
        for episode in group.episodes
        for record in _records(batch.step, group, episode, advantages.get(episode.id))
    )
    # surrogatepass would write broken UTF-8; a lone surrogate from a tokenizer becomes "?".
    text = "".join(line + "\n" for line in lines)
    write_atomic(Path(path), text.encode("utf-8", "replace"))


def _records(
    step: int, group: Group, episode: Episode, advantage: float | None
) -> Iterator[dict[str, Any]]:
    for trajectory in episode.trajectories:
        yield _record(step, group, episode, trajectory, advantage)


def _record(
    step: int, group: Group, episode: Episode, item: Trajectory, advantage: float | None
) -> dict[str, Any]:
    reward = episode.reward
    total = None if reward is None else reward.total
    prompt = [turn.text for turn in item.turns if turn.kind is TurnKind.PROMPT]
    reply = [turn.text for turn in item.turns if turn.kind is not TurnKind.PROMPT]
    return {
        "input": "".join(prompt),
        "ground_truth": group.ground_truth,
        "output": "".join(reply),
        "score": total,
        "step": step,
        "tool_format_reward": item.format_score,
        "accuracy_reward": None if reward is None else reward.accuracy,
        "combined_reward": total,
        "uid": group.uid,
        "data_source": group.data_source,
        "question": group.question,
        "row_index": group.row_index,
        "level": group.level,
        "question_type": group.question_type,
        "episode_id": episode.id,
        "sample_index": episode.sample_index,
        "answer": episode.answer,
        "verdict": "" if reward is None else reward.verdict,
        "failure": episode.failure,
        "start_s": round(episode.start_s, 3),
        "duration_s": round(episode.duration_s, 3),
        "score_s": round(episode.score_s, 3),
        "trajectory_id": item.id,
        "role": item.role,
        "agent": item.agent,
        "parent_id": item.parent_id,
        "spawn_turn": item.spawn_turn,
        "subtask": item.subtask,
        "status": item.status,
        "error": item.error,
        "advantage": advantage,
        "policy_versions": sorted({span.version for turn in item.turns for span in turn.versions}),
        "calls": [
            {
                "turn_index": call.turn_index,
                "server": call.server,
                "tool": call.tool,
                "outcome": call.outcome,
                "worker_id": call.worker_id,
                "duration_s": round(call.duration_s, 3),
            }
            for call in item.calls
        ],
        "turns": [
            {"kind": turn.kind, "text": turn.text, "num_tokens": len(turn.token_ids)}
            for turn in item.turns
        ],
    }
