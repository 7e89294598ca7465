"""The owner's end of a `torch_distributed` pair: answers asks and sends blocks, in order."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from paceline.errors import TransportError
from paceline.kv_transfer.block_runs import find_fault
from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.communicator import OWNER_RANK, Communicator, GlooDevice
from paceline.kv_transfer.pair_messages import Ask, Drop, Go, No, Put, decode, encode
from paceline.kv_transfer.transport import Channel, IsReadable, LocalPool

logger = logging.getLogger(__name__)


class PairOwner:
    """Serves one reader on a thread of its own; satisfies `OwnerPeer`."""

    def __init__(
        self,
        reader: str,
        pool: LocalPool,
        channel: Channel,
        is_readable: IsReadable,
        device: GlooDevice,
        timeout_s: float,
    ) -> None:
        self.peer = reader
        self._pool = pool
        self._blocks = pool.blocks.numpy()
        self._channel = channel
        self._is_readable = is_readable
        self._device = device
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._asks: deque[Ask] = deque()
        self._dropped_seq = 0
        """The reader has given up everything up to here."""
        self._generation = 0
        self._store: ChannelStore | None = None
        self._communicator: Communicator | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"kv-send-{reader}", daemon=True)
        self._started = False

    def on_message(self, payload: bytes) -> None:
        message = decode(payload)
        match message:
            case Ask():
                self._take(message)
            case Drop(seq):
                with self._changed:
                    self._dropped_seq = max(self._dropped_seq, seq)
                self._break(f"{self.peer} gave up its read {seq}")
            case Put(generation, key, value):
                with self._changed:
                    store = self._store if generation == self._generation else None
                if store is not None:
                    store.receive(key, value)
            case _:
                raise TransportError(f"{self.peer} reads here, and sent {message}")

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._break("the owner closed the connection")

    @property
    def has_ended(self) -> bool:
        return self._closing and not self._thread.is_alive()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread after `close`; say whether it has ended."""
        if self._started:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _take(self, ask: Ask) -> None:
        with self._changed:
            if self._closing:
                return
            self._asks.append(ask)
            self._changed.notify_all()
            if not self._started:
                self._started = True
                self._thread.start()

    def _break(self, reason: str) -> None:
        """Make the thread give up what it does on the wire, and the communicator with it."""
        with self._changed:
            store, communicator = self._store, self._communicator
        if store is not None:
            store.close(reason)
        if communicator is not None:
            communicator.abort()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asks or self._closing)
                if self._closing:
                    break
                ask = self._asks.popleft()
            try:
                self._serve(ask)
            except (TransportError, RuntimeError) as error:
                self._fail(ask, str(error))
            except Exception as error:
                logger.exception("serving a KV read failed; reader=%s", self.peer)
                self._fail(ask, repr(error))
        self._drop_communicator()

    def _serve(self, ask: Ask) -> None:
        refusal = self._refusal(ask)
        if refusal is not None:
            self._channel.send(encode(No(ask.seq, refusal)))
            return
        deadline = time.monotonic() + self._timeout_s
        store = self._begin(ask)
        if store is None:
            return
        if self._communicator is None:
            communicator = Communicator(
                self._device, store, OWNER_RANK, self._pool.layout.block_bytes, self._timeout_s
            )
            with self._changed:
                self._communicator = communicator
                if self._closing or ask.seq <= self._dropped_seq:
                    raise TransportError("the reader gave up while the pair was being made")
        self._communicator.send_blocks(self._blocks, _sources(ask, self._pool), deadline)

    def _refusal(self, ask: Ask) -> str | None:
        block_bytes = self._pool.layout.block_bytes
        sources = _sources(ask, self._pool)
        if not sources or len(sources) * block_bytes != ask.num_bytes:
            return f"{len(sources)} blocks of {block_bytes} bytes are not {ask.num_bytes} bytes"
        num_blocks = self._pool.num_blocks
        fault = find_fault(
            sources,
            range(len(sources)),
            num_source_blocks=num_blocks,
            num_target_blocks=len(sources),
        )
        if fault is not None:
            return fault
        if not ask.is_probe and not self._is_readable(ask.lease_id, sources):
            return f"lease {ask.lease_id:#x} is over or does not cover the {len(sources)} blocks"
        return None

    def _begin(self, ask: Ask) -> ChannelStore | None:
        """Tell the reader that its blocks follow; None when it does not want them any more."""
        with self._changed:
            if self._closing or ask.seq <= self._dropped_seq:
                return None
            if self._store is None:
                self._generation += 1
                self._store = self._new_store(self._generation)
            # Within the lock: a Drop comes either before, and is seen, or after, and breaks the store.
            self._channel.send(encode(Go(ask.seq, self._generation)))
            return self._store

    def _new_store(self, generation: int) -> ChannelStore:
        def put(key: str, value: bytes) -> None:
            self._channel.send(encode(Put(generation, key, value)))

        return ChannelStore(put, self._timeout_s)

    def _fail(self, ask: Ask, error: str) -> None:
        self._drop_communicator()
        with self._changed:
            is_awaited = not self._closing and ask.seq > self._dropped_seq
        if is_awaited:
            logger.warning("kv read failed reader=%s seq=%d error=%s", self.peer, ask.seq, error)
            self._channel.send(encode(No(ask.seq, error)))

    def _drop_communicator(self) -> None:
        with self._changed:
            self._store = self._communicator = None


def _sources(ask: Ask, pool: LocalPool) -> Sequence[int]:
    """A probe's bytes mean nothing: those of the pool's first blocks will do."""
    if ask.is_probe:
        return range(min(ask.num_bytes // pool.layout.block_bytes, pool.num_blocks))
    return ask.sources
