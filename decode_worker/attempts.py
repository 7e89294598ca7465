"""One attempt on a decode worker, and the sequences of its choices."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from paceline.engine.chunking import ChunkTime, PrefillProgress
from paceline.engine.prefix_cache import ChainPosition
from paceline.engine.step_plan import Int32Array
from paceline.engine.stop_conditions import StopConditions
from paceline.errors import IntegrityError
from paceline.request import FinishReason, TopLogprobs, Work


class AttemptState(Enum):
    """What an attempt waits for.

    IMPORTING ──reads ended──> UNCONFIRMED ──held──> RUNNING ──> ENDED
        │                          │                   ↑
        │                          └──> ENDED      PREFILLING ──> ENDED
        └──given up──> DRAINING_IMPORT ──nothing writes any more──> ENDED
    """

    IMPORTING = "importing"
    """Reads write into its blocks; nothing has been computed here."""
    UNCONFIRMED = "unconfirmed"
    """It may run, but nothing that depends on the reads leaves the worker or enters the cache."""
    PREFILLING = "prefilling"
    """Its context is computed here, in chunks."""
    RUNNING = "running"
    """What it computes is right and is reported. Its last chunk may still be in flight."""
    DRAINING_IMPORT = "draining_import"
    """Nobody wants it, but a read may still write: its blocks belong to nobody else yet."""
    ENDED = "ended"
    """Nothing more is reported. Steps in flight may still use its blocks: see `departures`."""


ATTEMPT_MOVES = {
    AttemptState.IMPORTING: {
        AttemptState.UNCONFIRMED,
        AttemptState.DRAINING_IMPORT,
        AttemptState.ENDED,
    },
    AttemptState.UNCONFIRMED: {AttemptState.RUNNING, AttemptState.ENDED},
    AttemptState.PREFILLING: {AttemptState.RUNNING, AttemptState.ENDED},
    AttemptState.RUNNING: {AttemptState.ENDED},
    AttemptState.DRAINING_IMPORT: {AttemptState.ENDED},
    AttemptState.ENDED: set[AttemptState](),
}


class SequenceState(Enum):
    """WAITING → RUNNING → FINISHED → GONE; any may be skipped, none comes back."""

    WAITING = "waiting"
    """It has a slot; the blocks belong to the attempt."""
    RUNNING = "running"
    """It has a row in the batch and blocks of its own."""
    FINISHED = "finished"
    """Its last token is known; of an unconfirmed attempt it is not reported yet."""
    GONE = "gone"
    """Given up: cancelled, failed or preempted."""


SEQUENCE_MOVES = {
    SequenceState.WAITING: {SequenceState.RUNNING, SequenceState.FINISHED, SequenceState.GONE},
    SequenceState.RUNNING: {SequenceState.FINISHED, SequenceState.GONE},
    SequenceState.FINISHED: {SequenceState.GONE},
    SequenceState.GONE: set[SequenceState](),
}


@dataclass(frozen=True, slots=True)
class OutputToken:
    """A token that is reported outside of the columns of a step."""

    stream_id: int
    index: int
    token_id: int
    finish_reason: FinishReason | None
    logprobs: TopLogprobs | None


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of an attempt."""

    attempt: "Attempt"
    choice: int
    stream_id: int
    slot: int
    state: SequenceState = SequenceState.WAITING
    is_started: bool = False
    """Whether a step has put it into its slot."""
    first_token: int | None = None
    """What prefill sampled, set when the import has ended; None: it is sampled here."""
    num_copies_promised: int = 0
    """1 from the fork until the partial last block has been copied, or need not be."""

    def move_to(self, state: SequenceState) -> None:
        if state not in SEQUENCE_MOVES[self.state]:
            raise IntegrityError(
                f"choice {self.choice} of {self.attempt.work.key} is {self.state.value} and cannot "
                f"become {state.value}"
            )
        self.state = state

    @property
    def is_open(self) -> bool:
        """Whether its router still waits for tokens or for its end."""
        if self.state is SequenceState.FINISHED:
            return self.attempt.state is AttemptState.UNCONFIRMED
        return self.state is not SequenceState.GONE


@dataclass(slots=True, eq=False)
class Attempt(PrefillProgress):
    """Owned by the scheduler."""

    work: Work
    session: int
    context: Int32Array
    """Prompt and output so far."""
    context_block_ids: tuple[int, ...]
    """Blocks of the context at admission. A partial last one may be copied by sequences later."""
    stop_conditions: StopConditions
    chain: ChainPosition
    """Position in the prefix cache after `num_cached_blocks`."""
    num_cached_blocks: int
    """Blocks of the context, from the front, that the prefix cache has seen."""
    state: AttemptState
    renewed_s: float
    """When its prefill was last seen to progress."""
    number: int = 0
    """Counts admissions: its age among the attempts here. Set by the roster."""
    sequences: tuple[Sequence, ...] = ()
    owns_blocks: bool = True
    """Whether the references to `context_block_ids` are the attempt's own: until it forks."""
    num_promised: int = 0
    """Blocks promised to sequences that wait."""
    reads_ended: bool = False
    held_back: list[OutputToken] = field(default_factory=list)
    """Output of an unconfirmed attempt, in order."""
    chunk_times: list[ChunkTime] = field(default_factory=list)
    """Of a context that is computed here."""
    running_s: float | None = None
    num_output_tokens: int = 0

    def move_to(self, state: AttemptState) -> None:
        if state not in ATTEMPT_MOVES[self.state]:
            raise IntegrityError(
                f"attempt {self.work.key} is {self.state.value} and cannot become {state.value}"
            )
        self.state = state

    @property
    def last_index(self) -> int:
        """Output index at which every choice ends at the latest."""
        return self.stop_conditions.max_output_tokens - 1

    @property
    def holds_blocks(self) -> bool:
        """Whether a sequence waits or runs, so that preempting it gives blocks."""
        has_them = (SequenceState.WAITING, SequenceState.RUNNING)
        return any(sequence.state in has_them for sequence in self.sequences)

    def in_state(self, state: SequenceState) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.state is state]

    def open_sequences(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.is_open]

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.sequences)
