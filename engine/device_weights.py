"""Copy weights from mapped files into a device's memory, as fast as disk and link allow.

Each weight is allocated once, in its final dtype and layout. Its parts in the files are cut into
pieces of whole rows, and reader threads take piece after piece from one list, so that all of them
read a single large tensor together:

    mapped file -> a reader's pinned buffer -> (device buffer, if the dtype changes) -> rows of the
    (page faults)         (its own stream)          (converted on the device)           weight

A reader has two pinned buffers: it fills one from the file while the device empties the other.
Beyond the weights, the device holds one piece a reader, and only while a dtype changes; the host
keeps the pinned buffers in PyTorch's cache for later use.

On a CPU the same code runs without pinning and streams, for tests.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch

from paceline.errors import CapacityError, ConfigError

# A thread that takes pages from the page cache and copies them moves some GB/s, a PCIe 5 link
# about 50. Several threads also keep several requests at a disk.
NUM_READERS = 8
# Large enough that the calls for a piece cost little beside its copy, a third of a millisecond on
# such a link; small enough that the pinned memory of all readers stays at 256 MiB.
PIECE_BYTES = 16 << 20
NUM_BUFFERS = 2

OnBytes = Callable[[int, int], None]
"""Called with (bytes ready, bytes in all), on the thread that loads."""


class PartSize(NamedTuple):
    """The size of a part as its file holds it."""

    num_rows: int
    row_bytes: int


class Piece(NamedTuple):
    """Rows of a part, and where in the weight they go."""

    weight: str
    part: int
    part_row: int
    weight_row: int
    num_rows: int


def plan_pieces(weights: Mapping[str, Sequence[PartSize]], piece_bytes: int) -> Iterator[Piece]:
    """Cut parts, which lie one below the other in their weight, into pieces of `piece_bytes`.

    A longer row is a piece of its own.
    """
    for weight, parts in weights.items():
        weight_row = 0
        for part, (num_rows, row_bytes) in enumerate(parts):
            step = max(1, piece_bytes // row_bytes)
            for row in range(0, num_rows, step):
                yield Piece(weight, part, row, weight_row + row, min(step, num_rows - row))
            weight_row += num_rows


def allocate_weights(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Allocate all weights, not filled. Raises CapacityError if a GPU has too little memory."""
    try:
        return {
            name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()
        }
    except torch.OutOfMemoryError as error:
        num_bytes = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        raise _too_little_memory(num_bytes, device) from error


def copy_to_device(
    parts: Mapping[str, Sequence[torch.Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: OnBytes,
    *,
    piece_bytes: int = PIECE_BYTES,
) -> dict[str, torch.Tensor]:
    """Return a weight for each name, its parts one below the other; complete on return.

    `parts` are CPU tensors, mapped from files, whose last dimension is dense. `on_bytes` hears of
    bytes once they are on the device. When a copy fails the readers end first; raises CapacityError
    if it was for memory, else ConfigError from the cause.
    """
    shapes = {
        name: (sum(part.shape[0] for part in pieces), *pieces[0].shape[1:])
        for name, pieces in parts.items()
    }
    sizes = {
        name: [PartSize(part.shape[0], part[0].nbytes) for part in pieces]
        for name, pieces in parts.items()
    }
    weights = allocate_weights(shapes, dtype, device)
    device = next(iter(weights.values())).device  # with its index: threads start on GPU 0
    # The memory may have had another user on this stream, and the readers have their own streams.
    synchronize(device)
    work = _Work(parts, weights, device, deque(plan_pieces(sizes, piece_bytes)))
    total = sum(weight.nbytes for weight in weights.values())
    done = _run_readers(work, lambda done: on_bytes(done, total))
    for failure in work.failures:
        if isinstance(failure, torch.OutOfMemoryError):
            raise _too_little_memory(total, device) from failure
        if isinstance(failure, RuntimeError | OSError):
            raise ConfigError(
                f"The weights cannot be copied to {device}: {done} of {total} bytes had arrived "
                f"when a reader failed: {failure}. Check the disk with the model and the GPU "
                "(nvidia-smi, dmesg)."
            ) from failure
        raise failure
    if device.type == "cuda":
        torch.cuda.empty_cache()  # buffers of streams that are gone
    return weights


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _too_little_memory(num_bytes: int, device: torch.device) -> CapacityError:
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return CapacityError(
        f"The weights need {_gib(num_bytes)} on {device}, and {_gib(free)} of its {_gib(total)} "
        "is left. End other processes on the GPU, or serve a smaller model."
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """What the readers share."""

    parts: Mapping[str, Sequence[torch.Tensor]]
    weights: Mapping[str, torch.Tensor]
    device: torch.device
    pieces: deque[Piece]
    """Not begun; a reader that finds none ends, so clearing it stops them all."""
    arrived: SimpleQueue[int | None] = field(default_factory=SimpleQueue)
    """Bytes that have reached the device; None when a reader has ended."""
    failures: list[BaseException] = field(default_factory=list)
    """In the order in which they happened."""

    def rows(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a piece's rows in the file and in the weight."""
        source = self.parts[piece.weight][piece.part]
        return (
            source.narrow(0, piece.part_row, piece.num_rows),
            self.weights[piece.weight].narrow(0, piece.weight_row, piece.num_rows),
        )


def _run_readers(work: _Work, on_bytes: Callable[[int], None]) -> int:
    """Run until all readers have ended; return the bytes that arrived."""
    num_readers = min(NUM_READERS, len(work.pieces))
    piece_bytes = max((work.rows(piece)[0].nbytes for piece in work.pieces), default=0)
    done = 0
    with ThreadPoolExecutor(max(1, num_readers), thread_name_prefix="weights-reader") as pool:
        try:
            for _ in range(num_readers):
                pool.submit(_read, work, piece_bytes)
            for _ in range(num_readers):
                for num_bytes in iter(work.arrived.get, None):
                    done += num_bytes
                    on_bytes(done)
        finally:
            work.pieces.clear()
    return done


def _read(work: _Work, piece_bytes: int) -> None:
    """Copy pieces until none is left: the body of a reader thread."""
    try:
        # Weights that were allocated in inference mode can be written only there.
        with torch.inference_mode(), _Buffers(work.device, piece_bytes) as buffers:
            while (piece := _take(work.pieces)) is not None:
                work.arrived.put(buffers.copy(*work.rows(piece)))
            work.arrived.put(buffers.finish())
    except BaseException as failure:
        work.failures.append(failure)
        work.pieces.clear()
    finally:
        work.arrived.put(None)


def _take(pieces: deque[Piece]) -> Piece | None:
    try:
        return pieces.popleft()
    except IndexError:
        return None


@dataclass(slots=True, eq=False)
class _Buffer:
    """Memory that a piece is read into, and the copy out of it."""

    memory: torch.Tensor
    copied: torch.cuda.Event | None
    num_pending: int = 0
    """Bytes of weights on their way from here."""

    def wait(self) -> int:
        """Wait for the copy; return its bytes."""
        if self.num_pending and self.copied is not None:
            self.copied.synchronize()
        num_bytes, self.num_pending = self.num_pending, 0
        return num_bytes


class _Buffers:
    """A reader's stream and buffers; entered and used on its thread alone."""

    def __init__(self, device: torch.device, piece_bytes: int) -> None:
        self._device = device
        self._piece_bytes = piece_bytes
        self._exit = ExitStack()
        self._unconverted: torch.Tensor | None = None

    def __enter__(self) -> Self:
        is_cuda = self._device.type == "cuda"
        if is_cuda:
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._exit.enter_context(torch.cuda.stream(stream))
            # Before the buffers go, whatever happened: a copy may still be under way.
            self._exit.callback(stream.synchronize)
        self._buffers = [
            _Buffer(
                torch.empty(self._piece_bytes, dtype=torch.uint8, pin_memory=is_cuda),
                # Blocking: a reader that waits leaves its core to the others.
                torch.cuda.Event(blocking=True) if is_cuda else None,  # type: ignore[no-untyped-call]
            )
            for _ in range(NUM_BUFFERS)
        ]
        self._next = cycle(self._buffers)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> int:
        """Copy rows, converted; return the bytes of an earlier call that have arrived by now."""
        buffer = next(self._next)
        num_arrived = buffer.wait()
        staged = _typed(buffer.memory, source)
        # NumPy copies on this thread alone, without the GIL. torch would start a team of OpenMP
        # threads for each reader.
        np.copyto(staged.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
        if source.dtype != target.dtype:
            # A copy between devices that converts would do so on the CPU.
            if self._unconverted is None:
                self._unconverted = torch.empty(
                    self._piece_bytes, dtype=torch.uint8, device=self._device
                )
            staged = _typed(self._unconverted, source).copy_(staged, non_blocking=True)
        target.copy_(staged, non_blocking=True)
        if buffer.copied is not None:
            buffer.copied.record()
        buffer.num_pending = target.nbytes
        return num_arrived

    def finish(self) -> int:
        """Wait for all copies; return the bytes that no call has returned yet."""
        return sum(buffer.wait() for buffer in self._buffers)


def _typed(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """View the start of uint8 memory as a tensor of that dtype and shape."""
    return memory[: like.nbytes].view(like.dtype).view(like.shape)
