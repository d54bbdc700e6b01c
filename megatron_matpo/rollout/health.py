"""The health of one engine: a pure state machine, written as one table (docs/fleet.md shows it).

Invariants, held by a test that walks every sequence of events:

* only an engine that took the fleet's present version, verified, since its last start is routable;
* a dead engine comes back as one that has to be refitted;
* failed probes and failed requests are counted apart, and only in a row.

Time is no part of it: who probes decides when, and every wait is elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from megatron_matpo.config.rollout import HealthConfig
from megatron_matpo.types import PolicyVersion


class State(StrEnum):
    """What an engine is good for."""

    STARTING = "starting"
    """Has not answered since it was started."""
    STALE = "stale"
    """Answers, and lacks the fleet's present weights."""
    REFITTING = "refitting"
    """The trainer is giving it weights."""
    HEALTHY = "healthy"
    """Serves the fleet's present weights, verified."""
    SUSPECT = "suspect"
    """As healthy, but its requests fail: used when no engine is healthy."""
    DEAD = "dead"
    """Does not answer."""


ROUTABLE = (State.HEALTHY, State.SUSPECT)
"""States in which an engine gets requests, the preferred one first."""
REFITTABLE = (State.STALE, State.REFITTING, *ROUTABLE)
"""States in which an engine takes part in a push."""


class Event(StrEnum):
    """What can be learnt of an engine."""

    ANSWERED = "probe answered"
    """A generation probe; the weights are those that the engine is known to hold."""
    SILENT = "probe failed"
    BOOTING = "says that it starts"
    RESTARTED = "probe answered by a new start"
    """Its weight version is not the one that it is known to hold."""
    SERVED = "request served"
    FAILED = "request failed"
    REFIT_BEGAN = "refit began"
    REFITTED = "refitted, verified"
    """Carries the version."""
    PUSHED = "others were refitted"
    """Carries the version."""
    LOST = "lost in a push"


class When(StrEnum):
    """A condition on the engine as it is once the event was counted."""

    ALWAYS = ""
    TOO_MANY_PROBES = "`rollout.health.max_failed_probes` in a row"
    TOO_MANY_REQUESTS = "`rollout.health.max_failed_requests` in a row"
    ENOUGH_PROBES = "`rollout.health.recovery_probes` in a row"
    IS_PRESENT = "to the fleet's present version or a newer one"
    IS_OLD = "to an older version than the fleet's"
    IS_NEWER = "to a newer version than its own"


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    state: State
    event: Event
    then: State
    when: When = When.ALWAYS


_S, _E = State, Event
TABLE: tuple[Rule, ...] = (
    Rule(_S.STARTING, _E.ANSWERED, _S.STALE),
    Rule(_S.STARTING, _E.RESTARTED, _S.STALE),
    Rule(_S.STARTING, _E.REFIT_BEGAN, _S.REFITTING),
    Rule(_S.STARTING, _E.LOST, _S.DEAD),
    Rule(_S.STALE, _E.REFIT_BEGAN, _S.REFITTING),
    Rule(_S.STALE, _E.SILENT, _S.DEAD, When.TOO_MANY_PROBES),
    Rule(_S.STALE, _E.LOST, _S.DEAD),
    Rule(_S.REFITTING, _E.REFITTED, _S.HEALTHY, When.IS_PRESENT),
    Rule(_S.REFITTING, _E.REFITTED, _S.STALE, When.IS_OLD),
    Rule(_S.REFITTING, _E.RESTARTED, _S.STALE),
    Rule(_S.REFITTING, _E.LOST, _S.DEAD),
    Rule(_S.HEALTHY, _E.REFIT_BEGAN, _S.REFITTING),
    Rule(_S.HEALTHY, _E.FAILED, _S.SUSPECT, When.TOO_MANY_REQUESTS),
    Rule(_S.HEALTHY, _E.SILENT, _S.DEAD, When.TOO_MANY_PROBES),
    Rule(_S.HEALTHY, _E.RESTARTED, _S.STALE),
    Rule(_S.HEALTHY, _E.PUSHED, _S.STALE, When.IS_NEWER),
    # Without a refit that began since the last start it says nothing of this engine.
    Rule(_S.HEALTHY, _E.REFITTED, _S.STALE, When.IS_NEWER),
    Rule(_S.HEALTHY, _E.LOST, _S.DEAD),
    Rule(_S.SUSPECT, _E.SERVED, _S.HEALTHY),
    Rule(_S.SUSPECT, _E.ANSWERED, _S.HEALTHY, When.ENOUGH_PROBES),
    Rule(_S.SUSPECT, _E.REFIT_BEGAN, _S.REFITTING),
    Rule(_S.SUSPECT, _E.SILENT, _S.DEAD, When.TOO_MANY_PROBES),
    Rule(_S.SUSPECT, _E.RESTARTED, _S.STALE),
    Rule(_S.SUSPECT, _E.PUSHED, _S.STALE, When.IS_NEWER),
    Rule(_S.SUSPECT, _E.REFITTED, _S.STALE, When.IS_NEWER),
    Rule(_S.SUSPECT, _E.LOST, _S.DEAD),
    Rule(_S.DEAD, _E.BOOTING, _S.STARTING),
    Rule(_S.DEAD, _E.ANSWERED, _S.STALE),
    Rule(_S.DEAD, _E.RESTARTED, _S.STALE),
)
"""All changes of state; what is not listed changes counters at most."""


@dataclass(frozen=True)
class Health:
    """What is known of one engine. Immutable: `after` makes the next one."""

    state: State = State.STARTING
    version: PolicyVersion | None = None
    """What it was verified to hold since its last start."""
    present: PolicyVersion | None = None
    """The newest version that any engine of the fleet was verified to hold."""
    incarnation: int = 0
    """Grows whenever it may be another process than before, or one that lost what it had: then it
    belongs to no process group any more."""
    failed_probes: int = 0
    good_probes: int = 0
    failed_requests: int = 0

    def after(
        self, event: Event, limits: HealthConfig, version: PolicyVersion | None = None
    ) -> Health:
        """The health once `event` is known; REFITTED and PUSHED carry a `version`."""
        assert (version is not None) == (event in (Event.REFITTED, Event.PUSHED))
        counted = self._counted(event, limits)
        then = next(
            (
                rule.then
                for rule in TABLE
                if rule.state is self.state
                and rule.event is event
                and counted._holds(rule.when, limits, version)
            ),
            self.state,
        )
        if version is not None and (self.present is None or version > self.present):
            counted = replace(counted, present=version)
        return counted._entering(then, event, version, self.state)

    def _counted(self, event: Event, limits: HealthConfig) -> Health:
        """Counters stop at what decides, so that there are finitely many states."""
        match event:
            case Event.ANSWERED | Event.RESTARTED:
                good = min(self.good_probes + 1, limits.recovery_probes)
                return replace(self, failed_probes=0, good_probes=good)
            case Event.SILENT:
                failed = min(self.failed_probes + 1, limits.max_failed_probes)
                return replace(self, failed_probes=failed, good_probes=0)
            case Event.SERVED:
                return replace(self, failed_requests=0)
            case Event.FAILED:
                failed = min(self.failed_requests + 1, limits.max_failed_requests)
                return replace(self, failed_requests=failed)
            case _:
                return self

    def _holds(self, when: When, limits: HealthConfig, version: PolicyVersion | None) -> bool:
        match when:
            case When.ALWAYS:
                return True
            case When.TOO_MANY_PROBES:
                return self.failed_probes >= limits.max_failed_probes
            case When.TOO_MANY_REQUESTS:
                return self.failed_requests >= limits.max_failed_requests
            case When.ENOUGH_PROBES:
                return self.good_probes >= limits.recovery_probes
            case When.IS_PRESENT:
                return version is not None and (self.present is None or version >= self.present)
            case When.IS_OLD:
                return version is not None and self.present is not None and version < self.present
            case When.IS_NEWER:
                return version is not None and (self.version is None or version > self.version)

    def _entering(
        self, then: State, event: Event, version: PolicyVersion | None, before: State
    ) -> Health:
        """With the new state's counters, version and incarnation."""
        is_new = event is Event.RESTARTED or (before is State.DEAD and then is not State.DEAD)
        held = self.version
        if is_new or then in (State.STARTING, State.DEAD, State.REFITTING):
            held = None  # parts of another version may have been loaded
        if before is State.REFITTING and event is Event.REFITTED:
            held = version
        entered = replace(
            self, state=then, version=held, incarnation=self.incarnation + int(is_new)
        )
        if then is before:
            return entered
        return replace(entered, failed_probes=0, good_probes=0, failed_requests=0)


def table_markdown() -> str:
    """The table as docs/fleet.md shows it."""
    lines = ["| state | event | if | next state |", "|---|---|---|---|"]
    lines += [
        f"| {rule.state} | {rule.event} | {rule.when or '-'} | {rule.then} |" for rule in TABLE
    ]
    return "\n".join(lines) + "\n"
