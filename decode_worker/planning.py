"""The next step: rows of all running sequences, chunks of prompts, and the blocks that they need.

Decode rows are array operations over the batch. Python looks only at sequences that start, that
copy a shared block, or that need a block.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from paceline.decode_worker.admission import Limits
from paceline.decode_worker.attempts import Attempt, AttemptState, Sequence, SequenceState
from paceline.decode_worker.batch import Rows
from paceline.decode_worker.departures import BlocksComing, Departure
from paceline.decode_worker.preemption import choose_victim
from paceline.decode_worker.roster import Roster
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.step_plan import EMPTY, Int32Array, SlotStart, StepPlan
from paceline.engine.step_plan_builder import StepPlanBuilder
from paceline.request import FailureReason


class PlannedChunk(NamedTuple):
    """A chunk of a prompt that is computed here."""

    attempt: Attempt
    num_tokens: int
    planned_s: float
    end: int
    """Tokens of the context whose KV is final once the step has been applied."""


@dataclass(frozen=True, slots=True, eq=False)
class UnappliedStep:
    """What is needed to take the step's result. Element i of each array belongs to sample i."""

    step_id: int
    batch_version: int | None
    """Version of the batch whose rows are the samples, in order; None: they are not."""
    sample_slots: Int32Array
    sample_indices: Int32Array
    token_positions: Int32Array
    """Position of the sampled token in its sequence."""
    chunks: tuple[PlannedChunk, ...]


class _Growth(NamedTuple):
    """Blocks for rows at their capacity: element i of the arrays belongs to one block."""

    stalled: Rows
    """Rows for which there is no block in this step."""
    slots: Int32Array
    columns: Int32Array
    block_ids: Int32Array


class _DecodeRows(NamedTuple):
    """Rows of one token, the slot's last sample."""

    slots: Int32Array
    starts: Int32Array
    indices: Int32Array
    """Output index of the token that each samples."""


class StepPlanner:
    """Plans one step at a time; owns nothing but the lists of who starts next."""

    def __init__(self, allocator: BlockAllocator, limits: Limits, roster: Roster) -> None:
        self._allocator = allocator
        self._limits = limits
        self._roster = roster
        self._imported: list[Attempt] = []
        self._forked: list[Sequence] = []
        """Sequences that have not written yet, and share a partial last block perhaps."""
        self._numbers = np.arange(limits.max_num_seqs, dtype=np.int32)
        self._ones = np.ones(limits.max_num_seqs, dtype=np.int32)
        self._trues = np.ones(limits.max_num_seqs, dtype=np.bool_)

    def take_imported(self, attempt: Attempt) -> None:
        """Start the waiting sequences of an attempt whose context is in its blocks."""
        self._imported.append(attempt)

    def plan(self, now: float) -> tuple[StepPlan, UnappliedStep] | None:
        """Plan the next step, preempting where running sequences cannot grow otherwise."""
        rows = self._make_room(now)
        if self._imported or self._forked or len(self._roster.prompts):
            planned = self._plan_changes(now)
        else:
            planned = self._plan_decode(rows)
        if planned is not None:
            self._roster.last_planned_step = planned[0].step_id
        return planned

    def _plan_decode(self, at_capacity: Rows) -> tuple[StepPlan, UnappliedStep] | None:
        """Plan the usual step: nobody starts, all go on from their last sample."""
        growth = self._grow(at_capacity)
        decode = self._decode_rows(growth.stalled)
        size = len(decode.slots)
        if not size:
            return None
        plan = StepPlan(
            step_id=self._roster.last_planned_step + 1,
            slots=decode.slots,
            starts=decode.starts,
            num_new_tokens=self._ones[:size],
            from_last_sample=self._trues[:size],
            tokens=EMPTY,
            sample_positions=self._numbers[:size],
            sample_slots=decode.slots,
            sample_indices=decode.indices,
            table_slots=growth.slots,
            table_columns=growth.columns,
            table_blocks=growth.block_ids,
        )
        return plan, UnappliedStep(
            plan.step_id,
            self._roster.batch.version if size == self._roster.batch.num_rows else None,
            decode.slots,
            decode.indices,
            decode.starts + 1,
            (),
        )

    def _plan_changes(self, now: float) -> tuple[StepPlan, UnappliedStep] | None:
        """Plan a step in which sequences start, fork or compute their context."""
        builder = StepPlanBuilder(self._roster.last_planned_step + 1)
        self._start_imported(builder, now)
        self._copy_shared_blocks(builder)
        growth = self._grow(self._roster.batch.rows_at_capacity())
        table_changes = (growth.slots, growth.columns, growth.block_ids)
        for slot, column, block_id in zip(*(c.tolist() for c in table_changes), strict=True):
            builder.set_blocks(slot, column, (block_id,))
        decode = self._decode_rows(growth.stalled)
        builder.add_decode_rows(decode.slots, decode.starts, decode.indices)
        positions = [decode.starts + 1, self._add_given_rows(builder)]
        chunks = self._add_chunks(builder, positions, now)
        if not builder.has_rows:
            return None  # whatever starts, copies or grows has a row, so nothing is forgotten here
        plan = builder.build()
        return plan, UnappliedStep(
            plan.step_id,
            None,
            plan.sample_slots,
            plan.sample_indices,
            np.concatenate(positions),
            chunks,
        )

    def _make_room(self, now: float) -> Rows:
        """Preempt until the rows that need a block can have one, now or after the steps in flight.

        Returns these rows.
        """
        batch = self._roster.batch
        rows = batch.rows_at_capacity()
        if not len(rows):
            return rows
        num_wanted = len(rows) - int(batch.promised[rows].sum())
        if num_wanted <= self._roster.budget.num_spare:
            return rows
        self._preempt(num_wanted, now)
        return batch.rows_at_capacity()

    def _preempt(self, num_wanted: int, now: float) -> None:
        """Give up the youngest until `num_wanted` blocks are spare or coming.

        num_wanted: blocks for rows at their capacity, beyond those that they were promised.
        """
        roster, departures = self._roster, self._roster.departures
        coming = BlocksComing(self._allocator)
        coming.add(departures.newest(len(departures)))
        while (num_lacking := num_wanted - roster.budget.num_spare) > coming.count:
            victim = choose_victim(roster.holders)
            if victim is None:
                return
            message = (
                f"{num_lacking} KV blocks are lacking for older sequences, all "
                f"{self._allocator.num_blocks} are in use or promised. If this happens often, "
                "raise decode.num_kv_blocks or decode.watermark, or lower decode.max_num_seqs"
            )
            num_wanted -= sum(map(roster.batch.num_blocks_wanted, victim.sequences))
            num_before = len(departures)
            roster.fail(list(victim.sequences), FailureReason.PREEMPTED, message, now)
            # With no step in flight all of it is spare at once; else nothing can be freed yet.
            departures.settle(roster.last_applied_step)
            coming.add(departures.newest(max(len(departures) - num_before, 0)))

    def _start_imported(self, builder: StepPlanBuilder, now: float) -> None:
        tables = self._roster.tables
        for attempt in self._imported:
            if attempt.state is AttemptState.ENDED:
                continue
            attempt.running_s = now
            work = attempt.work
            forked = self._roster.fork(attempt, next_index=work.next_index + 1, is_given=True)
            for sequence in forked:
                assert sequence.first_token is not None
                first = np.array([sequence.first_token], dtype=np.int32)
                tables.tokens[sequence.slot, attempt.num_tokens] = first[0]
                self._start(builder, sequence, np.concatenate((work.output, first)))
            self._forked += forked
        self._imported = []

    def _copy_shared_blocks(self, builder: StepPlanBuilder) -> None:
        """Give each fork its own partial last block, before any of them writes."""
        roster, batch = self._roster, self._roster.batch
        sources = []
        for sequence in self._forked:
            if sequence.state is not SequenceState.RUNNING or not sequence.num_copies_promised:
                continue
            sequence.num_copies_promised = 0
            row, table = batch.row_of(sequence), roster.tables.block_table[sequence.slot]
            column = sequence.attempt.num_tokens // self._limits.block_tokens
            source = int(table[column])
            writes = batch.next_indices[row] <= batch.last_indices[row]
            if not writes or not self._allocator.is_shared(source):
                roster.budget.promise(-1)
                continue
            [target] = roster.budget.allocate(1, num_promised=1)
            table[column] = target
            builder.copy_block(source, target)
            builder.set_blocks(sequence.slot, column, (target,))
            sources.append(source)
        self._forked = []
        if sources:
            # Until this step has been applied, a source that nobody else holds any more must not go
            # to an import: the transfer might write it before the copy has read it.
            roster.departures.add(Departure(builder.step_id, (), tuple(sources)))

    def _grow(self, rows: Rows) -> _Growth:
        """Give a block to each of the rows at their capacity, the oldest first."""
        roster, batch, size = self._roster, self._roster.batch, self._limits.block_tokens
        if not len(rows):
            return _Growth(rows, EMPTY, EMPTY, EMPTY)
        num_promised = int(batch.promised[rows].sum())
        stalled = rows[:0]
        if len(rows) - num_promised > roster.budget.num_spare:
            rows, stalled = self._oldest_first(rows)
            num_promised = int(batch.promised[rows].sum())
        slots, capacities = batch.slots[rows], batch.capacities[rows]
        columns = capacities // size
        allocated = roster.budget.allocate(len(rows), num_promised)
        block_ids = np.array(allocated, dtype=np.int32)
        roster.tables.block_table[slots, columns] = block_ids
        batch.capacities[rows] = capacities + size
        batch.promised[rows] = 0
        return _Growth(stalled, slots, columns, block_ids)

    def _oldest_first(self, rows: Rows) -> tuple[Rows, Rows]:
        """Split rows into those that get a block and those that wait a step."""
        batch, num_left = self._roster.batch, self._roster.budget.num_spare

        def age(row: int) -> tuple[int, int]:
            sequence = batch.sequences[row]
            return sequence.attempt.number, sequence.choice

        granted, stalled = [], []
        for row in sorted(rows.tolist(), key=age):
            if batch.promised[row]:
                granted.append(row)
            elif num_left > 0:
                num_left -= 1
                granted.append(row)
            else:
                stalled.append(row)
        return np.array(granted, dtype=np.intp), np.array(stalled, dtype=np.intp)

    def _decode_rows(self, stalled: Rows) -> _DecodeRows:
        """Take every sequence that can go on from its last sample one token further."""
        batch = self._roster.batch
        size = batch.num_rows
        blocked = batch.exhausted()
        if len(stalled):
            blocked[stalled] = True
        if batch.num_given:
            blocked |= batch.is_given[:size]
        if np.count_nonzero(blocked):
            rows = np.flatnonzero(~blocked)
            taken = _DecodeRows(batch.slots[rows], batch.positions[rows], batch.next_indices[rows])
            batch.advance(rows)
        else:
            taken = _DecodeRows(
                batch.shared_slots(),
                batch.positions[:size].copy(),
                batch.next_indices[:size].copy(),
            )
            batch.advance(None)
        return taken

    def _add_given_rows(self, builder: StepPlanBuilder) -> Int32Array:
        """Add the first rows of imported sequences: their token came with the lease."""
        batch, tokens = self._roster.batch, self._roster.tables.tokens
        rows = np.flatnonzero(batch.is_given[: batch.num_rows])
        positions = batch.positions[rows] + 1
        columns = (batch.slots[rows], batch.positions[rows], batch.next_indices[rows])
        for slot, start, index in zip(*(column.tolist() for column in columns), strict=True):
            position = builder.add_row(slot, start, tokens[slot, start : start + 1].copy())
            builder.add_sample(position, slot, index)
        batch.is_given[rows] = False
        batch.num_given = 0
        batch.advance(rows)
        return positions

    def _add_chunks(
        self, builder: StepPlanBuilder, positions: list[Int32Array], now: float
    ) -> tuple[PlannedChunk, ...]:
        """Fill the step with chunks of prompts, beside the decode rows."""
        num_tokens = self._limits.max_num_batched_tokens - builder.num_tokens
        planned = []
        for attempt, start, size in self._roster.prompts.plan(num_tokens, now):
            waiting, work = attempt.in_state(SequenceState.WAITING), attempt.work
            self._start(builder, waiting[0], work.output)
            end = start + size
            last = builder.add_row(waiting[0].slot, start, attempt.context[start:end])
            planned.append(PlannedChunk(attempt, size, now, end))
            if end < attempt.num_tokens:
                continue
            for sequence in waiting:
                self._start(builder, sequence, work.output)
                builder.add_sample(last, sequence.slot, work.next_index)
            positions.append(np.full(len(waiting), end, dtype=np.int32))
            attempt.move_to(AttemptState.RUNNING)
            self._forked += self._roster.fork(
                attempt, next_index=work.next_index + 1, is_given=False
            )
        return tuple(planned)

    def _start(self, builder: StepPlanBuilder, sequence: Sequence, output: Int32Array) -> None:
        """Put a sequence into its slot, with the context's blocks, unless it is there."""
        if not sequence.is_started:
            sequence.is_started = True
            attempt, work = sequence.attempt, sequence.attempt.work
            builder.start_slot(
                SlotStart(sequence.slot, work.sampling, sequence.choice, work.prompt, output)
            )
            builder.set_blocks(sequence.slot, 0, attempt.context_block_ids)
