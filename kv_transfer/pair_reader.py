"""The reader's end of a `torch_distributed` pair: asks for blocks and receives them, in order."""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paceline.errors import TransportError
from paceline.kv_transfer.block_runs import find_fault
from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.communicator import READER_RANK, Communicator, GlooDevice, WriteGate
from paceline.kv_transfer.pair_messages import Ask, Drop, Go, No, Put, decode, encode
from paceline.kv_transfer.pool_memory import ByteArray
from paceline.kv_transfer.read_handle import PendingRead
from paceline.kv_transfer.transport import Channel, LocalPool, ReadState

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Asked:
    """A read on its way; `answer` is filled by the io thread."""

    seq: int
    read: PendingRead
    blocks: ByteArray
    targets: Sequence[int]
    answer: Go | No | None = None


class PairReader:
    """Reads from one owner on a thread of its own; satisfies `Connection`."""

    def __init__(
        self,
        owner: str,
        num_owner_blocks: int,
        pool: LocalPool,
        channel: Channel,
        device: GlooDevice,
        timeout_s: float,
    ) -> None:
        self.peer = owner
        self._num_owner_blocks = num_owner_blocks
        self._pool = pool
        self._blocks = pool.blocks.numpy()
        self._channel = channel
        self._device = device
        self._timeout_s = timeout_s
        self._gate = WriteGate()
        self._changed = threading.Condition()
        self._asked: deque[_Asked] = deque()
        self._last_seq = 0
        self._generation = 0
        """The newest that the owner has announced."""
        self._store: ChannelStore | None = None
        self._communicator: Communicator | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"kv-recv-{owner}", daemon=True)
        self._started = False

    def read(self, lease_id: int, sources: Sequence[int], targets: Sequence[int]) -> PendingRead:
        read = PendingRead(len(sources) * self._pool.layout.block_bytes, self._timeout_s)
        fault = find_fault(
            sources,
            targets,
            num_source_blocks=self._num_owner_blocks,
            num_target_blocks=self._pool.num_blocks,
        )
        if fault is not None:
            read.fail(fault)
        elif not sources:
            read.finish()
        else:
            self._ask(read, lease_id, tuple(sources), self._blocks, tuple(targets))
        return read

    def probe(self, num_bytes: int) -> PendingRead:
        block_bytes = self._pool.layout.block_bytes
        count = min(max(1, num_bytes // block_bytes), self._num_owner_blocks)
        read = PendingRead(count * block_bytes, self._timeout_s)
        scratch = np.empty((count, block_bytes), np.uint8)
        self._ask(read, 0, (), scratch, range(count), is_probe=True)
        return read

    def on_message(self, payload: bytes) -> None:
        message = decode(payload)
        match message:
            case Go() | No():
                self._take_answer(message)
            case Put(generation, key, value):
                with self._changed:
                    store = self._store if generation == self._generation else None
                if store is not None:
                    store.receive(key, value)
            case _:
                raise TransportError(f"{self.peer} owns the blocks, and sent {message}")

    def close(self) -> None:
        with self._changed:
            self._closing = True
            asked, self._asked = list(self._asked), deque()
            self._changed.notify_all()
        self._gate.shut()
        self._break("the connection was closed")
        for one in asked:
            one.read.fail("the connection was closed")

    @property
    def has_ended(self) -> bool:
        return self._closing and not self._thread.is_alive()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread after `close`; say whether it has ended."""
        if self._started:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _ask(
        self,
        read: PendingRead,
        lease_id: int,
        sources: tuple[int, ...],
        blocks: ByteArray,
        targets: Sequence[int],
        is_probe: bool = False,
    ) -> None:
        with self._changed:
            if not self._closing:
                self._last_seq += 1
                seq = self._last_seq
                self._asked.append(_Asked(seq, read, blocks, targets))
                # Within the lock, so that asks are sent in the order of their numbers.
                self._channel.send(encode(Ask(seq, lease_id, read.num_bytes, is_probe, sources)))
                self._changed.notify_all()
                if not self._started:
                    self._started = True
                    self._thread.start()
                return
        read.fail("the connection is closed")

    def _take_answer(self, answer: Go | No) -> None:
        with self._changed:
            asked = next((one for one in self._asked if one.seq == answer.seq), None)
            if asked is None:
                return  # given up here; the owner has been told
            was_promised = isinstance(asked.answer, Go)
            asked.answer = answer
            if isinstance(answer, Go) and answer.generation > self._generation:
                self._generation = answer.generation
                self._store = self._new_store(answer.generation)
            self._changed.notify_all()
        if was_promised and isinstance(answer, No):
            self._break(answer.reason)

    def _new_store(self, generation: int) -> ChannelStore:
        def put(key: str, value: bytes) -> None:
            self._channel.send(encode(Put(generation, key, value)))

        return ChannelStore(put, self._timeout_s)

    def _break(self, reason: str) -> None:
        """Make the thread give up what it does on the wire, and the communicator with it."""
        with self._changed:
            store, communicator = self._store, self._communicator
        if store is not None:
            store.close(reason)
        if communicator is not None:
            communicator.abort()

    def _run(self) -> None:
        while (asked := self._next()) is not None:
            try:
                self._receive(asked)
            except (TransportError, RuntimeError) as error:
                self._give_up(asked, str(error))
            except Exception as error:
                logger.exception("a KV read failed; owner=%s", self.peer)
                self._give_up(asked, repr(error))
        with self._changed:
            self._store = self._communicator = None

    def _next(self) -> _Asked | None:
        """The oldest read once it is answered or late; None when the connection closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._asked or self._closing)
            if self._closing:
                return None
            asked = self._asked[0]
            self._changed.wait_for(
                lambda: asked.answer is not None or self._closing, asked.read.remaining_s
            )
            return None if self._closing else asked

    def _receive(self, asked: _Asked) -> None:
        answer = asked.answer
        if answer is None:
            raise TransportError(
                f"{self.peer} did not answer within kv.read_timeout_s, {self._timeout_s} s"
            )
        if isinstance(answer, No):
            self._end(asked)
            asked.read.fail(f"{self.peer} refused the read: {answer.reason}")
            return
        communicator = self._communicator_of(answer, asked.read)
        communicator.receive_blocks(asked.blocks, asked.targets, self._gate, asked.read.deadline)
        self._end(asked)
        asked.read.finish()
