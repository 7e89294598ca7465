"""A process group of two, from one owner to one reader, and the moving of blocks over it.

Built directly for each ordered pair, never as part of a world, so that one dead peer harms only its
own pairs. After any error a communicator is good for nothing: the pair drops it and builds another.
"""

import ipaddress
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from paceline.errors import ConfigError, TransportError
from paceline.kv_transfer.block_runs import block_runs
from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.pool_memory import ByteArray

OWNER_RANK, READER_RANK = 0, 1
# Two such buffers a communicator and side: one is on the wire while the other is filled or emptied.
STAGING_BYTES = 4 << 20
_DATA_TAG, _ABORT_TAG = 0, 1


class GlooDevice:
    """Where this process takes and makes its Gloo connections; opened on first use."""

    def __init__(self, listen_host: str) -> None:
        """Raise ConfigError when this host cannot listen there."""
        _check_listen_host(listen_host)
        self._listen_host = listen_host
        self._lock = threading.Lock()
        self._device: object | None = None

    def open(self) -> object:
        with self._lock:
            if self._device is None:
                self._device = dist.ProcessGroupGloo.create_device(hostname=self._listen_host)
            return self._device

    def close(self) -> None:
        """Close the listener, once the last communicator on it has gone."""
        self._device = None


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
        # For one attempt to connect, of which Gloo makes up to five; the rest is for the rendezvous.
        options._timeout = _milliseconds(timeout_s / 12)
        options._threads = 1  # of collectives, which nobody calls here
        self._store = store  # the group's C++ side calls it, and does not keep it alive
        self._group: Any = gloo(store, rank, 2, options)
        self._peer = OWNER_RANK + READER_RANK - rank
        num_blocks = max(1, STAGING_BYTES // block_bytes)
        self._staging = [torch.empty((num_blocks, block_bytes), dtype=torch.uint8) for _ in "ab"]

    def send_blocks(self, blocks: ByteArray, ids: Sequence[int], deadline: float) -> None:
        """Send these blocks; returns when the last byte has been handed over."""
        sending: dist.Work | None = None
        for number, piece in enumerate(self._pieces(ids)):
            staging = self._staging[number % 2]
            _gather(blocks, piece, staging.numpy())
            if sending is not None:
                _wait(sending, deadline)
            sending = self._group.send([staging[: len(piece)]], self._peer, _DATA_TAG)
        if sending is not None:
            _wait(sending, deadline)

    def receive_blocks(
        self, blocks: ByteArray, ids: Sequence[int], gate: WriteGate, deadline: float
    ) -> None:
        """Receive blocks into these; writes to `blocks` only while the gate is open."""
        pieces = self._pieces(ids)
        receiving = self._receive(0, len(pieces[0]))
        for number, piece in enumerate(pieces):
            _wait(receiving, deadline)
            if number + 1 < len(pieces):
                receiving = self._receive(number + 1, len(pieces[number + 1]))
            with gate:
                _scatter(self._staging[number % 2].numpy(), blocks, piece)

    def abort(self) -> None:
        """Make waits on this communicator raise, here and at the peer; it is good for nothing then.

        Gloo has no call for it, but a wait that runs out of time closes the group's connections.
        """
        with suppress(RuntimeError):
            doomed = self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, _ABORT_TAG)
            doomed.wait(timedelta(milliseconds=1))

    def _receive(self, number: int, count: int) -> dist.Work:
        work: dist.Work = self._group.recv(
            [self._staging[number % 2][:count]], self._peer, _DATA_TAG
        )
        return work

    def _pieces(self, ids: Sequence[int]) -> list[Sequence[int]]:
        size = len(self._staging[0])
        return [ids[start : start + size] for start in range(0, len(ids), size)]


def _gather(blocks: ByteArray, ids: Sequence[int], staging: ByteArray) -> None:
    # NumPy copies on this thread alone, with the GIL released; torch would start more threads.
    for source, target, count in block_runs(ids, range(len(ids)), len(staging)):
        staging[target : target + count] = blocks[source : source + count]


def _scatter(staging: ByteArray, blocks: ByteArray, ids: Sequence[int]) -> None:
    for source, target, count in block_runs(range(len(ids)), ids, len(staging)):
        blocks[target : target + count] = staging[source : source + count]


def _wait(work: dist.Work, deadline: float) -> None:
    work.wait(_milliseconds(deadline - time.monotonic()))


def _milliseconds(seconds: float) -> timedelta:
    # Gloo counts in milliseconds and takes 0 to mean for ever.
    return timedelta(milliseconds=max(1, int(seconds * 1e3)))


def _check_listen_host(host: str) -> None:
    try:
        address = ipaddress.ip_address(socket.gethostbyname(host))
        if address.is_unspecified:
            raise ConfigError(
                f"kv.listen_host is {host}: peers cannot connect to it, and it would listen on "
                "every interface. Set one address of this host"
            )
        with socket.socket() as probe:
            probe.bind((str(address), 0))
    except OSError as error:
        raise ConfigError(
            f"kv.listen_host is {host!r}, where this host cannot listen: {error.strerror}. Set one "
            "of its own addresses, or 127.0.0.1 when all workers are on this host"
        ) from error
