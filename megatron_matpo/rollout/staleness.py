"""How old the tokens of a step are: pure functions.

The age of a token is how many versions lie between the weights that sampled it and those that the
step trains from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from megatron_matpo.types import Episode, Group, PolicyVersion, Turn, VersionSpan


def oldest_version(episode: Episode) -> PolicyVersion | None:
    """Version of the oldest token that would be trained; None without such tokens."""
    if episode.reward is None:
        return None
    return min((span.version for span in _spans([episode])), default=None)


def staleness_metrics(groups: Sequence[Group], version: PolicyVersion) -> dict[str, float]:
    """`rollout/staleness_*` of a step that trains from `version`, over the tokens that it trains.

    Also how many of their generations went on under new weights.
    """
    episodes = [item for group in groups for item in group.episodes if item.reward is not None]
    ages: Counter[int] = Counter()
    for span in _spans(episodes):
        ages[version - span.version] += span.num_tokens
    total = ages.total()
    values = {
        "rollout/staleness_mean": sum(age * n for age, n in ages.items()) / total if total else 0.0,
        "rollout/staleness_max": float(max(ages, default=0)),
        "rollout/continued_generations": float(
            sum(len({span.version for span in turn.versions}) > 1 for turn in _turns(episodes))
        ),
    }
    shares = {f"rollout/staleness_share/{age}": ages[age] / total for age in sorted(ages)}
    return values | shares


def _turns(episodes: Iterable[Episode]) -> Iterator[Turn]:
    for episode in episodes:
        for trajectory in episode.trajectories:
            yield from trajectory.turns


def _spans(episodes: Iterable[Episode]) -> Iterator[VersionSpan]:
    for turn in _turns(episodes):
        yield from turn.versions
