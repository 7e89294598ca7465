"""One dispatch of a request's work to a pair of workers, as a state machine. Pure."""

from dataclasses import dataclass, field
from enum import Enum, auto

from paceline.errors import IntegrityError
from paceline.request import AttemptKey
from paceline.router.setbacks import Setbacks


class AttemptState(Enum):
    """Where a dispatch is in its life."""

    SENT = auto()
    """Admit, and Prefill if there is a prefill worker, are on their way."""
    ADMITTED = auto()
    """The decode worker promised its blocks; the prompt is being computed and moved."""
    DECODING = auto()
    """The decode worker has sent a token: the prefill worker is no longer needed."""
    ENDED = auto()
    """No choice of it runs any more; its messages are dropped."""


class AttemptEvent(Enum):
    """What can happen to a dispatch."""

    ADMISSION = auto()
    """The decode worker took it."""
    DECODE_TOKEN = auto()
    """A token came from the decode worker."""
    LAST_CHOICE_GONE = auto()
    """Every choice has finished, failed or been cancelled."""


TRANSITIONS: dict[tuple[AttemptState, AttemptEvent], AttemptState] = {
    (AttemptState.SENT, AttemptEvent.ADMISSION): AttemptState.ADMITTED,
    # A refusal, a failure, a cancel, or a first token that is the last one (from the prefill
    # worker).
    (AttemptState.SENT, AttemptEvent.LAST_CHOICE_GONE): AttemptState.ENDED,
    (AttemptState.ADMITTED, AttemptEvent.DECODE_TOKEN): AttemptState.DECODING,
    (AttemptState.ADMITTED, AttemptEvent.LAST_CHOICE_GONE): AttemptState.ENDED,
    (AttemptState.DECODING, AttemptEvent.LAST_CHOICE_GONE): AttemptState.ENDED,
}
"""Every legal move; anything else is a bug, of ours or of a worker."""


@dataclass(slots=True, eq=False)
class Attempt:
    """A dispatch that may still bring tokens."""

    key: AttemptKey
    prefill_id: str | None
    """The prefill worker; None: the decode worker computes the prompt."""
    decode_id: str
    streams: dict[int, int]
    """choice -> stream id, of choices that still run"""
    state: AttemptState = field(default=AttemptState.SENT)
    sent_s: float = 0.0
    first_own_index: int = 0
    """Output index of the first token that the decode worker computes itself. Before it comes only
    the prefill worker's token, repeated."""
    setbacks: Setbacks = field(default_factory=Setbacks)
    """Since the last new token of a decode worker."""
    has_own_token: bool = False
    """Whether the decode worker has given a token of its own."""

    def move(self, event: AttemptEvent) -> None:
        """Change the state; raises IntegrityError for a move that is not in the table."""
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            raise IntegrityError(
                f"attempt {self.key.attempt} of {self.key.request_id} is {self.state.name} and "
                f"cannot take the event {event.name}"
            )
        self.state = state

    def decode_token(self, index: int) -> None:
        """Note the index of a token of the decode worker, until one is its own."""
        if self.state is not AttemptState.DECODING:
            self.move(AttemptEvent.DECODE_TOKEN)
        if index >= self.first_own_index:
            self.has_own_token = True
            self.setbacks = Setbacks()

    @property
    def route(self) -> tuple[str, ...]:
        """The workers that it was sent to."""
        if self.prefill_id is None:
            return (self.decode_id,)
        return (self.prefill_id, self.decode_id)

    def workers(self) -> tuple[str, ...]:
        """Workers without which the attempt cannot go on."""
        if self.prefill_id is not None and self.state is not AttemptState.DECODING:
            return (self.decode_id, self.prefill_id)
        return (self.decode_id,)
