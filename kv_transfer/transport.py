"""What every way of moving KV blocks has in common.

A transport has two ends. The **owner's end** lives in the worker that owns the pool; it tells
readers how to reach the pool and, where a read needs its help, serves it. The **reader's end** is
one connection to one incarnation of one owner; it copies blocks from the owner's pool into its own.
Both ends may exchange messages over the KV session that the two workers hold anyway: no transport
opens a port of its own.

Reads never write to the owner and never tell whether what they read was valid: the lease's
confirmation does (see `paceline.kv_transfer.lease`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch

from paceline.kv_layout import KvLayout


class ReadState(Enum):
    """RUNNING → DONE | FAILED, once."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ReadOutcome:
    """How a read ended. Times are Unix seconds."""

    state: ReadState
    num_bytes: int
    started_s: float
    ended_s: float
    error: str = ""


class ReadHandle(Protocol):
    """One read. While it is RUNNING, its destination blocks may be written at any moment."""

    @property
    def state(self) -> ReadState: ...

    def add_done_callback(self, callback: Callable[[ReadOutcome], None]) -> None:
        """Call back once, with DONE or FAILED, on any thread; at once if the read has ended
        already.
        """


class Channel(Protocol):
    """Messages between the two ends of a transport, in order, over the KV session."""

    def send(self, payload: bytes) -> None:
        """Queue a message; never blocks; dropped if the session is gone. Callable on any thread."""


@dataclass(frozen=True, slots=True)
class LocalPool:
    """A worker's own pool as transports see it."""

    worker_id: str
    incarnation: int
    layout: KvLayout
    num_blocks: int
    blocks: torch.Tensor
    """uint8 [num_blocks, layout.block_bytes], contiguous, on the pool's device."""


class Connection(Protocol):
    """The reader's end: one for each (reader, owner incarnation). Called on the io thread."""

    def read(self, lease_id: int, sources: Sequence[int], targets: Sequence[int]) -> ReadHandle:
        """Start to copy the owner's blocks `sources` into the reader's blocks `targets`, whole.

        Never blocks and never raises for a fault of the peer: the handle FAILS, at the latest when
        the connection has ended no read for twice the transport's time-out.
        """

    def probe(self, num_bytes: int) -> ReadHandle:
        """Move about `num_bytes` of no meaning into scratch memory, to see whether and how fast it
        works.
        """

    def on_message(self, payload: bytes) -> None:
        """Take a message from the owner's end."""

    def close(self) -> None:
        """Fail running reads and free everything. Returns when nothing can write to the targets any
        more.
        """


class OwnerPeer(Protocol):
    """The owner's end towards one reader. Called on the io thread."""

    def on_message(self, payload: bytes) -> None:
        """Take a message from the reader's end."""

    def close(self) -> None:
        """Stop serving and free everything of this reader."""


IsReadable = Callable[[int, Sequence[int]], bool]
"""(lease id, block ids) → whether the lease is alive and covers the blocks. Callable on any thread.
"""


class Transport(Protocol):
    """One way to move blocks, on one worker: as owner of `pool` and as reader into it."""

    name: str

    def endpoint(self) -> bytes:
        """Say what readers must know to reach this pool; goes into the session's welcome."""

    def accept(self, reader: str, channel: Channel, is_readable: IsReadable) -> OwnerPeer:
        """Begin to serve a reader, named `worker_id.incarnation`."""

    def connect(
        self, owner: str, owner_incarnation: int, endpoint: bytes, channel: Channel
    ) -> Connection:
        """Begin to read from an owner, named `worker_id.incarnation`.

        Raises TransportError when its endpoint cannot be reached at all.
        """

    def close(self) -> None:
        """Close every connection and peer and free what the transport holds."""
