"""What a kind of worker does in its engine thread; what is around it is the same for both kinds."""

from typing import NamedTuple, Protocol

from paceline.engine.step_plan import StepPlan, StepResult
from paceline.request import AttemptKey, FailureReason, Span, Work
from paceline.worker.step_output import StepOutput


class Peer(NamedTuple):
    """One incarnation of another worker."""

    worker_id: str
    incarnation: int
    address: str

    @property
    def name(self) -> str:
        """Names the incarnation; never reused."""
        return f"{self.worker_id}.{self.incarnation}"


class LoadReport(NamedTuple):
    """What the worker can still take; see `Load` in worker.proto."""

    credit_blocks: int
    credit_sequences: int
    num_running: int
    num_pending_tokens: int
    num_free_blocks: int
    draining: bool
    prefill_tokens_per_s: int = 0


class RouterPort(Protocol):
    """Where a core's answers go: to the routers, by session. Called on the engine thread."""

    def send_admission(
        self, session: int, key: AttemptKey, *, admitted: bool, message: str, cached_tokens: int
    ) -> None:
        """Answer a dispatch."""

    def send_output(self, session: int, output: StepOutput) -> None:
        """Send new tokens, in one message a step and session."""

    def send_failure(
        self, session: int, stream_ids: tuple[int, ...], reason: FailureReason, message: str
    ) -> None:
        """Give choices back unfinished."""

    def send_phase(
        self, session: int, key: AttemptKey, spans: list[Span], kv_bytes: int, transport: str
    ) -> None:
        """Report where an attempt's time went."""


class Core(Protocol):
    """The engine thread's half of a worker: scheduler, allocator and leases, never a clock or a
    wait.
    """

    def dispatch(self, session: int, work: Work, peer: Peer | None, now: float) -> None:
        """Take or refuse work; answers by `send_admission`."""

    def cancel(self, session: int, key: AttemptKey, choices: tuple[int, ...], now: float) -> None:
        """End an attempt, or some of its choices; unknown ones have ended already."""

    def end_session(self, session: int, now: float) -> None:
        """The router of a session is gone: end all its work."""

    def drain(self, now: float) -> None:
        """Take no new work from now on."""

    def tick(self, now: float) -> None:
        """Let deadlines pass. Called before every plan, and at least every heartbeat."""

    def plan(self, now: float) -> StepPlan | None:
        """Plan the next step, with at most one step launched and not applied."""

    def apply(self, result: StepResult, now: float) -> None:
        """Take the result of the oldest step that was launched and not applied."""

    def load(self) -> LoadReport:
        """Say what all routers together may send now."""

    @property
    def is_idle(self) -> bool:
        """Whether no request holds anything here."""

    def check_integrity(self) -> None:
        """Raise IntegrityError, with the numbers that disagree, if an invariant does not hold."""
