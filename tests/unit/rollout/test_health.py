"""Proves what no sequence of events can do to an engine's health, by walking all of them.

The walk is breadth first over (health, what really happened), to the end: counters stop at their
limits and versions at `NEWEST`, so the set of states is finite and every sequence, however long,
stays inside it. What really happened is kept beside the machine by rules of its own. Probes that
come too late, and real engines, are in test_engine_fleet.py and tests/smoke.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from megatron_matpo.config.rollout import HealthConfig
from megatron_matpo.rollout.health import (
    ROUTABLE,
    TABLE,
    Event,
    Health,
    State,
)

LIMITS = HealthConfig(max_failed_probes=3, max_failed_requests=2, recovery_probes=2)
NEWEST = 3


@dataclass(frozen=True)
class Truth:
    """The engine's history, told without the machine."""

    refit_is_open: bool = False
    """A refit began after the last start, and nothing has ended it."""
    holds: int | None = None
    """Version of the last refit that was begun and finished since the last start."""
    fleet: int | None = None
    """Newest version that anybody was told of."""

    def after(self, event: Event, version: int | None) -> Truth:
        fleet = self.fleet if version is None else max(self.fleet or 0, version)
        match event:
            case Event.RESTARTED | Event.LOST:
                return Truth(fleet=fleet)
            case Event.REFIT_BEGAN:
                return Truth(True, None, fleet)
            case Event.REFITTED if self.refit_is_open:
                return Truth(False, version, fleet)
        return replace(self, fleet=fleet)


def alphabet() -> Iterator[tuple[Event, int | None]]:
    for event in Event:
        if event in (Event.REFITTED, Event.PUSHED):
            yield from ((event, version) for version in range(NEWEST + 1))
        else:
            yield event, None


Node = tuple[Health, Truth]


def walk() -> dict[Node, tuple[Node, Event] | None]:
    """Every reachable state, and by which step it was reached first."""
    first: Node = (Health(), Truth())
    reached: dict[Node, tuple[Node, Event] | None] = {first: None}
    queue = deque([first])
    while queue:
        node = queue.popleft()
        for event, version in alphabet():
            health = node[0].after(event, LIMITS, version)
            step = (replace(health, incarnation=0), node[1].after(event, version))
            if step not in reached:
                reached[step] = (node, event)
                queue.append(step)
    return reached


REACHED = walk()


def path_to(node: Node) -> list[str]:
    """The shortest sequence of events that leads there, for the message of a failed test."""
    events: list[str] = []
    while (step := REACHED[node]) is not None:
        node, event = step
        events.insert(0, event.name)
    return events


def test_no_engine_is_routable_without_a_verified_refit_to_the_present_version_since_its_start():
    assert len(REACHED) > 500
    assert {health.state for health, _ in REACHED} == set(State)
    for node in REACHED:
        health, truth = node
        if health.state in ROUTABLE:
            assert truth.holds is not None, path_to(node)
            assert truth.holds == truth.fleet == health.version, path_to(node)


def test_an_engine_is_known_to_hold_only_what_it_was_refitted_to():
    for node in REACHED:
        health, truth = node
        assert health.version in (None, truth.holds), path_to(node)
        assert health.present == truth.fleet, path_to(node)


def test_a_dead_engine_is_never_healthy_before_it_was_stale_or_starting():
    for health, _ in REACHED:
        if health.state is State.DEAD:
            for event, version in alphabet():
                after = health.after(event, LIMITS, version)
                assert after.state in (State.DEAD, State.STARTING, State.STALE)
                is_back = after.state is not State.DEAD
                assert after.incarnation == int(is_back or event is Event.RESTARTED)
    into_healthy = {rule.state for rule in TABLE if rule.then is State.HEALTHY}
    assert into_healthy == {State.REFITTING, State.SUSPECT}


def test_there_is_no_dead_end():
    """From everywhere an engine that answers and is refitted becomes healthy."""
    for node in REACHED:
        health = node[0]
        for event in (Event.ANSWERED, Event.REFIT_BEGAN):
            health = health.after(event, LIMITS)
        health = health.after(Event.REFITTED, LIMITS, NEWEST)
        assert health.state is State.HEALTHY, path_to(node)


def test_every_row_of_the_table_is_taken_and_none_contradicts_another():
    taken = set()
    for health, _ in REACHED:
        for event, version in alphabet():
            after = health.after(event, LIMITS, version)
            if after.state is not health.state:
                taken.add((health.state, event, after.state))
    assert taken == {(rule.state, rule.event, rule.then) for rule in TABLE}
    keys = [(rule.state, rule.event, rule.when) for rule in TABLE]
    assert len(keys) == len(set(keys))


def healthy() -> Health:
    health = Health()
    for event, version in ((Event.REFIT_BEGAN, None), (Event.REFITTED, 1)):
        health = health.after(event, LIMITS, version)
    assert health.state is State.HEALTHY
    return health


def run(health: Health, *events: Event) -> Health:
    for event in events:
        health = health.after(event, LIMITS)
    return health


@pytest.mark.parametrize("start", [State.HEALTHY, State.SUSPECT])
def test_failed_probes_count_in_a_row_only(start: State):
    health = replace(healthy(), state=start)
    silent, answered = Event.SILENT, Event.ANSWERED
    assert run(health, silent, silent, answered, silent, silent).state is start
    assert run(health, silent, silent, silent).state is State.DEAD


def test_probes_and_requests_are_counted_apart():
    health = run(healthy(), Event.SILENT, Event.FAILED, Event.SILENT)
    assert health.state is State.HEALTHY
    assert run(health, Event.SERVED, Event.FAILED).state is State.HEALTHY
    suspect = run(health, Event.ANSWERED, Event.FAILED)
    assert suspect.state is State.SUSPECT, "an answered probe does not excuse failed requests"
    assert run(suspect, Event.SERVED).state is State.HEALTHY
    assert run(suspect, Event.ANSWERED, Event.SILENT, Event.ANSWERED).state is State.SUSPECT
    assert run(suspect, Event.ANSWERED, Event.ANSWERED).state is State.HEALTHY


def test_the_incarnation_tells_when_a_process_group_is_lost():
    health = healthy()
    assert health.incarnation == 0
    assert run(health, Event.RESTARTED).incarnation == 1
    assert run(health, *[Event.SILENT] * 3, Event.ANSWERED).incarnation == 1
    assert run(health, Event.REFIT_BEGAN).incarnation == 0
    assert run(Health(), Event.ANSWERED).incarnation == 0
