"""The owner's end of a `torch_distributed` pair: answers asks and sends blocks, in order."""

import logging
import time
from collections import deque
from collections.abc import Sequence

from paceline.errors import TransportError
from paceline.kv_transfer.block_runs import find_fault
from paceline.kv_transfer.communicator import OWNER_RANK, CommunicatorFactory, describe
from paceline.kv_transfer.pair_end import PairEnd
from paceline.kv_transfer.pair_messages import Ask, Drop, Go, No, Put, decode
from paceline.kv_transfer.transport import Channel, IsReadable, LocalPool

logger = logging.getLogger(__name__)

MAX_ASKS = 65_536
"""That wait; a reader has one for each read that runs, and many fewer sequences than this."""


class PairOwner:
    """Serves one reader on a thread of its own; satisfies `OwnerPeer`."""

    def __init__(
        self,
        reader: str,
        pool: LocalPool,
        channel: Channel,
        is_readable: IsReadable,
        communicators: CommunicatorFactory,
        timeout_s: float,
    ) -> None:
        self.end = PairEnd(reader, channel, communicators, OWNER_RANK, timeout_s)
        self._pool = pool
        self._is_readable = is_readable
        self._asks: deque[Ask] = deque()
        self._dropped_seq = 0
        """The reader has given up everything up to here."""

    def on_message(self, payload: bytes) -> None:
        end, message = self.end, decode(payload)
        match message:
            case Ask():
                with end.changed:
                    if len(self._asks) >= MAX_ASKS:
                        raise TransportError(f"{end.peer} has more than {MAX_ASKS} reads waiting")
                    if not end.is_closing:
                        self._asks.append(message)
                        end.changed.notify_all()
                        end.start(self._run)
            case Drop(seq):
                with end.changed:
                    self._dropped_seq = max(self._dropped_seq, seq)
                end.interrupt(f"{end.peer} gave up its read {seq}")
            case Put():
                end.take_put(message)
            case _:
                raise TransportError(f"{end.peer} reads here, and sent {message}")

    def close(self) -> None:
        self.end.begin_close()

    def _run(self) -> None:
        while (ask := self._next()) is not None:
            try:
                self._serve(ask)
            except (TransportError, RuntimeError) as error:
                self._fail(ask, describe(error))
            except Exception as error:
                logger.exception("serving a KV read failed; reader=%s", self.end.peer)
                self._fail(ask, repr(error))

    def _next(self) -> Ask | None:
        with self.end.changed:
            self.end.changed.wait_for(lambda: self._asks or self.end.is_closing)
            return None if self.end.is_closing else self._asks.popleft()

    def _serve(self, ask: Ask) -> None:
        refusal = self._refusal(ask)
        if refusal is not None:
            self.end.send(No(ask.seq, refusal))
            return
        deadline = time.monotonic() + self.end.timeout_s
        generation = self._announce(ask)
        if generation is None:
            return
        communicator = self.end.communicator(generation, deadline)
        if communicator is None:
            raise TransportError(f"{self.end.peer} gave up while the pair was being made")
        communicator.send_blocks(self._pool.blocks, _sources(ask, self._pool), deadline)

    def _announce(self, ask: Ask) -> int | None:
        """Tell the reader that its blocks follow; None when it does not want them any more."""
        end = self.end
        with end.changed:
            if not self._is_awaited(ask):
                return None
            if not end.has_rendezvous:
                end.begin_generation(end.generation + 1)
            # Within the lock: a Drop comes either before and is seen, or after and interrupts.
            end.send(Go(ask.seq, end.generation))
            return end.generation

    def _refusal(self, ask: Ask) -> str | None:
        block_bytes = self._pool.layout.block_bytes
        sources = _sources(ask, self._pool)
        if not sources or len(sources) * block_bytes != ask.num_bytes:
            return f"{len(sources)} blocks of {block_bytes} bytes are not {ask.num_bytes} bytes"
        fault = find_fault(
            sources,
            range(len(sources)),
            num_source_blocks=self._pool.num_blocks,
            num_target_blocks=len(sources),
        )
        if fault is not None:
            return fault
        if not ask.is_probe and not self._is_readable(ask.lease_id, sources):
            return f"lease {ask.lease_id:#x} is over or does not cover the {len(sources)} blocks"
        return None

    def _fail(self, ask: Ask, error: str) -> None:
        self.end.interrupt(error)
        with self.end.changed:
            is_awaited = self._is_awaited(ask)
        if is_awaited:
            logger.warning(
                "kv_read=failed reader=%s seq=%d error=%s", self.end.peer, ask.seq, error
            )
            self.end.send(No(ask.seq, error))

    def _is_awaited(self, ask: Ask) -> bool:
        return not self.end.is_closing and ask.seq > self._dropped_seq


def _sources(ask: Ask, pool: LocalPool) -> Sequence[int]:
    """A probe's bytes mean nothing: those of the pool's first blocks will do."""
    if ask.is_probe:
        return range(min(ask.num_bytes // pool.layout.block_bytes, pool.num_blocks))
    return ask.sources
