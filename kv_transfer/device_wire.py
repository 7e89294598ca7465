"""One side of a process group of two that moves blocks between the memory of two devices.

    stream `copies`      gather ─┐                       ┌▶ scatter
    the group's stream           └▶ send ··· receive ─┐  │
    stream `arrivals`                                 └▶ event, polled on the host

The engine's stream takes no part, and no copy ever waits for the wire: only the host does.

On a CPU there are no streams: copies end before the call does, and transfers are asked themselves.
That is how this code is tested without a GPU, over a group of the tests' own.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from paceline.kv_transfer.communicator import OWNER_RANK, READER_RANK
from paceline.kv_transfer.staged_communicator import NUM_STAGING, Transfer

cuda: Any = torch.cuda  # parts of it are untyped

# A twentieth of a millisecond over NVLink, so that the host's part of a piece, some 50 µs, hides
# behind the piece before it.
STAGING_BYTES = 16 << 20
# torch hands out its streams in turn from a pool for each priority. The group's stream and
# `arrivals`, which stand still when a peer is gone, come from the urgent pool, so that no stream of
# copies is ever one of them.
URGENT = -1


class DeviceWire:
    """Satisfies `Wire`."""

    def __init__(
        self, group: Any, keep: object, rank: int, device: torch.device, block_bytes: int
    ) -> None:
        """keep: what the group uses without keeping it alive."""
        self._group = group
        self._keep = keep
        self._rank = rank
        self._peer = OWNER_RANK + READER_RANK - rank
        self._device = device
        self._copies: torch.cuda.Stream | None = None
        self._arrivals: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = cuda.Stream(device)
            self._arrivals = cuda.Stream(device, priority=URGENT)
        self.num_blocks = max(1, STAGING_BYTES // block_bytes)
        self._block_bytes = block_bytes
        self._staging = [self.allocate(self.num_blocks) for _ in range(NUM_STAGING)]
        self._load_kernels()

    def allocate(self, num_blocks: int) -> torch.Tensor:
        # From the memory of the default stream: what `copies` has freed, `copies` alone may have
        # again. Whoever had it last may have work on it that still runs.
        blocks = torch.empty(
            (num_blocks, self._block_bytes), dtype=torch.uint8, device=self._device
        )
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        return blocks

    def greet(self) -> Transfer:
        block = self._staging[0][:1]
        return self._send(block) if self._rank == OWNER_RANK else self._receive(block)

    def upload(self, ids: Sequence[int]) -> torch.Tensor:
        with _on(self._copies):
            return torch.tensor(ids, dtype=torch.int64, device=self._device)

    def send(self, blocks: torch.Tensor, ids: torch.Tensor, buffer: int) -> Transfer:
        staged = self._staging[buffer][: len(ids)]
        with _on(self._copies):
            torch.index_select(_words(blocks), 0, ids, out=_words(staged))
        return self._send(staged)

    def receive(self, num_blocks: int, buffer: int) -> Transfer:
        return self._receive(self._staging[buffer][:num_blocks])

    def scatter(self, buffer: int, blocks: torch.Tensor, ids: torch.Tensor) -> Transfer:
        with _on(self._copies):
            _words(blocks).index_copy_(0, ids, _words(self._staging[buffer][: len(ids)]))
        return _Launched(self._copies) if self._copies is not None else _Done()

    def abort(self) -> None:
        self._group.abort()
        # Both write to the buffers, which may go after this. `arrivals` ends after the group's
        # stream; if an abort has not ended that, this hangs here and keeps them.
        for stream in (self._arrivals, self._copies):
            if stream is not None:
                stream.synchronize()

    def _send(self, staged: torch.Tensor) -> Transfer:
        # The group's stream waits for what `copies` holds now: the gather into this buffer.
        with _on(self._copies):
            return self._launched(self._group.send([staged], self._peer, 0))

    def _receive(self, staged: torch.Tensor) -> Transfer:
        with _on(self._copies):
            return self._launched(self._group.recv([staged], self._peer, 0))

    def _launched(self, work: dist.Work) -> Transfer:
        if self._arrivals is None:
            return _Asked(work)
        # Not `work.is_completed()`: it holds the GIL while it waits for a lock that an abort holds.
        with _on(self._arrivals):
            work.block_current_stream()
        return _Launched(self._arrivals)

    def _load_kernels(self) -> None:
        """Copy a block of no meaning to itself.

        CUDA loads a kernel at its first launch, and may let that wait for every kernel that runs: a
        receive whose peer does the same in the other direction would wait for ever.
        """
        first = self.upload([0])
        with _on(self._copies):
            words = [_words(staging) for staging in self._staging]
            torch.index_select(words[0], 0, first, out=words[1][:1])
            words[0].index_copy_(0, first, words[1][:1])
        if self._copies is not None:
            self._copies.synchronize()


class _Launched:
    """What is on a stream at this moment."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = cuda.Event()
        self._event.record(stream)

    def is_done(self) -> bool:
        is_done: bool = self._event.query()
        return is_done


class _Asked:
    """A transfer of a group without streams."""

    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def is_done(self) -> bool:
        return self._work.is_completed() and self._work.wait()


class _Done:
    def is_done(self) -> bool:
        return True


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _words(blocks: torch.Tensor) -> torch.Tensor:
    """View blocks as the widest words they divide into: a copy by index moves one at a time."""
    return blocks.view(torch.int64) if blocks.shape[1] % 8 == 0 else blocks
