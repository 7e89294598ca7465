"""The next step: rows of all running sequences, chunks of prompts, and the blocks that they need.

Decode rows are array operations over the batch. Python looks only at sequences that start, that copy a
shared block, or that need a block.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from paceline.decode_worker.admission import Limits
from paceline.decode_worker.attempts import Attempt, AttemptState, Sequence, SequenceState
from paceline.decode_worker.batch import Rows
from paceline.decode_worker.preemption import choose_victim
from paceline.decode_worker.roster import Roster
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.chunking import plan_chunks
from paceline.engine.step_plan import Int32Array, SlotStart, StepPlan
from paceline.engine.step_plan_builder import StepPlanBuilder
from paceline.request import FailureReason


class PlannedChunk(NamedTuple):
    """A chunk of a prompt that is computed here."""

    attempt: Attempt
    end: int
    """Tokens of the context whose KV is final once the step has been applied."""


@dataclass(frozen=True, slots=True, eq=False)
class UnappliedStep:
    """What is needed to take the step's result. Element i of each array belongs to sample i."""

    step_id: int
    batch_version: int | None
    """Version of the batch whose rows are the samples, in order; None: they are only some of them."""
    sample_slots: Int32Array
    sample_indices: Int32Array
    token_positions: Int32Array
    """Position of the sampled token in its sequence."""
    chunks: tuple[PlannedChunk, ...]


class StepPlanner:
    """Plans one step at a time; owns nothing but the lists of who starts next."""

    def __init__(self, allocator: BlockAllocator, limits: Limits, roster: Roster) -> None:
        self._allocator = allocator
        self._limits = limits
        self._roster = roster
        self._imported: list[Attempt] = []
        self._prompts: list[Attempt] = []
        self._forked: list[Sequence] = []
        """Sequences that have not written yet, and share a partial last block perhaps."""

    @property
    def num_pending_tokens(self) -> int:
        """Prompt tokens that wait to be computed here."""
        return sum(
            attempt.num_unplanned
            for attempt in self._prompts
            if attempt.state is AttemptState.PREFILLING
        )

    def take_imported(self, attempt: Attempt) -> None:
        """Start the waiting sequences of an attempt whose context is in its blocks."""
        self._imported.append(attempt)

    def take_prompt(self, attempt: Attempt) -> None:
        """Compute an attempt's context."""
        self._prompts.append(attempt)

    def plan(self, now: float) -> tuple[StepPlan, UnappliedStep] | None:
        """Plan the next step, preempting where running sequences cannot grow otherwise."""
        roster, batch = self._roster, self._roster.batch
        builder = StepPlanBuilder(roster.last_planned_step + 1)
        if self._imported:
            self._start_imported(builder, now)
        if self._forked:
            self._copy_shared_blocks(builder)
        stalled = self._grow(builder, now)
        positions = self._add_decode_rows(builder, stalled)
        covers_batch = builder.num_samples == batch.num_rows
        version = batch.version if covers_batch and not batch.num_given else None
        if batch.num_given:
            positions += self._add_given_rows(builder)
        chunks: tuple[PlannedChunk, ...] = ()
        if self._prompts:
            version = None
            chunks = self._add_chunks(builder, positions, now)
        if not builder.has_rows:
            # Slots that were started are started again: nothing of this plan reaches the runner.
            return None
        plan = builder.build()
        roster.last_planned_step = plan.step_id
        joined = positions[0] if len(positions) == 1 else np.concatenate(positions)
        return plan, UnappliedStep(
            plan.step_id, version, plan.sample_slots, plan.sample_indices, joined, chunks
        )
