"""What runs inside a process that Ray started: a worker or a router, behind one small interface.

`ProcessActor` calls it on its event loop; nothing here knows Ray.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from paceline.cluster.launcher import Membership
from paceline.cluster.process_state import ProcessName
from paceline.cluster.settings import DeploymentSettings


@dataclass(frozen=True, slots=True)
class HostContext:
    """What a hosted process is told. The callbacks may be called from any thread."""

    name: ProcessName
    settings: DeploymentSettings
    host: str
    """Address of this machine, reachable by the others of the Ray cluster."""
    router_port: int
    """Where the router before this one listened; 0: there was none, or this is a worker."""
    on_step: Callable[[str, float], None]
    """(name, seconds) of a step of the start-up checklist that has ended."""
    on_progress: Callable[[str, float], None]
    """(what is being done, share of it that is done, 0 to 1)."""
    on_failure: Callable[[BaseException], None]
    """It cannot go on, and its process must be replaced."""


class HostedLoad(NamedTuple):
    """How a hosted process does."""

    draining: bool = False
    is_idle: bool = True
    stalled_s: float = 0.0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_running: int = 0
    num_waiting: int = 0
    lag_s: float = 0.0
    """How late a router's event loop was, as the mean of the last few seconds."""
    max_lag_s: float = 0.0
    model_name: str = ""
    """Routers say which model they serve."""


class Hosted(Protocol):
    """One worker or router. Methods are called on one event loop, `start` first and once."""

    async def start(self) -> str:
        """Load, warm up, listen; returns host:port. Does not block the loop."""

    def load(self) -> HostedLoad:
        """Describe it; called after `start` has returned."""

    async def update_membership(self, membership: Membership) -> None:
        """Learn who serves."""

    async def drain(self) -> None:
        """Take no new work."""

    async def stop(self) -> None:
        """End, and free everything."""

    async def check_integrity(self) -> None:
        """Raise IntegrityError if an invariant does not hold."""

    def arm_failpoint(self, specification: str) -> None:
        """Arm faults, for tests."""


BuildHosted = Callable[[HostContext], Hosted]
