"""Decide what to do so that a deployment becomes what is wanted: wanted + seen -> actions. Pure."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from paceline.cluster.back_off import BackOff
from paceline.cluster.process_state import ProcessName, ProcessState, Role

LIVE = (ProcessState.STARTING, ProcessState.READY)


class Seen(NamedTuple):
    """A process as the controller sees it now."""

    name: ProcessName
    state: ProcessState
    is_idle: bool
    """No request holds anything there."""
    drain_deadline_s: float | None
    """When a DRAINING process is stopped whatever still runs."""


class Start(NamedTuple):
    """Start a process under this id; the incarnation is the controller's to choose."""

    role: Role
    number: int


class Drain(NamedTuple):
    """Give a READY process no new work."""

    name: ProcessName


class Stop(NamedTuple):
    """End a process: it has drained, or never took work."""

    name: ProcessName


Action = Start | Drain | Stop


def plan(
    wanted: Mapping[Role, int], seen: Sequence[Seen], back_off: BackOff, now: float
) -> list[Action]:
    """Plan the next actions; calling again after they were begun plans nothing twice.

    Every process that is not DEAD keeps its id, so that two of one id never live at once. A death
    is repaired under the same id, when `back_off` allows it. Too many: those still STARTING go
    first, then the highest number.
    """
    actions: list[Action] = list(_finished_drains(seen, now))
    for role, num_wanted in wanted.items():
        members = [s for s in seen if s.name.role is role and s.state is not ProcessState.DEAD]
        live = [s for s in members if s.state in LIVE]
        actions.extend(_surplus(live, len(live) - num_wanted))
        taken = {s.name.number for s in members}
        actions.extend(_missing(role, num_wanted - len(live), taken, back_off, now, not live))
    return actions


def _finished_drains(seen: Sequence[Seen], now: float) -> Iterator[Stop]:
    for process in seen:
        if process.state is ProcessState.DRAINING:
            deadline = process.drain_deadline_s
            if process.is_idle or (deadline is not None and now >= deadline):
                yield Stop(process.name)


def _surplus(live: Sequence[Seen], count: int) -> Iterator[Action]:
    victims = sorted(live, key=lambda s: (s.state is not ProcessState.STARTING, -s.name.number))
    for process in victims[: max(0, count)]:
        if process.state is ProcessState.STARTING:
            yield Stop(process.name)
        else:
            yield Drain(process.name)


def _missing(
    role: Role,
    count: int,
    taken: set[int],
    back_off: BackOff,
    now: float,
    is_pool_empty: bool,
) -> Iterator[Start]:
    free = (number for number in itertools.count() if number not in taken)
    for number in itertools.islice(free, max(0, count)):
        # An id that has to wait is not replaced by another one: that would be no wait at all.
        if back_off.may_start(f"{role.value}-{number}", now, is_pool_empty=is_pool_empty):
            yield Start(role, number)
