"""One prompt on a prefill worker: its blocks and slots, and how far it has come."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from paceline.engine.chunking import ChunkTime, PrefillProgress
from paceline.engine.prefix_cache import ChainPosition
from paceline.engine.step_plan import Int32Array
from paceline.engine.stop_conditions import StopConditions
from paceline.errors import IntegrityError
from paceline.request import Work, num_blocks_for

SessionT = TypeVar("SessionT")


class PromptState(Enum):
    """COMPUTING → COMPLETE | CANCELLED, once."""

    COMPUTING = "computing"
    COMPLETE = "complete"
    """The first tokens are there; the blocks wait for their release by the caller."""
    CANCELLED = "cancelled"
    """Nobody wants it; blocks and slots are freed when no step in flight uses them."""


MOVES = {
    PromptState.COMPUTING: {PromptState.COMPLETE, PromptState.CANCELLED},
    PromptState.COMPLETE: set[PromptState](),
    PromptState.CANCELLED: set[PromptState](),
}


@dataclass(slots=True, eq=False)
class Prompt(PrefillProgress, Generic[SessionT]):
    """Owned by the scheduler. `num_planned` runs ahead of `num_final` by the steps in flight."""

    work: Work
    session: SessionT
    context: Int32Array
    """Prompt and output so far; what is computed, never what is sampled from."""
    block_ids: list[int]
    """All blocks of the context, cached ones first."""
    slots: list[int]
    """One a choice: the first computes, each samples. Empty once they are given back."""
    stop_conditions: StopConditions
    num_final: int
    """Tokens whose KV is final: cached ones and those of applied steps."""
    chain: ChainPosition
    """Position in the prefix cache after the full blocks among the final tokens."""
    state: PromptState = PromptState.COMPUTING
    cancelled_choices: set[int] = field(default_factory=set)
    is_started: bool = False
    """Whether a step has put it into its slots."""
    num_steps_in_flight: int = 0
    chunk_times: list[ChunkTime] = field(default_factory=list)

    def move_to(self, state: PromptState) -> None:
        if state not in MOVES[self.state]:
            raise IntegrityError(
                f"prompt {self.work.key} is {self.state.value} and cannot become {state.value}"
            )
        self.state = state

    def check_integrity(self, block_tokens: int) -> None:
        if not self.num_final <= self.num_planned <= self.num_tokens:
            raise IntegrityError(
                f"prompt {self.work.key} has {self.num_final} final, {self.num_planned} planned "
                f"and {self.num_tokens} tokens"
            )
        if len(self.block_ids) != num_blocks_for(self.num_tokens, block_tokens):
            raise IntegrityError(
                f"prompt {self.work.key} has {len(self.block_ids)} blocks of {block_tokens} "
                f"for {self.num_tokens} tokens"
            )
        if (self.num_planned > self.num_final) != (self.num_steps_in_flight > 0):
            raise IntegrityError(
                f"prompt {self.work.key} has {self.num_steps_in_flight} steps in flight for "
                f"{self.num_planned - self.num_final} tokens"
            )
