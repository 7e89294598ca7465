"""Blocks between two pools in CPU memory, over Gloo's TCP connections."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from paceline.kv_transfer.block_runs import block_runs
from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.communicator import OWNER_RANK, READER_RANK, WriteGate
from paceline.kv_transfer.listen_host import check_listen_host
from paceline.kv_transfer.pool_memory import ByteArray

STAGING_BYTES = 4 << 20
# One buffer is on the wire while the other is filled or emptied.
NUM_STAGING = 2
_DATA_TAG, _RECEIPT_TAG, _ABORT_TAG = range(3)


class GlooCommunicators:
    """Satisfies `CommunicatorFactory`. One listener for all, opened when the first is made."""

    def __init__(self, listen_host: str, block_bytes: int) -> None:
        """Raise ConfigError when this host cannot listen there."""
        check_listen_host(listen_host)
        self._listen_host = listen_host
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._device: object | None = None

    def connect(self, store: ChannelStore, rank: int, timeout_s: float) -> "GlooCommunicator":
        return GlooCommunicator(self._open(), store, rank, self._block_bytes, timeout_s)

    def close(self) -> None:
        self._device = None  # closes the listener with the last group on it

    def _open(self) -> object:
        with self._lock:
            if self._device is None:
                self._device = dist.ProcessGroupGloo.create_device(hostname=self._listen_host)
            return self._device


class GlooCommunicator:
    """One side of a Gloo group of two, with its staging buffers; satisfies `Communicator`."""

    def __init__(
        self, device: object, store: ChannelStore, rank: int, block_bytes: int, timeout_s: float
    ) -> None:
        """Meet the peer; see `CommunicatorFactory.connect`."""
        gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack what its bindings have
        options = gloo._Options()
        options._devices = [device]
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

    def scratch(self, num_blocks: int) -> torch.Tensor:
        return torch.empty((num_blocks, self._staging[0].shape[1]), dtype=torch.uint8)

    def send_blocks(self, blocks: torch.Tensor, ids: Sequence[int], deadline: float) -> None:
        sent: deque[_Flight] = deque()
        for number, piece in enumerate(self._pieces(ids)):
            if len(sent) == NUM_STAGING:
                sent.popleft().wait(deadline)
            staging = self._staging[number % NUM_STAGING]
            _gather(blocks.numpy(), piece, staging.numpy())
            receipt = self._receive(_byte(), _RECEIPT_TAG)
            data = self._send(staging[: len(piece)], _DATA_TAG)
            sent.append(_Flight(receipt, (data, self._send(_byte(), _DATA_TAG))))
        for flight in sent:
            flight.wait(deadline)

    def receive_blocks(
        self, blocks: torch.Tensor, ids: Sequence[int], gate: WriteGate, deadline: float
    ) -> None:
        pieces = self._pieces(ids)
        flight = self._begin_receive(0, len(pieces[0]))
        for number, piece in enumerate(pieces):
            flight.wait(deadline)
            if number + 1 < len(pieces):
                flight = self._begin_receive(number + 1, len(pieces[number + 1]))
            with gate:
                _scatter(self._staging[number % NUM_STAGING].numpy(), blocks.numpy(), piece)
            self._receipts.append(self._send(_byte(), _RECEIPT_TAG))

    def abort(self) -> None:
        """Make waits raise, here and at the peer.

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
