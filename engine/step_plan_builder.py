"""Put a StepPlan together row by row."""

from collections.abc import Sequence

import numpy as np

from paceline.engine.step_plan import EMPTY, BoolArray, Int32Array, SlotStart, StepPlan


class StepPlanBuilder:
    """Collects one step. Decode rows come in bulk, because there are many in every step."""

    def __init__(self, step_id: int) -> None:
        self.step_id = step_id
        self.num_tokens = 0
        """New tokens of all rows so far: the position that the next row's first token gets."""
        self.num_samples = 0
        """Samples so far: the number that the next sample gets in the step's result."""
        self._slot_starts: list[SlotStart] = []
        self._slots: list[Int32Array] = []
        self._starts: list[Int32Array] = []
        self._num_new_tokens: list[Int32Array] = []
        self._from_last_sample: list[BoolArray] = []
        self._tokens: list[Int32Array] = []
        self._sample_positions: list[Int32Array] = []
        self._sample_slots: list[Int32Array] = []
        self._sample_indices: list[Int32Array] = []
        # By (slot, column): a sequence may start on a shared block that it then copies.
        self._table_entries: dict[tuple[int, int], int] = {}
        self._copy_sources: list[int] = []
        self._copy_targets: list[int] = []

    @property
    def has_rows(self) -> bool:
        return bool(self._slots)

    def start_slot(self, start: SlotStart) -> None:
        self._slot_starts.append(start)

    def set_blocks(self, slot: int, first_column: int, block_ids: Sequence[int]) -> None:
        """Set columns of a slot's block table, from `first_column` on.

        Of several calls for one column the last holds.
        """
        for column, block_id in enumerate(block_ids, first_column):
            self._table_entries[slot, column] = block_id

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block before the step writes anything (copy-on-write)."""
        self._copy_sources.append(source)
        self._copy_targets.append(target)

    def add_row(self, slot: int, start: int, tokens: Int32Array) -> int:
        """Add a row with given tokens; give the position of its last one, to be sampled from."""
        self._slots.append(_array(slot))
        self._starts.append(_array(start))
        self._num_new_tokens.append(_array(len(tokens)))
        self._from_last_sample.append(np.zeros(1, dtype=np.bool_))
        self._tokens.append(tokens)
        self.num_tokens += len(tokens)
        return self.num_tokens - 1

    def add_sample(self, position: int, slot: int, index: int) -> int:
        """Sample a position's logits for a slot; give the sample's number in the result."""
        self._sample_positions.append(_array(position))
        self._sample_slots.append(_array(slot))
        self._sample_indices.append(_array(index))
        self.num_samples += 1
        return self.num_samples - 1

    def add_decode_rows(
        self, slots: Int32Array, starts: Int32Array, sample_indices: Int32Array
    ) -> int:
        """Add rows of one token, each slot's last sample, and sample each of them.

        Gives the number, in the result, of the first of these samples. The arrays become part of
        the plan: the caller must not change them afterwards.
        """
        num_rows = len(slots)
        if not num_rows:
            return self.num_samples
        self._slots.append(slots)
        self._starts.append(starts)
        self._num_new_tokens.append(np.ones(num_rows, dtype=np.int32))
        self._from_last_sample.append(np.ones(num_rows, dtype=np.bool_))
        first_position, end_position = self.num_tokens, self.num_tokens + num_rows
        self._sample_positions.append(np.arange(first_position, end_position, dtype=np.int32))
        self._sample_slots.append(slots)
        self._sample_indices.append(sample_indices)
        self.num_tokens = end_position
        first_sample = self.num_samples
        self.num_samples += num_rows
        return first_sample

    def build(self) -> StepPlan:
        places = np.array(list(self._table_entries), dtype=np.int32).reshape(-1, 2)
        return StepPlan(
            step_id=self.step_id,
            slots=_joined(self._slots),
            starts=_joined(self._starts),
            num_new_tokens=_joined(self._num_new_tokens),
            from_last_sample=_joined_flags(self._from_last_sample),
            tokens=_joined(self._tokens),
            sample_positions=_joined(self._sample_positions),
            sample_slots=_joined(self._sample_slots),
            sample_indices=_joined(self._sample_indices),
            slot_starts=tuple(self._slot_starts),
            table_slots=places[:, 0],
            table_columns=places[:, 1],
            table_blocks=np.array(list(self._table_entries.values()), dtype=np.int32),
            copy_sources=np.array(self._copy_sources, dtype=np.int32),
            copy_targets=np.array(self._copy_targets, dtype=np.int32),
        )


def _array(value: int) -> Int32Array:
    return np.array((value,), dtype=np.int32)


def _joined(parts: list[Int32Array]) -> Int32Array:
    if not parts:
        return EMPTY
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _joined_flags(parts: list[BoolArray]) -> BoolArray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.bool_)
