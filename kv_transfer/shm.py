"""Transport `shm`: a reader on the owner's host maps its pool and copies blocks out of it.

One-sided: the owner takes no part in a read and learns nothing of it, so that a read goes on while
the owner is busy, stopped or dead. Copies run on one transfer thread for each worker, with the GIL
released. They are NumPy's: torch would start threads of its own under each thread that copies.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from paceline.errors import TransportError
from paceline.kv_transfer.block_runs import BlockRun, block_runs, find_fault
from paceline.kv_transfer.pool_memory import ByteArray, MemoryAddress, PeerMemory, PoolMemory
from paceline.kv_transfer.read_handle import PendingRead
from paceline.kv_transfer.transport import Channel, IsReadable, LocalPool

logger = logging.getLogger(__name__)

# About a millisecond of copying between two looks at the deadline and at `close`.
MAX_COPY_BYTES = 8 << 20


class ShmTransport:
    """Owner of a pool in `memory` and reader into it."""

    name = "shm"

    def __init__(self, pool: LocalPool, memory: PoolMemory, read_timeout_s: float) -> None:
        if pool.blocks.data_ptr() != memory.tensor.data_ptr():
            raise ValueError("the pool's blocks do not start where its shared memory starts")
        self.pool = pool
        self.read_timeout_s = read_timeout_s
        self._memory = memory
        self._connections: set[ShmConnection] = set()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-shm")

    def endpoint(self) -> bytes:
        return self._memory.address().encode()

    def accept(self, reader: str, channel: Channel, is_readable: IsReadable) -> "ShmOwnerPeer":
        return ShmOwnerPeer()

    def connect(
        self, owner: str, owner_incarnation: int, endpoint: bytes, channel: Channel
    ) -> "ShmConnection":
        address = MemoryAddress.decode(endpoint)
        if address.name != owner:
            raise TransportError(
                f"the endpoint of {owner} names the memory of {address.name}: the peer is not "
                "who it should be"
            )
        connection = ShmConnection(self, self._executor, PeerMemory.open(address))
        self._connections.add(connection)
        return connection

    def forget(self, connection: "ShmConnection") -> None:
        """Called by a connection that has closed."""
        self._connections.discard(connection)

    def close(self) -> None:
        for connection in list(self._connections):
            connection.close()
        self._executor.shutdown()


class ShmOwnerPeer:
    """The owner's end: nothing to do."""

    def on_message(self, payload: bytes) -> None:
        raise TransportError(f"shm exchanges no messages, got {len(payload)} bytes from the reader")

    def close(self) -> None:
        pass


class ShmConnection:
    """The reader's end."""

    def __init__(
        self, transport: ShmTransport, executor: ThreadPoolExecutor, memory: PeerMemory
    ) -> None:
        self._transport = transport
        self._executor = executor
        self._memory = memory
        block_bytes = transport.pool.layout.block_bytes
        self._num_source_blocks = memory.array.size // block_bytes
        self._targets: ByteArray = transport.pool.blocks.numpy()
        self._max_blocks = max(1, MAX_COPY_BYTES // block_bytes)
        self._lock = threading.Lock()
        self._jobs: dict[PendingRead, Future[None]] = {}
        self._closing = False

    def read(self, lease_id: int, sources: Sequence[int], targets: Sequence[int]) -> PendingRead:
        pool = self._transport.pool
        read = PendingRead(len(sources) * pool.layout.block_bytes)
        fault = find_fault(
            sources,
            targets,
            num_source_blocks=self._num_source_blocks,
            num_target_blocks=pool.num_blocks,
        )
        if fault is not None:
            read.fail(fault)
        else:
            self._start(read, list(block_runs(sources, targets, self._max_blocks)), self._targets)
        return read

    def probe(self, num_bytes: int) -> PendingRead:
        block_bytes = self._transport.pool.layout.block_bytes
        count = min(max(1, num_bytes // block_bytes), self._num_source_blocks)
        read = PendingRead(count * block_bytes)
        ids = range(count)
        scratch = np.empty((count, block_bytes), np.uint8)
        self._start(read, list(block_runs(ids, ids, self._max_blocks)), scratch)
        return read

    def on_message(self, payload: bytes) -> None:
        raise TransportError(f"shm exchanges no messages, got {len(payload)} bytes from the owner")

    def close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
            jobs = dict(self._jobs)
        for read, job in jobs.items():
            if job.cancel():
                read.fail("the connection was closed")
        # At most one is running; it ends within one run of blocks.
        wait([job for job in jobs.values() if not job.cancelled()])
        self._memory.close()
        self._transport.forget(self)

    def _start(self, read: PendingRead, runs: list[BlockRun], targets: ByteArray) -> None:
        with self._lock:
            if not self._closing:
                self._jobs[read] = self._executor.submit(self._copy, read, runs, targets)
                return
        read.fail("the connection is closed")

    def _copy(self, read: PendingRead, runs: list[BlockRun], targets: ByteArray) -> None:
        try:
            fault = self._copy_runs(read, runs, targets)
        except Exception as error:
            logger.exception("kv read failed transport=shm")
            fault = f"copying failed: {error!r}"
        with self._lock:
            del self._jobs[read]
        if fault is None:
            read.finish()
        else:
            read.fail(fault)

    def _copy_runs(self, read: PendingRead, runs: list[BlockRun], targets: ByteArray) -> str | None:
        block_bytes = targets.shape[1]
        sources = self._memory.array[: self._num_source_blocks * block_bytes]
        sources = sources.reshape(self._num_source_blocks, block_bytes)
        # From here on: a copy that waits for others of this worker does not grow old.
        deadline = time.monotonic() + self._transport.read_timeout_s
        for source, target, count in runs:
            if self._closing:
                return "the connection was closed"
            if time.monotonic() > deadline:
                return (
                    f"{read.num_bytes} bytes were not copied within kv.read_timeout_s, "
                    f"{self._transport.read_timeout_s} s"
                )
            targets[target : target + count] = sources[source : source + count]
        return None
