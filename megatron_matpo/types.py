"""Frozen records shared by rollout, algorithms and trainer. Torch-free, standard library only.

An episode is a tree of token lists: one planner trajectory and the worker trajectories that it
spawned. Invariants:

* a trajectory's tokens are append-only; what the engine sampled is stored as the engine returned
  it (ids and log-probs), what the environment adds is tokenized once;
* role, agent and parent are fields, never recovered from text or from order;
* only tokens of MODEL turns are trained; every one of them has a log-prob and a policy version.

Letters in shapes: T tokens of one trajectory, M sampled tokens of one turn.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

PolicyVersion = int
"""Number of weight pushes of this run that produced the weights: 0 is the initial model."""
PauseMode = Literal["abort", "retract", "in_place"]
"""What a paused engine does with running requests: ends them with what they have, queues them anew,
or freezes them."""


class Role(StrEnum):
    """What a trajectory does in its episode; immutable."""

    PLANNER = "planner"
    WORKER = "worker"


class TurnKind(StrEnum):
    """Who wrote the tokens of a turn."""

    PROMPT = "prompt"
    """The rendered system and user messages, with the generation prompt."""
    MODEL = "model"
    """Sampled by the engine; the only kind that is trained."""
    ENVIRONMENT = "environment"
    """Tool replies and instructions, wrapped by the chat template, up to the next sample."""


class Status(StrEnum):
    """How a trajectory ended. Exactly one per trajectory; each value is counted in the metrics."""

    ANSWERED = "answered"
    """The last turn holds no tool call: it is the answer (planner) or the report (worker)."""
    MAX_TURNS = "max_turns"
    OVERFLOW = "overflow"
    """The context or the per-turn token limit was reached."""
    TIME_LIMIT = "time_limit"
    """The agent's own wall clock (`agents.<name>.timeout_s`) was over."""
    INVALID_CALL = "invalid_call"
    """The bound on malformed tool calls was reached."""
    TOOL_FAILURE = "tool_failure"
    """Infrastructure: a tool server failed; the episode is not trained."""
    ENGINE_FAILURE = "engine_failure"
    """Infrastructure: the engine failed or aborted; the episode is not trained."""
    INTERNAL_ERROR = "internal_error"
    """A bug of ours or a row that cannot be rendered; the episode is not trained."""
    DEADLINE = "deadline"
    """The episode ran past its wall-clock limit; the episode is not trained."""


INFRASTRUCTURE_FAILURES = frozenset(
    {Status.TOOL_FAILURE, Status.ENGINE_FAILURE, Status.INTERNAL_ERROR, Status.DEADLINE}
)


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Policy version of `num_tokens` consecutive sampled tokens."""

    version: PolicyVersion
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One append to a trajectory.

    For a MODEL turn `logprobs` has one natural-log probability per token under the distribution
    that sampled it and `versions` covers all of its tokens; for other kinds both are empty.

    Ids are kept as an int32 array and log-probs as a float32 one (what engines compute, and what
    `wire` writes), whatever sequence they are given as: a step holds tens of millions of tokens,
    and a tuple takes ten times the memory. Compare them as lists.
    """

    kind: TurnKind
    token_ids: Sequence[int]
    text: str
    logprobs: Sequence[float] = ()
    versions: tuple[VersionSpan, ...] = ()
    finish_reason: str = ""
    """MODEL turns: the engine's `stop` or `length`."""

    def __post_init__(self) -> None:
        """Pack, and assert the invariants above; a violation is a bug of ours."""
        if not isinstance(self.token_ids, array):
            object.__setattr__(self, "token_ids", array("i", self.token_ids))
        if self.logprobs and not isinstance(self.logprobs, array):
            object.__setattr__(self, "logprobs", array("f", self.logprobs))
        if self.kind is TurnKind.MODEL:
            assert len(self.logprobs) == len(self.token_ids), "one log-prob per sampled token"
            covered = sum(span.num_tokens for span in self.versions)
            assert covered == len(self.token_ids), "version spans must cover the sampled tokens"
        else:
            assert not self.logprobs and not self.versions, "only sampled tokens have log-probs"


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One tool or agent call found in a model turn, as the grammar classified it."""

    turn_index: int
    """Index of the MODEL turn in `Trajectory.turns`."""
    server: str
    tool: str
    outcome: str
    """A value of `agents.grammar.CallOutcome`."""
    worker_id: str = ""
    """Id of the worker trajectory that served the call, if it was a delegation."""
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One context of one agent: a planner's, or a worker's."""

    id: str
    role: Role
    agent: str
    """Name of the agent in the recipe (`agents.<name>`)."""
    parent_id: str
    """Id of the planner trajectory that spawned this worker; empty for a planner."""
    spawn_turn: int
    """1-based model turn of the parent that spawned this worker; 0 for a planner."""
    turns: tuple[Turn, ...]
    status: Status
    format_score: float
    """In [0, 1]: share of this trajectory's tool calls that are well formed (1 without calls)."""
    calls: tuple[CallRecord, ...] = ()
    task: str = ""
    """The main task, as the user asked it."""
    subtask: str = ""
    """Workers: the subtask that the planner delegated."""
    error: str = ""
    """What failed, for infrastructure statuses."""

    @property
    def token_ids(self) -> list[int]:
        """[T] all tokens of the context, in order."""
        return [token for turn in self.turns for token in turn.token_ids]

    @property
    def loss_mask(self) -> list[int]:
        """[T] 1 for sampled tokens, else 0."""
        return [int(turn.kind is TurnKind.MODEL) for turn in self.turns for _ in turn.token_ids]

    @property
    def logprobs(self) -> list[float]:
        """[T] the engine's log-prob of each sampled token, 0.0 elsewhere."""
        return [
            value for turn in self.turns for value in turn.logprobs or (0.0,) * len(turn.token_ids)
        ]

    @property
    def num_tokens(self) -> int:
        """Length of the context in tokens."""
        return sum(len(turn.token_ids) for turn in self.turns)

    @property
    def num_sampled_tokens(self) -> int:
        """Number of trained tokens."""
        return sum(len(turn.token_ids) for turn in self.turns if turn.kind is TurnKind.MODEL)

    @property
    def num_model_turns(self) -> int:
        """Number of generations."""
        return sum(turn.kind is TurnKind.MODEL for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Reward:
    """Parts of an episode's reward; `total` is what the advantage is computed from."""

    accuracy: float
    """Unweighted, in [0, 1]."""
    format: float
    """Unweighted, in [0, 1], workers' share included."""
    total: float
    verdict: str = ""
    """A value of `rewards.verdict.Verdict`; empty for offline graders and without an answer."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One planner trajectory and its workers: one sample of a prompt group."""

    id: str
    uid: str
    """Prompt group; equal for all samples of one question in one step."""
    sample_index: int
    planner: Trajectory
    workers: tuple[Trajectory, ...]
    reward: Reward | None
    """None if the episode failed for reasons outside the model; it is then not trained."""
    answer: str = ""
    """The extracted answer; empty if none was found."""
    failure: str = ""
    """Why `reward` is None."""
    num_retries: int = 0
    start_s: float = 0.0
    """When it got its place, since the collection began."""
    duration_s: float = 0.0
    """From then until it had ended, retries included."""
    score_s: float = 0.0
    """From its end until it had a reward, or it was certain that it would have none."""

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """Planner first, then workers in spawn order."""
        return (self.planner, *self.workers)


@dataclass(frozen=True, slots=True)
class Group:
    """All episodes of one question in one step."""

    uid: str
    data_source: str
    question: str
    ground_truth: str
    row_index: int
    """Row of the dataset file that the question came from."""
    episodes: tuple[Episode, ...]
    question_key: str = ""
    """As `data.dataset.Question.key`: equal for all copies of a question in an evaluation set."""
    level: str = ""
    question_type: str = ""

    @property
    def is_informative(self) -> bool:
        """Whether it can teach: two or more episodes have a reward, and not all the same one."""
        totals = {item.reward.total for item in self.episodes if item.reward is not None}
        return len(totals) > 1


@dataclass(frozen=True, slots=True)
class RowAsk:
    """A row of an evaluation set and how many episodes of it are wanted."""

    row: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """What the manager hands to the trainer for one step."""

    step: int
    policy_version: PolicyVersion
    groups: tuple[Group, ...]
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    """Rollout-side metrics of the step, already reduced (names in docs/metrics.md)."""
    next_position: int = 0
    """Questions that the run has asked so far, this step's included: where the next step goes on
    in the data. A step may ask more than it hands over (`rollout.dynamic_sampling`)."""


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One trajectory, ready to be trained. All lists have length T.

    `labels[t]` is the token that position t predicts; the loss mask and log-probs are aligned with
    labels, so position t carries what concerns token t+1 of the trajectory.
    """

    trajectory_id: str
    episode_id: str
    role: Role
    input_ids: list[int]
    labels: list[int]
    loss_mask: list[int]
    rollout_logprobs: list[float]
    advantage: float
    """The episode's scalar advantage; workers carry their planner's."""
    advantage_mask: list[int] | None = None
    """1 where the advantage holds, 0 where it counts as 0; None: everywhere (see `compat`)."""
    loss_weight: float = 1.0
    """Of each of its trained tokens, relative to the others of the update (`algo.aggregation`)."""
    is_current: list[int] | None = None
    """1 where the weights that the step trains from sampled the token, 0 where older ones did;
    None: no sampled token is older."""
