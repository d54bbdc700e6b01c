"""What a step trains, from the episode trees to the gradient of every token, is the formula.

Random trees go through the real path (advantages, samples, updates, loss weights, packing for
several budgets and numbers of data-parallel ranks, micro-batches, loss) with a policy that is a
table of log-probs. Losses, gradients, masks and metrics are those of a float64 formula written here
in plain Python from the trees alone, for all aggregations, baselines, importance weights, KL
estimators and both values of `compat`.

Not proved here: the forward pass, sharding, and reductions between processes (tests/dist).
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from megatron_matpo.config import Config
from megatron_matpo.config.algo import AlgoConfig
from megatron_matpo.config.train import TrainConfig
from megatron_matpo.errors import RolloutError
from megatron_matpo.trainer.credit import step_advantages, step_samples
from megatron_matpo.types import Role, TurnKind
from tests.helpers.trees import Tables, batches, learn

# The same examples every time; raise the number to search for more.
SETTINGS = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def configs(draw):
    compat = draw(st.sampled_from(["corrected", "corrected", "reference"]))
    is_free = compat == "corrected"
    old_logprobs = draw(st.sampled_from(["trainer", "engine"]))
    modes = ["off", "truncate", "mask"] if old_logprobs == "trainer" else ["off"]
    algo = AlgoConfig(
        normalize_std=draw(st.booleans()),
        baseline=draw(st.sampled_from(["group_mean", "leave_one_out"]))
        if is_free
        else "group_mean",
        aggregation=draw(st.sampled_from(["token", "trajectory", "episode"]))
        if is_free
        else "token",
        advantage_scale=draw(st.sampled_from([1.0, 0.5])),
        updates_per_step=draw(st.integers(1, 3)),
        clip_high=draw(st.sampled_from([0.2, 0.28])),
        dual_clip=draw(st.sampled_from([0.0, 3.0])),
        kl_coef=draw(st.sampled_from([0.0, 0.1])),
        kl_estimator=draw(st.sampled_from(["k1", "k2", "k3"])),
        tis=draw(st.sampled_from(modes)),
        tis_cap=draw(st.sampled_from([1.5, 3.0])),
        old_logprobs=old_logprobs,
    )
    budget = draw(st.sampled_from([1, 12, 40, 1000]))
    return Config(compat=compat, algo=algo, train=TrainConfig(micro_batch_tokens=budget))


@dataclass
class Token:
    """A trained token: where it is, and everything that the formula says about it."""

    trajectory: str
    position: int
    """In the labels: the token's index minus one."""
    role: Role
    episode: str
    advantage: float
    new: float
    old: float
    rollout: float
    initial: float
    weight: float = 0.0


def advantages_of(group, algo):
    """By episode id: a group's rewards minus their mean (of the others), over their deviation."""
    rewards = {e.id: e.reward.total for e in group.episodes if e.reward is not None}
    n = len(rewards)
    if len(set(rewards.values())) < 2:
        return dict.fromkeys(rewards, 0.0)
    mean = sum(rewards.values()) / n
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards.values()) / (n - 1))
    result = {}
    for key, reward in rewards.items():
        others = [r for other, r in rewards.items() if other != key]
        base = mean if algo.baseline == "group_mean" else sum(others) / len(others)
        scale = std + 1e-6 if algo.normalize_std else 1.0
        result[key] = algo.advantage_scale * (reward - base) / scale
    return result


def tokens_of(trajectory, episode, advantage, tables, compat):
    """Trained tokens of a trajectory; under `reference`, C1 takes workers' advantages away."""
    prompt = len(trajectory.turns[0].token_ids)
    parent = [t.kind is TurnKind.MODEL for t in episode.planner.turns[1:] for _ in t.token_ids]
    result, index = [], 0
    for turn in trajectory.turns:
        for offset in range(len(turn.token_ids)):
            response = index - prompt
            has_it = compat == "corrected" or trajectory.role is Role.PLANNER
            has_it = has_it or (0 <= response < len(parent) and parent[response])
            if turn.kind is TurnKind.MODEL:
                t = index - 1
                result.append(
                    Token(
                        *(trajectory.id, t, trajectory.role, episode.id, advantage * has_it),
                        new=float(tables.new[trajectory.id].detach()[t]),
                        old=float(tables.old[trajectory.id][t]),
                        rollout=turn.logprobs[offset],
                        initial=float(tables.initial[trajectory.id][t]),
                    )
                )
            index += 1
    return result


def updates_of(batch, advantages, tables, config):
    """[updates][tokens], each with the weight with which its value enters the update's loss."""
    trees = []
    for episode in (e for g in batch.groups for e in g.episodes if e.reward is not None):
        tree = [
            tokens_of(t, episode, advantages[episode.id], tables, config.compat)
            for t in episode.trajectories
        ]
        trees.append([tokens for tokens in tree if tokens])
    trees = [tree for tree in trees if tree]
    n = config.algo.updates_per_step
    if config.compat == "reference":
        planners = [x for tree in trees for x in tree if x[0].role is Role.PLANNER]
        rows = planners + [x for tree in trees for x in tree if x[0].role is Role.WORKER]
        size = max(1, -(-len(planners) // n))
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        shares = [len(chunk) / size for chunk in chunks]
    else:
        n = min(n, len(trees))
        bounds = [len(trees) * i // n for i in range(n + 1)]
        chunks = [[x for tree in trees[a:b] for x in tree] for a, b in pairwise(bounds)]
        shares = [1.0] * n
    for chunk, share in zip(chunks, shares, strict=True):
        units = defaultdict(list)
        for row in chunk:
            for token in row:
                kind = config.algo.aggregation
                units[{"token": 0, "trajectory": token.trajectory, "episode": token.episode}[kind]]
                key = {"token": 0, "trajectory": token.trajectory, "episode": token.episode}[kind]
                units[key].append(token)
        for tokens in units.values():
            for token in tokens:
                token.weight = share / len(units) / len(tokens)
    return [[token for row in chunk for token in row] for chunk in chunks]


def values_and_slopes(token, algo):
    """One token's policy loss and KL penalty before its weight, and their derivatives."""
    r, a = math.exp(token.new - token.old), token.advantage
    low, high = 1 - algo.clip_low, 1 + algo.clip_high
    surrogate = min(r * a, min(max(r, low), high) * a)
    slope = 0.0 if (a > 0 and r > high) or (a < 0 and r < low) else r * a
    if algo.dual_clip and a < 0 and surrogate < algo.dual_clip * a:
        surrogate, slope = algo.dual_clip * a, 0.0
    importance, _ = importance_of(token, algo)
    d = token.new - token.initial
    kl, kl_slope = {
        "k1": (d, 1.0),
        "k2": (d * d / 2, d),
        "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
    }[algo.kl_estimator]
    policy = -importance * surrogate
    return policy, algo.kl_coef * kl, -importance * slope, algo.kl_coef * kl_slope


def importance_of(token, algo):
    """Weight, and whether it was held back."""
    ratio = math.exp(token.old - token.rollout)
    if algo.tis == "off":
        return 1.0, False
    if algo.tis == "truncate":
        return min(ratio, algo.tis_cap), ratio > algo.tis_cap
    inside = 1 / algo.tis_cap <= ratio <= algo.tis_cap
    return (ratio if inside else 0.0), not inside


def expected_metrics(updates, algo):
    """Means over all trained tokens of the step; losses are means over its updates."""
    everything = [token for tokens in updates for token in tokens]
    measured = everything if algo.old_logprobs == "trainer" else updates[0]
    result = {}

    def mean(name, tokens, value):
        result[name] = sum(map(value, tokens)) / len(tokens)

    def gap(token):
        return (token.old if algo.old_logprobs == "trainer" else token.new) - token.rollout

    def clipped(token):
        r, a = math.exp(token.new - token.old), token.advantage
        return (a < 0 and r < 1 - algo.clip_low) or (a > 0 and r > 1 + algo.clip_high)

    result["mismatch/max"] = max(abs(gap(token)) for token in measured)
    for suffix, roles in (("", set(Role)), *((f"/{role}", {role}) for role in Role)):
        if tokens := [token for token in everything if token.role in roles]:
            mean(f"policy/ratio{suffix}", tokens, lambda t: math.exp(t.new - t.old))
            mean(f"policy/clip_frac{suffix}", tokens, clipped)
            mean(f"policy/entropy{suffix}", tokens, lambda t: -t.new / 2)
            if algo.kl_coef:
                mean(f"policy/kl{suffix}", tokens, lambda t: values_and_slopes(t, algo)[1])
                result[f"policy/kl{suffix}"] /= algo.kl_coef
        tokens = [token for token in measured if token.role in roles]
        if tokens:
            mean(f"mismatch/abs_logprob{suffix}", tokens, lambda t: abs(gap(t)))
            mean(f"mismatch/k3{suffix}", tokens, lambda t: math.exp(gap(t)) - 1 - gap(t))
        if tokens and suffix:
            result[f"mismatch/abs_logprob{suffix}/max"] = max(abs(gap(t)) for t in tokens)
        if tokens and suffix and algo.tis != "off":
            mean(f"policy/tis_weight{suffix}", tokens, lambda t: importance_of(t, algo)[0])
            mean(f"policy/tis_held_back{suffix}", tokens, lambda t: importance_of(t, algo)[1])
            squares = sum(importance_of(t, algo)[0] ** 2 for t in tokens) / len(tokens)
            first = result[f"policy/tis_weight{suffix}"]
            result[f"policy/tis_ess{suffix}"] = first**2 / squares if squares else 0.0
            ratios = [math.exp(t.old - t.rollout) for t in tokens]
            result[f"policy/tis_ratio{suffix}/max"] = max(ratios)
    parts = [[values_and_slopes(t, algo) for t in tokens] for tokens in updates]
    for i, name in enumerate(("loss/policy", "loss/kl")):
        result[name] = sum(
            token.weight * part[i]
            for tokens, values in zip(updates, parts, strict=True)
            for token, part in zip(tokens, values, strict=True)
        ) / len(updates)
    if not algo.kl_coef:
        del result["loss/kl"]
    return result


@SETTINGS
@given(batches(), configs(), st.integers(1, 3), st.integers(0, 2**32))
def test_a_step_is_the_formula(batch, config, dp_size, seed):
    algo, tables = config.algo, Tables.of(batch, seed)
    advantages = step_advantages(config, batch.groups)
    if config.compat == "corrected":
        expected = {k: v for g in batch.groups for k, v in advantages_of(g, algo).items()}
        assert advantages == pytest.approx(expected, rel=1e-6, abs=1e-12)
    else:
        expected = advantages  # float32 artefacts included; figures in test_advantages.py
    samples = step_samples(config, batch, advantages)
    if not samples:
        event("nothing to train")
        with pytest.raises(RolloutError, match="no trainable episode"):
            learn(config, samples, tables, dp_size)
        return
    actor, result = learn(config, samples, tables, dp_size)
    updates = updates_of(batch, expected, tables, config)
    event(f"{config.compat}, {len(updates)} updates")
    # One update of the trainer's own: it is its own old policy.
    for token in (t for tokens in updates for t in tokens):
        if algo.old_logprobs == "engine":
            token.old = token.rollout
        elif len(updates) == 1:
            token.old = token.new

    is_scored = len(updates) > 1 and algo.old_logprobs == "trainer"
    passes = ["old"] * is_scored + ["initial"] * (algo.kl_coef > 0)
    assert actor.passes == passes * dp_size, "a scoring pass too many, or one is missing"
    seen = [sorted(identities) for identities in actor.seen]
    assert seen == [sorted({t.trajectory for t in tokens}) for tokens in updates]
    places = [3] * len(updates) if config.compat == "reference" else range(5, 5 + len(updates))
    assert actor.indices == list(places)
    slopes = {}
    for loss, tokens in zip(actor.losses, updates, strict=True):
        values = [values_and_slopes(token, algo) for token in tokens]
        terms = [t.weight * (v[0] + v[1]) for t, v in zip(tokens, values, strict=True)]
        assert loss == pytest.approx(math.fsum(terms), abs=1e-6 * sum(map(abs, terms)))
        for token, value in zip(tokens, values, strict=True):
            slopes[token.trajectory, token.position] = [token.weight * s for s in value[2:]]
    for identity, table in tables.new.items():
        grad = [0.0] * len(table) if table.grad is None else table.grad.tolist()
        for t, actual in enumerate(grad):
            # Relative to a token's own terms; exactly 0 where nothing is trained.
            parts = slopes.get((identity, t), [0.0, 0.0])
            assert abs(actual - sum(parts)) <= 1e-6 * sum(map(abs, parts)), (identity, t)
    metrics = {k: v for k, v in result.metrics.items() if not k.startswith("optim/")}
    assert 0 < metrics.pop("train/packing_efficiency") <= 1
    wanted = expected_metrics(updates, algo)
    assert metrics.keys() == wanted.keys()
    assert metrics == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@SETTINGS
@given(batches(), configs(), st.randoms(use_true_random=False), st.integers(0, 2**32))
def test_order_does_not_matter(batch, config, rng, seed):
    """Groups, episodes and workers in any order; one update, because its share is by order."""
    config = replace(config, compat="corrected", algo=replace(config.algo, updates_per_step=1))
    shuffled = replace(
        batch,
        groups=tuple(
            replace(
                group,
                episodes=tuple(
                    replace(e, workers=tuple(rng.sample(e.workers, len(e.workers))))
                    for e in rng.sample(group.episodes, len(group.episodes))
                ),
            )
            for group in rng.sample(batch.groups, len(batch.groups))
        ),
    )
    stories = []
    for order in (batch, shuffled):
        tables = Tables.of(batch, seed)
        advantages = step_advantages(config, order.groups)
        samples = step_samples(config, order, advantages)
        if not samples:
            return
        _, result = learn(config, samples, tables, 2)
        grads = {k: t.grad.tolist() for k, t in tables.new.items() if t.grad is not None}
        stories.append((advantages, grads, result.metrics))
    (advantages, grads, metrics), (again, other_grads, other_metrics) = stories
    assert again == advantages  # exactly: sums are correctly rounded
    assert grads.keys() == other_grads.keys()
    for identity, grad in grads.items():
        assert other_grads[identity] == pytest.approx(grad, rel=1e-9)
    assert other_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)
