"""One import: the reads of one attempt's KV into blocks of this worker, from subscription to
verdict.

    SUBSCRIBED ── all reads ended ──> CONFIRMING ── held ──> HELD
        │                                │
        └──────────────┬─────────────────┘
          lost, released, owner gone ──> LOST

The destination blocks may be written until `import_ended` has been called: after HELD at once
(every read has ended), after LOST as soon as no read runs. Pure: time-free, no gRPC, no threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from paceline.errors import IntegrityError, TransferError
from paceline.kv_transfer.lease import FirstToken
from paceline.kv_transfer.read_plan import ReadPlan
from paceline.kv_transfer.transport import ReadOutcome, ReadState
from paceline.request import AttemptKey, Span


class ImportState(Enum):
    SUBSCRIBED = "subscribed"
    CONFIRMING = "confirming"
    HELD = "held"
    LOST = "lost"


TRANSITIONS = {
    ImportState.SUBSCRIBED: {ImportState.CONFIRMING, ImportState.LOST},
    ImportState.CONFIRMING: {ImportState.HELD, ImportState.LOST},
    ImportState.HELD: set(),
    ImportState.LOST: set(),
}


class ImportListener(Protocol):
    """Hears how an import goes. Calls come in this order: progressed*, imported, confirmed | lost,
    ended.
    """

    def import_progressed(self, key: AttemptKey) -> None:
        """More of the context has become readable: prefill is alive."""

    def imported(self, key: AttemptKey, first_tokens: Sequence[FirstToken]) -> None:
        """All reads have ended well; decode may begin, but nothing may leave the worker yet."""

    def confirmed(self, key: AttemptKey, spans: list[Span], num_bytes: int) -> None:
        """HELD: what was read is right."""

    def lost(self, key: AttemptKey, reason: str) -> None:
        """What was read is garbage. Not called after `abandon`."""

    def import_ended(self, key: AttemptKey) -> None:
        """Nothing writes to the destination blocks any more. Always the last call, always made."""


class Read(NamedTuple):
    """A read that may start now."""

    sources: list[int]
    targets: list[int]


@dataclass(frozen=True, slots=True)
class LeaseNews:
    """A LeaseUpdate, decoded."""

    lease_id: int
    block_ids: list[int]
    num_tokens: int
    first_tokens: tuple[FirstToken, ...]
    """Empty until the lease is complete."""


class KvImport:
    """The state of one import. Io loop only."""

    def __init__(
        self,
        key: AttemptKey,
        plan: ReadPlan,
        listener: ImportListener,
        *,
        reader_id: str,
        block_tokens: int,
    ) -> None:
        self.key = key
        self.state = ImportState.SUBSCRIBED
        self.lease_id: int | None = None
        self._plan = plan
        self._listener = listener
        self._reader_id = reader_id
        self._block_tokens = block_tokens
        self._num_running_reads = 0
        self._first_tokens: tuple[FirstToken, ...] = ()
        self._abandoned = False
        self._spans: list[Span] = []
        self._num_bytes = 0

    def take_news(self, news: LeaseNews) -> Read | None:
        """Learn what has become readable; returns the read to start, if any."""
        if self.state is not ImportState.SUBSCRIBED:
            return None
        if self.lease_id not in (None, news.lease_id):
            raise IntegrityError(f"{self.key} has lease {self.lease_id} and now {news.lease_id}")
        self.lease_id = news.lease_id
        self._first_tokens = news.first_tokens
        self._listener.import_progressed(self.key)
        try:
            pairs = self._plan.update(
                news.block_ids, news.num_tokens, complete=bool(news.first_tokens)
            )
        except TransferError as error:
            self.lose(str(error))
            return None
        if not pairs:
            self._finish_if_all_read()
            return None
        self._num_running_reads += 1
        return Read([source for source, _ in pairs], [target for _, target in pairs])

    def read_ended(self, read: Read, outcome: ReadOutcome) -> None:
        """Take the end of a read that `take_news` asked for."""
        self._num_running_reads -= 1
        self._spans.append(
            Span(
                "kv_transfer",
                self._reader_id,
                outcome.started_s,
                outcome.ended_s,
                len(read.sources) * self._block_tokens,
            )
        )
        self._num_bytes += outcome.num_bytes
        if self.has_ended:
            self._end_if_quiet()
        elif outcome.state is not ReadState.DONE:
            self.lose(f"a read of {len(read.sources)} blocks failed: {outcome.error}")
        else:
            self._plan.read_ended()
            self._finish_if_all_read()

    def take_verdict(self, held: bool) -> None:
        """Take the owner's decision."""
        if self.state is not ImportState.CONFIRMING:
            return
        if not held:
            self.lose("the owner no longer held the lease when the reads had ended")
            return
        self._move(ImportState.HELD)
        if not self._abandoned:
            self._listener.confirmed(self.key, self._spans, self._num_bytes)
        self._listener.import_ended(self.key)

    def lose(self, reason: str) -> None:
        """Give up: revoked, failed, or the owner is gone."""
        if self.has_ended:
            return
        self._move(ImportState.LOST)
        if not self._abandoned:
            self._listener.lost(self.key, reason)
        self._end_if_quiet()

    def abandon(self) -> None:
        """The engine thread has no use for it any more; it wants to hear `import_ended` only."""
        self._abandoned = True
        self.lose("abandoned")

    @property
    def has_ended(self) -> bool:
        """Whether the outcome is known; reads may still run."""
        return self.state in (ImportState.HELD, ImportState.LOST)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing will happen any more."""
        return self.has_ended and self._num_running_reads == 0

    def _finish_if_all_read(self) -> None:
        if self._first_tokens and self._plan.all_read:
            self._move(ImportState.CONFIRMING)
            self._listener.imported(self.key, self._first_tokens)

    def _end_if_quiet(self) -> None:
        if self.state is ImportState.LOST and self._num_running_reads == 0:
            self._listener.import_ended(self.key)

    def _move(self, state: ImportState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise IntegrityError(f"{self.key}: an import cannot go from {self.state} to {state}")
        self.state = state
