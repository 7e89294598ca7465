"""The running sequences in columns, so that a step costs a few array operations, not a loop.

A row is one running sequence; rows are dense and without order: the last one takes the place of one
that leaves. What is long, tokens and block tables, stays with the slot.
"""

from collections import Counter

import numpy as np
import numpy.typing as npt

from paceline.decode_worker.attempts import Sequence, SequenceState
from paceline.engine.step_plan import Int32Array
from paceline.errors import IntegrityError

Rows = npt.NDArray[np.intp]
NO_TOKEN = -1
"""Fills the stop-token matrix; no token id is negative."""


class SlotTables:
    """Tokens and block table of the sequence in each slot."""

    def __init__(self, num_slots: int, max_model_len: int, block_tokens: int) -> None:
        num_columns = -(-max_model_len // block_tokens)
        # Not filled: memory is taken as sequences reach it.
        self.tokens: Int32Array = np.empty((num_slots, max_model_len + 1), dtype=np.int32)
        self.block_table: Int32Array = np.empty((num_slots, num_columns), dtype=np.int32)

    def blocks(self, slot: int, num_blocks: int) -> list[int]:
        blocks: list[int] = self.block_table[slot, :num_blocks].tolist()
        return blocks


class RunningBatch:
    """Columns 0 to num_rows - 1. The scheduler reads them, and adds to them where it says so."""

    def __init__(self, max_num_rows: int, block_tokens: int) -> None:
        self.num_rows = 0
        self.version = 0
        """Grows whenever rows are added, removed or moved."""
        self.num_held = 0
        self.num_given = 0
        self._block_tokens = block_tokens
        self.sequences: list[Sequence] = []
        self.slots = np.zeros(max_num_rows, dtype=np.int32)
        self.positions = np.zeros(max_num_rows, dtype=np.int32)
        """Tokens whose KV exists once all planned steps have run: the next row's start."""
        self.next_indices = np.zeros(max_num_rows, dtype=np.int32)
        """Output index of the next sample."""
        self.last_indices = np.zeros(max_num_rows, dtype=np.int32)
        """Output index at which the sequence ends at the latest."""
        self.capacities = np.zeros(max_num_rows, dtype=np.int32)
        """Tokens that its blocks hold."""
        self.promised = np.zeros(max_num_rows, dtype=np.int32)
        """Growth blocks promised and not yet taken: 1 or 0."""
        self.stream_ids = np.zeros(max_num_rows, dtype=np.uint32)
        self.sessions = np.zeros(max_num_rows, dtype=np.int64)
        self.is_held = np.zeros(max_num_rows, dtype=np.bool_)
        """Its output waits for the confirmation."""
        self.is_given = np.zeros(max_num_rows, dtype=np.bool_)
        """The next token is known here, not the slot's last sample."""
        self.stop_ids: Int32Array = np.full((max_num_rows, 4), NO_TOKEN, dtype=np.int32)
        self._num_stop_ids = np.zeros(max_num_rows, dtype=np.int32)
        self._num_rows_by_width: Counter[int] = Counter()
        """Rows that have a number of stop ids."""
        self.max_num_stop_ids = 0
        """Columns of `stop_ids` that any row uses."""
        self.row_of_slot: Rows = np.full(max_num_rows, -1, dtype=np.intp)
        """-1: the slot's sequence does not run. Wide enough for one gather to tell both."""
        self._columns = (
            self.slots,
            self.positions,
            self.next_indices,
            self.last_indices,
            self.capacities,
            self.promised,
            self.stream_ids,
            self.sessions,
            self.is_held,
            self.is_given,
            self._num_stop_ids,
        )
        self._shared_slots = (-1, self.slots[:0])

    def add(
        self,
        sequence: Sequence,
        *,
        position: int,
        next_index: int,
        num_blocks: int,
        is_held: bool,
        is_given: bool,
    ) -> None:
        """Add a sequence with one growth block promised."""
        attempt, row = sequence.attempt, self.num_rows
        self.sequences.append(sequence)
        self.slots[row] = sequence.slot
        self.positions[row] = position
        self.next_indices[row] = next_index
        self.last_indices[row] = attempt.last_index
        self.capacities[row] = num_blocks * self._block_tokens
        self.promised[row] = 1
        self.stream_ids[row] = sequence.stream_id
        self.sessions[row] = attempt.session
        self.is_held[row] = is_held
        self.is_given[row] = is_given
        self._set_stop_ids(row, sorted(attempt.stop_conditions.stop_token_ids))
        self.row_of_slot[sequence.slot] = row
        self.num_held += is_held
        self.num_given += is_given
        self.num_rows += 1
        self.version += 1

    def remove(self, sequence: Sequence) -> None:
        row = self.row_of(sequence)
        last = self.num_rows - 1
        self.num_held -= bool(self.is_held[row])
        self.num_given -= bool(self.is_given[row])
        width = int(self._num_stop_ids[row])
        moved = self.sequences.pop()
        if row != last:
            self.sequences[row] = moved
            for column in self._columns:
                column[row] = column[last]
            self.stop_ids[row] = self.stop_ids[last]
            self.row_of_slot[moved.slot] = row
        self.row_of_slot[sequence.slot] = -1
        self.num_rows = last
        self.version += 1
        self._num_rows_by_width[width] -= 1
        if not self._num_rows_by_width[width]:
            del self._num_rows_by_width[width]
            self.max_num_stop_ids = max(self._num_rows_by_width, default=0)

    def row_of(self, sequence: Sequence) -> int:
        row = int(self.row_of_slot[sequence.slot])
        if row < 0 or self.sequences[row] is not sequence:
            raise IntegrityError(
                f"choice {sequence.choice} of {sequence.attempt.work.key} has slot "
                f"{sequence.slot}, which is row {row} of {self.num_rows} and not its own"
            )
        return row

    def stop_holding(self, sequence: Sequence) -> None:
        row = self.row_of(sequence)
        self.num_held -= bool(self.is_held[row])
        self.is_held[row] = False

    def shared_slots(self) -> Int32Array:
        """Slots of all rows; the same array until the rows change, so nobody may change it."""
        version, slots = self._shared_slots
        if version != self.version:
            slots = self.slots[: self.num_rows].copy()
            self._shared_slots = (self.version, slots)
        return slots

    def exhausted(self) -> npt.NDArray[np.bool_]:
        """[num_rows] whether the last sample that a sequence may have has been planned already."""
        size = self.num_rows
        return self.next_indices[:size] > self.last_indices[:size]

    def num_blocks_wanted(self, sequence: Sequence) -> int:
        """Blocks that a sequence needs for its next token, beyond one that it was promised."""
        if sequence.state is not SequenceState.RUNNING:
            return 0
        row = self.row_of(sequence)
        is_full = self.positions[row] >= self.capacities[row]
        goes_on = self.next_indices[row] <= self.last_indices[row]
        return int(is_full and goes_on and not self.promised[row])

    def rows_at_capacity(self) -> Rows:
        """Rows whose next token has no block."""
        size = self.num_rows
        rows = np.flatnonzero(self.positions[:size] >= self.capacities[:size])
        if len(rows):
            rows = rows[self.next_indices[rows] <= self.last_indices[rows]]
        return rows

    def advance(self, rows: Rows | None) -> None:
        """Count one planned token for some rows, or for all."""
        if rows is None:
            size = self.num_rows
            self.positions[:size] += 1
            self.next_indices[:size] += 1
        else:
            self.positions[rows] += 1
            self.next_indices[rows] += 1

    def check_integrity(self) -> None:
        """Raise IntegrityError unless rows, slots and counters agree."""
        size = self.num_rows
        slots = self.slots[:size].tolist()
        expected = [sequence.slot for sequence in self.sequences]
        rows = [int(self.row_of_slot[slot]) for slot in slots]
        if slots != expected or rows != list(range(size)):
            raise IntegrityError(f"rows have slots {slots}, sequences {expected}, rows are {rows}")
        num_mapped = int(np.count_nonzero(self.row_of_slot >= 0))
        counted = (num_mapped, int(self.is_held[:size].sum()), int(self.is_given[:size].sum()))
        if counted != (size, self.num_held, self.num_given):
            raise IntegrityError(
                f"slots in use, held and given rows are {counted}, "
                f"the counters say {(size, self.num_held, self.num_given)}"
            )
        over = np.flatnonzero(self.positions[:size] > self.capacities[:size])
        if len(over):
            raise IntegrityError(f"rows {over.tolist()} have more tokens than their blocks hold")
        widest = int(self._num_stop_ids[:size].max(initial=0))
        widths = Counter(self._num_stop_ids[:size].tolist())
        if widest != self.max_num_stop_ids or widths != self._num_rows_by_width:
            raise IntegrityError(
                f"{widest} stop ids at most, {self.max_num_stop_ids} counted; rows by number of "
                f"stop ids are {dict(widths)}, counted {dict(self._num_rows_by_width)}"
            )

    def _set_stop_ids(self, row: int, stop_ids: list[int]) -> None:
        if len(stop_ids) > self.stop_ids.shape[1]:
            wider = np.full((len(self.stop_ids), len(stop_ids)), NO_TOKEN, dtype=np.int32)
            wider[:, : self.stop_ids.shape[1]] = self.stop_ids
            self.stop_ids = wider
        self.stop_ids[row] = NO_TOKEN
        self.stop_ids[row, : len(stop_ids)] = stop_ids
        self._num_stop_ids[row] = len(stop_ids)
        self._num_rows_by_width[len(stop_ids)] += 1
        self.max_num_stop_ids = max(self.max_num_stop_ids, len(stop_ids))
