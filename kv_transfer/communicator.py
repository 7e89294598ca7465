"""A group of two, from one owner to one reader, over which blocks move.

Built directly for each ordered pair, never as part of a world, so that one dead peer harms only its
own pairs. After any error a communicator is good for nothing: the pair drops it and builds another.
"""

import re
import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from paceline.errors import TransportError
from paceline.kv_transfer.channel_store import ChannelStore

OWNER_RANK, READER_RANK = 0, 1


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


class Communicator(Protocol):
    """One side of a group of two. Used by one thread; `abort` by any.

    `blocks` are uint8 [num_blocks, block_bytes] in the memory that the communicator was made for;
    both sides name as many ids. Deadlines are of `time.monotonic`. Every call raises TransportError
    or RuntimeError when the peer is late, gone or gives up.
    """

    def scratch(self, num_blocks: int) -> torch.Tensor:
        """Return blocks of no meaning, to receive a probe into."""

    def send_blocks(self, blocks: torch.Tensor, ids: Sequence[int], deadline: float) -> None:
        """Send these blocks; returns when they have left, so that the next may follow."""

    def receive_blocks(
        self, blocks: torch.Tensor, ids: Sequence[int], gate: WriteGate, deadline: float
    ) -> None:
        """Receive blocks into these; returns when every byte is in place.

        Writes to `blocks` only while it has entered the gate.
        """

    def abort(self) -> None:
        """Make waits on this communicator raise and free what it holds; it is good for nothing
        then. Returns soon; calling it again does nothing.
        """


class CommunicatorFactory(Protocol):
    """Makes the communicators of one transport."""

    def connect(self, store: ChannelStore, rank: int, timeout_s: float) -> Communicator:
        """Meet the peer; blocks until it has come, for about `timeout_s` at most.

        Raises TransportError or RuntimeError. The caller closes the store to end it early.
        """

    def close(self) -> None:
        """Free what communicators share, after the last one was aborted."""


def describe(error: Exception) -> str:
    """Say a communicator's error in one line, without the libraries' source paths and advice."""
    text = re.sub(r"^\[\S+:\d+\] ", "", str(error))
    text = re.sub(r" in: \S+:\d+,", ":", text)
    return " ".join(text.split(". This is typically caused by")[0].split())
