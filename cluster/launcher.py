"""What the controller needs of the world: processes that start, report and end.

`ray_launcher` does it with Ray's actors; tests do it with plain objects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from paceline.cluster.process_state import ProcessName, Role
from paceline.errors import PacelineError


class ProcessDiedError(PacelineError):
    """A process ended though nobody told it to. The message has its cause."""


class StartupStep(NamedTuple):
    """One line of the start-up checklist."""

    name: str
    seconds: float


class Started(NamedTuple):
    """A process that takes work."""

    address: str
    """host:port of its gRPC server."""
    pid: int


class LoadProgress(NamedTuple):
    """How far a long step is."""

    step: str
    fraction: float
    """0 to 1."""


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """A process as it describes itself, at any time of its life."""

    steps: tuple[StartupStep, ...]
    loading: LoadProgress | None
    pid: int
    log_path: str
    """Where its stderr goes, on its machine."""
    memory_bytes: int
    host: str = ""
    """Address of its machine."""
    draining: bool = False
    is_idle: bool = True
    stalled_s: float = 0.0
    """Since the last step ended, or since there was nothing to do."""
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_running: int = 0
    num_waiting: int = 0
    lag_s: float = 0.0
    """How late a router's event loop was, as the mean of the last few seconds."""
    max_lag_s: float = 0.0
    model_name: str = ""
    """Routers say which model they serve."""


class Member(NamedTuple):
    """One incarnation of a worker that serves."""

    worker_id: str
    role: Role
    incarnation: int
    address: str


class Membership(NamedTuple):
    """Who serves; a higher version replaces a lower one."""

    version: int
    members: tuple[Member, ...]


class Process(Protocol):
    """A launched process. Every method can raise ProcessDiedError, and waits while it hangs."""

    @property
    def name(self) -> ProcessName: ...

    async def start(self) -> Started:
        """Wait until it takes work. Asking again starts nothing twice, whoever asks."""

    async def wait(self) -> None:
        """Return when it was stopped; raise ProcessDiedError when it dies."""

    async def report(self) -> ProcessReport:
        """Ask it to describe itself."""

    def end(self) -> str | None:
        """Say why it has ended; None while it lives, or if only Ray can know."""

    async def update_membership(self, membership: Membership) -> None:
        """Tell it who serves. Older versions than the last one are ignored."""

    async def drain(self) -> None:
        """Give it no new work."""

    async def stop(self) -> None:
        """Let it end by itself. The caller kills what does not."""

    async def kill(self) -> None:
        """End it whatever it does, stopped by a signal or not."""


class Remembered(NamedTuple):
    """What a controller leaves to the one that replaces it."""

    wanted: Mapping[Role, int]
    router_ports: Mapping[str, int]
    """By worker id: clients know them, so a replacement listens there again."""


class Capacity(NamedTuple):
    """What the cluster has."""

    resources: Mapping[str, float]
    """Ray's totals, such as {CPU: 2, GPU: 0}."""
    num_nodes: int
    memory_total_bytes: int
    memory_available_bytes: int
    """Of the controller's machine."""


class Launcher(Protocol):
    """Starts processes, and finds those that an earlier controller started."""

    async def launch(self, name: ProcessName, router_port: int) -> Process:
        """Begin to start a process. A router takes the port if it is free; 0: it had none yet."""

    async def adopt(self) -> Sequence[Process]:
        """Find every process of the deployment that lives."""

    async def problem(self) -> str:
        """Say why no process can be started now; empty when all is well."""

    async def capacity(self) -> Capacity:
        """Say what the cluster has."""

    async def save(self, remembered: Remembered) -> None:
        """Remember it for a controller that replaces this one."""

    async def first_number(self) -> int:
        """Return a number above all that controllers before this one can have given.

        Whatever the clock says, so that no process takes a membership for an old one because the
        clock was set back.
        """

    async def load(self) -> Remembered | None:
        """Return what a controller before this one has saved; None if there was none."""
