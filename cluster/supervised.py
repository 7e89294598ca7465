"""One process in the controller's books: its state, what it said last, and how plans see it."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from paceline.cluster.launcher import Member, Process, ProcessReport, Started, StartupStep
from paceline.cluster.plan import Seen
from paceline.cluster.process_state import TRANSITIONS, ProcessName, ProcessState
from paceline.errors import IntegrityError

ADOPTION_TIMEOUT_S = 10.0
"""For an adopted worker to answer. Until then a membership without it would cut off its streams;
what still loads is waited for in vain, so not much longer than a busy process may need."""
NUM_IDLE_REPORTS = 2
"""In a row, before a draining worker counts as idle: work may have been on its way to it."""


@dataclass(slots=True)
class Supervised:
    """Changed by the controller's event loop only."""

    name: ProcessName
    started_s: float
    """When its start began; all times here are the controller's monotonic clock."""
    state: ProcessState = ProcessState.STARTING
    process: Process | None = None
    """None until it is launched."""
    is_adopted: bool = False
    """Whether an earlier controller started it, so that others may know it as a member."""
    address: str = ""
    ready_s: float | None = None
    last_heard_s: float = 0.0
    report: ProcessReport | None = None
    num_idle_reports: int = 0
    drain_deadline_s: float | None = None
    acknowledged_version: int = 0
    """Membership that it has."""
    taking_membership: asyncio.Lock = field(default_factory=asyncio.Lock)
    """A burial and the main loop may both have one for it: each is sent once, in order."""
    message: str = ""
    """Why it is dead, or why the one before it died, while this one is STARTING."""

    def move(self, state: ProcessState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise IntegrityError(f"{self.name} cannot go from {self.state.value} to {state.value}")
        self.state = state

    def became_ready(self, started: Started, now: float) -> None:
        self.move(ProcessState.READY)
        self.address = started.address
        self.ready_s = self.last_heard_s = now
        self.message = ""

    def heard(self, report: ProcessReport, now: float) -> None:
        self.report = report
        self.last_heard_s = now
        idle = report.draining and report.is_idle
        self.num_idle_reports = self.num_idle_reports + 1 if idle else 0

    def ready_for_s(self, now: float) -> float:
        return now - self.ready_s if self.ready_s is not None else 0.0

    def seen(self) -> Seen:
        is_idle = self.num_idle_reports >= NUM_IDLE_REPORTS
        return Seen(self.name, self.state, is_idle, self.drain_deadline_s)

    @property
    def is_serving(self) -> bool:
        """Whether requests run there: routers must know it."""
        return self.state in (ProcessState.READY, ProcessState.DRAINING)

    @property
    def steps(self) -> tuple[StartupStep, ...]:
        return self.report.steps if self.report is not None else ()

    def stall(self, limit_s: float) -> str | None:
        """Say why it counts as dead though it answers; None while all is well."""
        report = self.report
        if report is None or report.is_idle or report.stalled_s <= limit_s:
            return None
        return (
            f"it has {report.num_running} requests running and finished no step for "
            f"{report.stalled_s:.1f} s, and {limit_s:g} s is its limit"
        )


def is_membership_known(processes: Iterable[Supervised], now: float) -> bool:
    """Say whether every adopted worker has said if it serves; who is silent for long does not."""
    return not any(
        p.is_adopted
        and p.name.role.is_worker
        and p.state is ProcessState.STARTING
        and now < p.started_s + ADOPTION_TIMEOUT_S
        for p in processes
    )


def members_of(processes: Iterable[Supervised]) -> tuple[Member, ...]:
    """List the workers that serve."""
    return tuple(
        Member(p.name.worker_id, p.name.role, p.name.incarnation, p.address)
        for p in processes
        if p.name.role.is_worker and p.is_serving
    )
