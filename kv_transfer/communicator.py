"""A process group of two, from one owner to one reader, and the moving of blocks over it.

Built directly for each ordered pair, never as part of a world, so that one dead peer harms only its
own pairs. After any error a communicator is good for nothing: the pair drops it and builds another.
"""

import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from paceline.errors import TransportError
from paceline.kv_transfer.block_runs import block_runs
from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.gloo_device import GlooDevice
from paceline.kv_transfer.pool_memory import ByteArray

OWNER_RANK, READER_RANK = 0, 1
STAGING_BYTES = 4 << 20
# One buffer is on the wire while the other is filled or emptied.
NUM_STAGING = 2
_DATA_TAG, _RECEIPT_TAG, _ABORT_TAG = range(3)


class WriteGate:
    """Entered around each write to a pool; once `shut` returns, no write runs and none begins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_shut = False

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._is_shut:
            self._lock.release()
            raise TransportError("the connection was closed")

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def shut(self) -> None:
        with self._lock:
            self._is_shut = True


class Communicator:
    """One side of a Gloo group of two, with its staging buffers.

    Used by one thread; `abort` by any.
    """

    def __init__(
        self, device: GlooDevice, store: ChannelStore, rank: int, block_bytes: int, timeout_s: float
    ) -> None:
        """Meet the peer; blocks until it has come, for about `timeout_s` at most.

        Raises TransportError or RuntimeError. The caller closes the store to end it early.
        """
        gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack what its bindings have
        options = gloo._Options()
        options._devices = [device.open()]
        # For one attempt to connect; Gloo makes up to five. The rest is for the rendezvous.
        options._timeout = _milliseconds(timeout_s / 12)
        options._threads = 1  # of collectives, which nobody calls here
        self._store = store  # the group's C++ side calls it, and does not keep it alive
        self._group: Any = gloo(store, rank, 2, options)
        self._peer = OWNER_RANK + READER_RANK - rank
        num_blocks = max(1, STAGING_BYTES // block_bytes)
        self._staging = [
            torch.empty((num_blocks, block_bytes), dtype=torch.uint8) for _ in range(NUM_STAGING)
        ]
        # Receipts older than the pieces on the wire have arrived, and need not be kept.
        self._receipts: deque[dist.Work] = deque(maxlen=NUM_STAGING + 1)

    def send_blocks(self, blocks: ByteArray, ids: Sequence[int], deadline: float) -> None:
        """Send these blocks; returns when the reader has them."""
        sent: deque[_Flight] = deque()
        for number, piece in enumerate(self._pieces(ids)):
            if len(sent) == NUM_STAGING:
                sent.popleft().wait(deadline)
            staging = self._staging[number % NUM_STAGING]
            _gather(blocks, piece, staging.numpy())
            receipt = self._receive(_byte(), _RECEIPT_TAG)
            data = self._send(staging[: len(piece)], _DATA_TAG)
            sent.append(_Flight(receipt, (data, self._send(_byte(), _DATA_TAG))))
        for flight in sent:
            flight.wait(deadline)

    def receive_blocks(
        self, blocks: ByteArray, ids: Sequence[int], gate: WriteGate, deadline: float
    ) -> None:
        """Receive blocks into these; writes to `blocks` only while the gate is open."""
        pieces = self._pieces(ids)
        flight = self._begin_receive(0, len(pieces[0]))
        for number, piece in enumerate(pieces):
            flight.wait(deadline)
            if number + 1 < len(pieces):
                flight = self._begin_receive(number + 1, len(pieces[number + 1]))
            with gate:
                _scatter(self._staging[number % NUM_STAGING].numpy(), blocks, piece)
            self._receipts.append(self._send(_byte(), _RECEIPT_TAG))

    def abort(self) -> None:
        """Make waits on this communicator raise, here and at the peer; it is good for nothing then.

        Gloo has no call for it, but a wait that runs out of time closes the group's connections.
        """
        with suppress(RuntimeError):
            self._receive(_byte(), _ABORT_TAG).wait(timedelta(milliseconds=1))

    def _begin_receive(self, number: int, count: int) -> "_Flight":
        data = self._receive(self._staging[number % NUM_STAGING][:count], _DATA_TAG)
        return _Flight(self._receive(_byte(), _DATA_TAG), (data,))

    def _receive(self, tensor: torch.Tensor, tag: int) -> dist.Work:
        work: dist.Work = self._group.recv([tensor], self._peer, tag)
        return work

    def _send(self, tensor: torch.Tensor, tag: int) -> dist.Work:
        work: dist.Work = self._group.send([tensor], self._peer, tag)
        return work

    def _pieces(self, ids: Sequence[int]) -> list[Sequence[int]]:
        size = len(self._staging[0])
        return [ids[start : start + size] for start in range(0, len(ids), size)]


def describe(error: Exception) -> str:
    """Say a communicator's error without Gloo's source paths and advice."""
    text = re.sub(r"^\[\S+:\d+\] ", "", str(error))
    return text.split(". This is typically caused by")[0]


class _Flight(NamedTuple):
    """A piece on the wire.

    When the connection breaks, Gloo tells the transfers that have not begun and forgets the one
    under way, whose wait would last until its time-out. So nobody waits for data: the one-byte
    `signal` that follows it is what ends, or breaks, in time.
    """

    signal: dist.Work
    data: tuple[dist.Work, ...]
    """Kept until then, because Gloo does not keep the buffers of its transfers."""

    def wait(self, deadline: float) -> None:
        """Return when the piece is there. Raises RuntimeError at the deadline and on a break."""
        for work in (self.signal, *self.data):
            work.wait(_milliseconds(deadline - time.monotonic()))


def _gather(blocks: ByteArray, ids: Sequence[int], staging: ByteArray) -> None:
    # NumPy copies on this thread alone, with the GIL released; torch would start more threads.
    for source, target, count in block_runs(ids, range(len(ids)), len(staging)):
        staging[target : target + count] = blocks[source : source + count]


def _scatter(staging: ByteArray, blocks: ByteArray, ids: Sequence[int]) -> None:
    for source, target, count in block_runs(range(len(ids)), ids, len(staging)):
        blocks[target : target + count] = staging[source : source + count]


def _byte() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.uint8)


def _milliseconds(seconds: float) -> timedelta:
    # Gloo counts in milliseconds and takes 0 to mean for ever.
    return timedelta(milliseconds=max(1, int(seconds * 1e3)))
