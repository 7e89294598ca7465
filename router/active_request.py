"""A request between its arrival and its end: journal, attempts, and what it has been through.
Pure."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from paceline.errors import PacelineError
from paceline.request import AttemptKey, PhaseTimes, Span
from paceline.router.attempt import Attempt
from paceline.router.journal import RequestJournal
from paceline.router.setbacks import Setbacks

MAX_SPANS = 1024
"""More than the chunks and reads of the longest prompts, and less than 200 kB."""


def _nobody() -> None:
    pass


@dataclass(slots=True, eq=False)
class WaitingWork:
    """Choices of a request that wait for a pair of workers."""

    request: "ActiveRequest"
    choices: tuple[int, ...]
    setbacks: Setbacks = field(default_factory=Setbacks)
    preempted: bool = False
    is_resumption: bool = False
    """Whether its dispatch counts as going on elsewhere: it ran before and was not merely
    refused."""


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """State of one request; changed by the Dispatcher only."""

    request_id: str
    """The client's name for it."""
    wire_id: str
    """Its name at the workers: unique over all routers and their incarnations."""
    journal: RequestJournal
    arrived_s: float
    """Seconds by the router's clock, as all times here but those of `spans`."""
    max_tokens_is_default: bool = False
    """Whether its first dispatch may lower max_tokens to what the workers' pools can hold."""
    deadline_s: float = math.inf
    """When its client no longer wants an answer."""
    listener: Callable[[], None] = field(default=_nobody)
    """Called when there is output to take, or the request has ended."""

    error: PacelineError | None = field(default=None, init=False)
    """Why it ended before its last token."""
    attempts: dict[AttemptKey, Attempt] = field(default_factory=dict, init=False)
    waiting: dict[WaitingWork, None] = field(default_factory=dict, init=False)
    """A set in order of arrival."""
    num_attempts: int = field(default=0, init=False)
    prompt_attempt: int = field(default=0, init=False)
    """Number of the attempt that gives, or gave, the first token."""
    prompt_computed_s: float | None = field(default=None, init=False)
    """How long that attempt's worker computed the prompt; None: it has not said so."""
    num_resumed: int = field(default=0, init=False)
    cached_tokens: int | None = field(default=None, init=False)
    """As the first worker to compute its prompt said."""
    tokens_until_first: int = 0
    """Tokens that the first worker to compute its prompt had to compute until its end."""
    first_dispatch_s: float | None = field(default=None, init=False)
    first_token_lag_s: float = field(default=0.0, init=False)
    """How long the first token waited for this router."""
    first_token_s: float | None = field(default=None, init=False)
    last_token_s: float | None = field(default=None, init=False)
    ended_s: float | None = field(default=None, init=False)
    spans: deque[Span] = field(default_factory=lambda: deque(maxlen=MAX_SPANS), init=False)
    """As workers reported them, Unix seconds by their clocks."""
    kv_transfer_s: float = field(default=0.0, init=False)
    """Of all spans, also of those that are not kept."""

    @property
    def is_done(self) -> bool:
        return self.ended_s is not None

    def dispatched(self, now: float) -> None:
        """Count an attempt. Until there is a first token, the newest attempt is to give it."""
        self.num_attempts += 1
        if self.first_dispatch_s is None:
            self.first_dispatch_s = now
        if self.first_token_s is None:
            self.prompt_attempt = self.num_attempts
            self.prompt_computed_s = None

    def add_spans(self, attempt: int, spans: Sequence[Span]) -> None:
        """Take what a worker reported of an attempt. Of very many spans the newest are kept."""
        self.kv_transfer_s += sum(s.end_s - s.start_s for s in spans if s.phase == "kv_transfer")
        self.spans.extend(spans)
        chunks = [span for span in spans if span.phase == "prefill"]
        if chunks and attempt == self.prompt_attempt:
            start_s = min(chunk.start_s for chunk in chunks)
            self.prompt_computed_s = max(chunk.end_s for chunk in chunks) - start_s

    @property
    def last_setback(self) -> str:
        """Why a part of it has had no new token yet; empty where nothing went wrong."""
        parts: list[WaitingWork | Attempt] = [*self.waiting, *self.attempts.values()]
        return next((part.setbacks.last for part in parts if part.setbacks.last), "")

    def phase_times(self) -> PhaseTimes:
        """Say where its time went, as far as it has come.

        Only durations by one clock each are used: those of hosts may differ by more than a phase.
        """
        dispatched, first, last = self.first_dispatch_s, self.first_token_s, self.last_token_s
        queue_end = dispatched if dispatched is not None else self.ended_s
        until_first_s = 0.0 if first is None or dispatched is None else first - dispatched
        router_s = min(self.first_token_lag_s, until_first_s)
        until_first_s -= router_s
        computed_s = until_first_s if self.prompt_computed_s is None else self.prompt_computed_s
        prefill_s = min(max(computed_s, 0.0), until_first_s)
        return PhaseTimes(
            queue_s=0.0 if queue_end is None else queue_end - self.arrived_s,
            wait_s=until_first_s - prefill_s,
            prefill_s=prefill_s,
            kv_transfer_s=self.kv_transfer_s,
            router_s=router_s,
            decode_s=0.0 if first is None or last is None else last - first,
        )
