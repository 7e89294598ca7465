"""The tokens that penalties look at, as dense rows on the device; only of slots with penalties."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paceline.engine.sampling_rules import has_penalties
from paceline.engine.step_plan import Int32Array, SlotStart
from paceline.kernels.sampling import apply_penalties_


class PenalisedRows(NamedTuple):
    """The rows of a batch whose slots have penalties."""

    batch_rows: torch.Tensor
    """int64 [P] row of the batch"""
    state_rows: torch.Tensor
    """int64 [P] row of the state"""


class SeenTokens:
    """Counts tokens of prompt and output. A slot without penalties costs nothing."""

    def __init__(self, max_num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._is_tracked = np.zeros(max_num_slots, np.bool_)
        self._row_of = np.zeros(max_num_slots, np.int64)
        self._penalties = np.zeros((max_num_slots, 3), np.float32)
        self._free_rows: list[int] = []
        self._seen = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)

    def start(self, slot_start: SlotStart) -> bool:
        """Forget the slot's last sequence; return whether the new one has penalties."""
        slot, sampling = slot_start.slot, slot_start.sampling
        if self._is_tracked[slot]:
            self._is_tracked[slot] = False
            self._free_rows.append(int(self._row_of[slot]))
        if not has_penalties(sampling):
            return False
        if not self._free_rows:
            self._grow()
        row = self._free_rows.pop()
        self._is_tracked[slot] = True
        self._row_of[slot] = row
        self._penalties[slot] = (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        prompt, output = (
            torch.from_numpy(tokens.astype(np.int64)).to(self._seen.device)
            for tokens in (slot_start.prompt, slot_start.output)
        )
        self._seen[row] = False
        self._seen[row, prompt] = True
        self._seen[row, output] = True
        self._counts[row] = torch.bincount(output, minlength=self._counts.shape[1])
        return True

    def _grow(self) -> None:
        num_rows, vocab_size = self._seen.shape
        added = max(4, num_rows)
        self._seen = torch.cat([self._seen, self._seen.new_zeros((added, vocab_size))])
        self._counts = torch.cat([self._counts, self._counts.new_zeros((added, vocab_size))])
        self._free_rows.extend(reversed(range(num_rows, num_rows + added)))

    def penalise_(self, scores: torch.Tensor, slots: Int32Array) -> None:
        """Apply the penalties of slots [R] to scores [R, V]."""
        rows = self._rows(slots, scores.device)
        if rows is None:
            return
        columns = self._penalties[slots[self._is_tracked[slots]]]
        repetition, presence, frequency = (
            torch.from_numpy(columns).to(scores.device).unsqueeze(-1).unbind(1)
        )
        penalised = scores[rows.batch_rows]
        seen, counts = self._seen[rows.state_rows], self._counts[rows.state_rows]
        apply_penalties_(penalised, seen, counts, repetition, presence, frequency)
        scores[rows.batch_rows] = penalised

    def count(self, slots: Int32Array, tokens: torch.Tensor) -> None:
        """Add one sampled token, int64 [R], to each slot."""
        rows = self._rows(slots, tokens.device)
        if rows is not None:
            places = (rows.state_rows, tokens[rows.batch_rows])
            self._seen[places] = True
            self._counts[places] += 1

    def _rows(self, slots: Int32Array, device: torch.device) -> PenalisedRows | None:
        batch_rows: npt.NDArray[np.intp] = np.flatnonzero(self._is_tracked[slots])
        if not batch_rows.size:
            return None
        state_rows = self._row_of[slots[batch_rows]]
        if len(np.unique(state_rows)) < len(state_rows):
            raise ValueError(
                f"slots {slots.tolist()} name one with penalties twice, and each token changes them"
            )
        return PenalisedRows(
            torch.from_numpy(batch_rows).to(device), torch.from_numpy(state_rows).to(device)
        )
