"""What processes a deployment has, and where each is in its life."""

from enum import Enum
from typing import NamedTuple


class Role(Enum):
    """What a process does. The values are those of worker ids and of the control API."""

    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def is_worker(self) -> bool:
        return self is not Role.ROUTER


class ProcessState(Enum):
    """Where a process is in its life."""

    STARTING = "starting"
    """Loading and warming up."""
    READY = "ready"
    """Takes work."""
    DRAINING = "draining"
    """Takes no new work; what runs finishes."""
    STOPPING = "stopping"
    """Told to end."""
    DEAD = "dead"
    """Ended, whatever the reason."""


TRANSITIONS: dict[ProcessState, frozenset[ProcessState]] = {
    ProcessState.STARTING: frozenset(
        {ProcessState.READY, ProcessState.STOPPING, ProcessState.DEAD}
    ),
    ProcessState.READY: frozenset(
        {ProcessState.DRAINING, ProcessState.STOPPING, ProcessState.DEAD}
    ),
    ProcessState.DRAINING: frozenset({ProcessState.STOPPING, ProcessState.DEAD}),
    ProcessState.STOPPING: frozenset({ProcessState.DEAD}),
    ProcessState.DEAD: frozenset(),
}


class ProcessName(NamedTuple):
    """One start of a process; never reused. Written `decode-0.1763915000000000000`."""

    role: Role
    number: int
    incarnation: int

    @property
    def worker_id(self) -> str:
        """The place that a replacement takes over, such as decode-0."""
        return f"{self.role.value}-{self.number}"

    def __str__(self) -> str:
        return f"{self.worker_id}.{self.incarnation}"

    @classmethod
    def parse(cls, text: str) -> "ProcessName | None":
        """Read a name; None if the text is not one."""
        worker_id, _, incarnation = text.rpartition(".")
        role, _, number = worker_id.rpartition("-")
        if role not in {r.value for r in Role} or not number.isdigit() or not incarnation.isdigit():
            return None
        return cls(Role(role), int(number), int(incarnation))
