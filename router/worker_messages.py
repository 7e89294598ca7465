"""What goes between the dispatcher and the workers."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from paceline.request import AttemptKey, FinishReason, Work
from paceline.router.journal import Logprobs
from paceline.router.worker_view import WorkerMember


class TokenColumns(NamedTuple):
    """New tokens of one step: element i of the first three belongs to token i."""

    stream_ids: Sequence[int]
    indices: Sequence[int]
    token_ids: Sequence[int]
    finished: Sequence[tuple[int, FinishReason]] = ()
    """(stream id, why) of choices that ended with their last token here."""
    logprobs: dict[int, Logprobs] | None = None
    """By position in the columns."""
    lag_s: float = 0.0
    """How long they have waited for this router."""


class WorkerClaim(NamedTuple):
    """What the router's next work needs at a worker."""

    num_blocks: int
    num_sequences: int
    """0: nothing waits any more."""
    waited_s: float
    holds: bool
    """Whether the worker keeps room free until the work fits."""


class WorkerCommands(Protocol):
    """What the dispatcher tells workers; nothing here may call back into it."""

    def prefill(self, worker_id: str, work: Work, reader: WorkerMember) -> None:
        """Have a prefill worker compute work and lease its KV to `reader`."""

    def admit(self, worker_id: str, work: Work, source: WorkerMember | None) -> None:
        """Have a decode worker run work, from KV leased by `source` or from its own prefill."""

    def cancel(self, worker_id: str, key: AttemptKey, choices: tuple[int, ...]) -> None:
        """Have a worker give up choices of an attempt; all of them if `choices` is empty."""

    def claim(self, worker_id: str, claim: WorkerClaim) -> None:
        """Claim room; replaces the claim before it, and ends with the next work sent there."""
