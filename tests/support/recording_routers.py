"""What a worker's core tells its routers, written down in order."""

from dataclasses import dataclass, field

from paceline.request import AttemptKey, FailureReason, Span
from paceline.worker.step_output import StepOutput


@dataclass
class RecordingRouters:
    """Implements `paceline.worker.core.RouterPort`."""

    calls: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def send_admission(
        self, session: int, key: AttemptKey, *, admitted: bool, message: str, cached_tokens: int
    ) -> None:
        self.calls.append("admission" if admitted else "refusal")

    def send_output(self, session: int, output: StepOutput) -> None:
        self.calls.append("output")

    def send_failure(
        self, session: int, stream_ids: tuple[int, ...], reason: FailureReason, message: str
    ) -> None:
        self.calls.append("failure")

    def send_phase(
        self, session: int, key: AttemptKey, spans: list[Span], kv_bytes: int, transport: str
    ) -> None:
        self.calls.append(f"phase {spans[0].phase}")
        self.spans += spans
