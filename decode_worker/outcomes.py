"""What the decode scheduler answers."""

from dataclasses import dataclass, field
from typing import NamedTuple

from paceline.engine.chunking import ChunkTime
from paceline.request import AttemptKey, FailureReason
from paceline.worker.step_output import StepOutput


class Admitted(NamedTuple):
    """The worker runs this work: it has the context's blocks, and growth blocks are promised."""

    block_ids: tuple[int, ...]
    """All blocks of the context, cached ones first."""
    num_cached_tokens: int
    """Tokens from the front whose KV is here already: a multiple of block_tokens."""


class Refused(NamedTuple):
    """The worker has forgotten this work already."""

    reason: FailureReason
    """REFUSED or DRAINING."""
    message: str


class SequenceFailure(NamedTuple):
    """Choices that go back to their router unfinished."""

    session: int
    stream_ids: tuple[int, ...]
    reason: FailureReason
    message: str


class PrefilledAttempt(NamedTuple):
    """An attempt whose context was computed here; its first tokens are in the same output."""

    key: AttemptKey
    session: int
    chunk_times: tuple[ChunkTime, ...]


class EndedAttempt(NamedTuple):
    """An attempt of which nothing more will be reported; its blocks may follow later."""

    key: AttemptKey
    session: int
    admitted_s: float
    running_s: float | None
    """When its first decode row was planned, or its prefill here had ended; None: never."""
    ended_s: float
    num_output_tokens: int
    """Tokens reported for it, over all choices."""


@dataclass(frozen=True, slots=True, eq=False)
class DecodeStep:
    """What may leave the worker."""

    outputs: dict[int, StepOutput] = field(default_factory=dict)
    """By session."""
    prefilled: tuple[PrefilledAttempt, ...] = ()
    failures: tuple[SequenceFailure, ...] = ()
    abandoned_imports: tuple[AttemptKey, ...] = ()
    """Imports nobody wants any more: stop their reads, then call `import_ended`."""
    ended: tuple[EndedAttempt, ...] = ()

    def __bool__(self) -> bool:
        return bool(
            self.outputs or self.prefilled or self.failures or self.abandoned_imports or self.ended
        )
