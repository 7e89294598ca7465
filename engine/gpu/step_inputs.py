"""A step's plan as arrays on the device: one copy for its rows, one more only where slots change.

    rows     row_slots[R] lengths[R] decode_lengths[R] offsets[R+1] |
             token_rows[T] prompt_rows[T] given[T] positions[T] |
             sample_positions[S] sample_slots[S] sample_indices[S] | tiles[N, 2]
    changes  arrays of any lengths

All of it is int32, written to pinned memory and copied without waiting. Where the arrays of rows
lie follows from (R, T, S) alone, so a captured graph of one shape finds them again. Pinned memory
comes in pairs, because a step is packed while the one before it is running.
"""

from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from paceline.engine.step_plan import Int32Array, StepPlan

ALIGNMENT = 4
"""Words: arrays begin at multiples of 16 bytes."""
NO_TILES = np.empty((0, 2), np.int32)
FIRST_CHANGES = 1 << 16
"""Words that changes have room for at first; the block table of 20,000 tokens takes 4,000."""

Words = TypeVar("Words", torch.Tensor, npt.NDArray[np.int32])


class RowShape(NamedTuple):
    """What the places of a step's arrays follow from."""

    num_rows: int
    num_tokens: int
    num_samples: int
    num_tiles: int = 0


class RowArrays(NamedTuple, Generic[Words]):
    """A step's rows; see `paceline.engine.step_plan` and `kernels.step_inputs`."""

    row_slots: Words
    """[R]; -1 pads"""
    lengths: Words
    """[R] tokens of the context, the new ones included; 0 pads"""
    decode_lengths: Words
    """[R] those of the rows that decode; 0: another row"""
    offsets: Words
    """[R + 1] first token of each row"""
    token_rows: Words
    """[T]; -1 pads"""
    prompt_rows: Words
    """[T] those of the rows that do not decode; -1: another row's token"""
    given: Words
    """[T]; -1 is the slot's last sample"""
    positions: Words
    """[T] within their sequences"""
    sample_positions: Words
    """[S] among the T"""
    sample_slots: Words
    """[S]; -1 pads"""
    sample_indices: Words
    """[S]"""
    tiles: Words
    """[N, 2], flat: entries of the prefill's tile table; -1 pads"""


class PinnedRing:
    """Host memory for copies to a device or from it, in turns."""

    def __init__(self, num_words: int, device: torch.device, depth: int = 2) -> None:
        is_pinned = device.type == "cuda"
        self._buffers = [
            torch.empty(num_words, dtype=torch.int32, pin_memory=is_pinned) for _ in range(depth)
        ]
        self._turn = 0

    @property
    def num_words(self) -> int:
        return self._buffers[0].shape[0]

    def next(self) -> torch.Tensor:
        """The buffer that was used longest ago; whatever used it must have completed."""
        self._turn = (self._turn + 1) % len(self._buffers)
        return self._buffers[self._turn]


class RowUpload:
    """Packs rows. Called for one step at a time, with at most one earlier one unfinished."""

    def __init__(
        self, max_rows: int, max_tokens: int, max_samples: int, device: torch.device
    ) -> None:
        # No more tiles are ever needed than tokens: each has a query.
        num_words = _size(RowShape(max_rows, max_tokens, max_samples, max_tokens))
        self._ring = PinnedRing(num_words, device)
        self._device_words = torch.empty(num_words, dtype=torch.int32, device=device)

    def arrays(self, shape: RowShape) -> RowArrays[torch.Tensor]:
        """The arrays of a shape on the device, whether filled yet or not."""
        return RowArrays(*_cut(self._device_words, shape))

    def pack(
        self,
        plan: StepPlan,
        num_decode_rows: int,
        shape: RowShape,
        tiles: npt.NDArray[np.int32] = NO_TILES,
    ) -> None:
        """Copy a step's rows to the device, padded to a shape.

        num_decode_rows: rows of one token that lead the step. tiles: entries of the prefill's tile
        table, [N, 2].
        """
        host: npt.NDArray[np.int32] = self._ring.next().numpy()[: _size(shape)]
        arrays = RowArrays(*_cut(host, shape))
        _fill(arrays, plan, num_decode_rows)
        arrays.tiles[: tiles.size] = tiles.reshape(-1)
        _pad(arrays, len(plan.slots), plan.num_tokens, len(plan.sample_slots), tiles.size)
        self._device_words[: len(host)].copy_(torch.from_numpy(host), non_blocking=True)

    def pad(self, shape: RowShape) -> None:
        """Make everything of a shape what pads. Waits for the device."""
        host = np.zeros(_size(shape), np.int32)
        _pad(RowArrays(*_cut(host, shape)), 0, 0, 0, 0)
        self._device_words[: len(host)].copy_(torch.from_numpy(host))


def _fill(arrays: RowArrays[npt.NDArray[np.int32]], plan: StepPlan, num_decode_rows: int) -> None:
    counts = plan.num_new_tokens
    num_rows, num_tokens, num_samples = len(counts), plan.num_tokens, len(plan.sample_slots)
    arrays.row_slots[:num_rows] = plan.slots
    np.add(plan.starts, counts, out=arrays.lengths[:num_rows])
    arrays.decode_lengths[:num_decode_rows] = arrays.lengths[:num_decode_rows]
    arrays.decode_lengths[num_decode_rows:num_rows] = 0
    arrays.offsets[0] = 0
    np.cumsum(counts, out=arrays.offsets[1 : num_rows + 1])
    rows = np.arange(num_rows, dtype=np.int32)
    positions = plan.starts
    if num_tokens > num_rows:
        rows = np.repeat(rows, counts)
        positions = (plan.starts - arrays.offsets[:num_rows])[rows]
        positions += np.arange(num_tokens, dtype=np.int32)
    arrays.token_rows[:num_tokens] = rows
    arrays.prompt_rows[:num_decode_rows] = -1
    arrays.prompt_rows[num_decode_rows:num_tokens] = rows[num_decode_rows:]
    arrays.positions[:num_tokens] = positions
    given = arrays.given[:num_tokens]
    given[:] = -1
    if len(plan.tokens):
        given[~np.repeat(plan.from_last_sample, counts)] = plan.tokens
    arrays.sample_positions[:num_samples] = plan.sample_positions
    arrays.sample_slots[:num_samples] = plan.sample_slots
    arrays.sample_indices[:num_samples] = plan.sample_indices


def _pad(
    arrays: RowArrays[npt.NDArray[np.int32]],
    num_rows: int,
    num_tokens: int,
    num_samples: int,
    num_tile_words: int,
) -> None:
    """Fill what is behind the first ones by what does nothing."""
    for array, first, value in (
        (arrays.row_slots, num_rows, -1),
        (arrays.lengths, num_rows, 0),
        (arrays.decode_lengths, num_rows, 0),
        (arrays.offsets, num_rows + 1 if num_rows else 0, num_tokens),
        (arrays.token_rows, num_tokens, -1),
        (arrays.prompt_rows, num_tokens, -1),
        (arrays.given, num_tokens, -1),
        (arrays.positions, num_tokens, 0),
        (arrays.sample_positions, num_samples, 0),
        (arrays.sample_slots, num_samples, -1),
        (arrays.sample_indices, num_samples, 0),
        (arrays.tiles, num_tile_words, -1),
    ):
        if first < len(array):
            array[first:] = value


class ChangeUpload:
    """Packs arrays of any lengths; grows when they need more."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ring = PinnedRing(FIRST_CHANGES, device)

    def pack(self, arrays: Sequence[Int32Array]) -> list[torch.Tensor]:
        """Copy the arrays to the device; return them there, complete in the stream's order."""
        sizes = [_aligned(array.size) for array in arrays]
        num_words = sum(sizes)
        if num_words > self._ring.num_words:
            # PyTorch keeps the old ones until copies from them have completed.
            self._ring = PinnedRing(2 * num_words, self._device)
        pinned = self._ring.next()
        host, start = pinned.numpy(), 0
        for array, size in zip(arrays, sizes, strict=True):
            host[start : start + array.size] = array
            start += size
        # Own memory on a CPU too, as on a GPU: the ring is used again while the step runs.
        words = torch.empty(num_words, dtype=torch.int32, device=self._device)
        words.copy_(pinned[:num_words], non_blocking=True)
        places = zip(torch.split(words, sizes), arrays, strict=True)
        return [place[: array.size] for place, array in places]


def _aligned(num_words: int) -> int:
    return -(-num_words // ALIGNMENT) * ALIGNMENT


def _sizes(shape: RowShape) -> tuple[int, ...]:
    rows, tokens, samples, tiles = shape
    return (*[rows] * 3, rows + 1, *[tokens] * 4, *[samples] * 3, 2 * tiles)


def _size(shape: RowShape) -> int:
    return sum(_aligned(size) for size in _sizes(shape))


def _cut(words: Words, shape: RowShape) -> Iterator[Words]:
    """Cut words into the arrays of `RowArrays`."""
    start = 0
    for size in _sizes(shape):
        yield words[start : start + size]
        start += _aligned(size)
