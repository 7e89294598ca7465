"""The reader's end of a `torch_distributed` pair: asks for blocks and receives them, in order.

A read's time begins when it is asked for, and again whenever the pair has ended another read: one
that only waits for its turn does not grow old. A communicator that broke takes one read with it;
those behind it are asked for again, under new numbers, and come over the next communicator.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.errors import TransportError
from paceline.kv_transfer.block_runs import find_fault
from paceline.kv_transfer.communicator import (
    READER_RANK,
    CommunicatorFactory,
    WriteGate,
    describe,
)
from paceline.kv_transfer.connect_backoff import ConnectBackoff
from paceline.kv_transfer.pair_end import PairEnd
from paceline.kv_transfer.pair_messages import Ask, Drop, Go, No, Put, decode
from paceline.kv_transfer.read_handle import PendingRead
from paceline.kv_transfer.transport import Channel, LocalPool

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Asked:
    """A read on its way; the answer is filled by the io thread. A probe's targets are scratch."""

    read: PendingRead
    targets: Sequence[int]
    lease_id: int
    sources: tuple[int, ...]
    is_probe: bool
    asked_s: float
    seq: int = 0
    """Of the last time that it was asked for."""
    answer: Go | No | None = None
    generation: int = 0
    """The communicator that a Go has named; 0 before that."""


class PairReader:
    """Reads from one owner on a thread of its own; satisfies `Connection`."""

    def __init__(
        self,
        owner: str,
        num_owner_blocks: int,
        pool: LocalPool,
        channel: Channel,
        communicators: CommunicatorFactory,
        timeout_s: float,
    ) -> None:
        self.end = PairEnd(owner, channel, communicators, READER_RANK, timeout_s)
        self._num_owner_blocks = num_owner_blocks
        self._pool = pool
        self._gate = WriteGate()
        self._backoff = ConnectBackoff(owner)  # guarded by `end.changed`
        # As many as there are running reads, which the blocks that they write bound.
        self._asked: deque[_Asked] = deque()
        self._progress_s = time.monotonic()
        self._is_suspect = False
        """Whether a read was late, and none has ended since."""
        self._last_seq = 0
        self._connected_generation = 0

    def read(self, lease_id: int, sources: Sequence[int], targets: Sequence[int]) -> PendingRead:
        read = PendingRead(len(sources) * self._pool.layout.block_bytes)
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
            self._begin(read, tuple(targets), lease_id, tuple(sources))
        return read

    def probe(self, num_bytes: int) -> PendingRead:
        block_bytes = self._pool.layout.block_bytes
        count = min(max(1, num_bytes // block_bytes), self._num_owner_blocks)
        read = PendingRead(count * block_bytes)
        self._begin(read, range(count), lease_id=0, sources=(), is_probe=True)
        return read

    def on_message(self, payload: bytes) -> None:
        message = decode(payload)
        match message:
            case Go() | No():
                self._take_answer(message)
            case Put():
                self.end.take_put(message)
            case _:
                raise TransportError(f"{self.end.peer} owns the blocks, and sent {message}")

    def close(self) -> None:
        with self.end.changed:
            asked, self._asked = list(self._asked), deque()
            if asked and not self.end.is_closing:
                self.end.send(Drop(asked[-1].seq))  # the owner lets go first, as in `_give_up`
        self.end.begin_close()
        self._gate.shut()
        for one in asked:
            one.read.fail("the connection was closed")

    def _begin(
        self,
        read: PendingRead,
        targets: Sequence[int],
        lease_id: int,
        sources: tuple[int, ...],
        is_probe: bool = False,
    ) -> None:
        end, now = self.end, time.monotonic()
        with end.changed:
            if end.is_closing:
                refusal = "the connection is closed"
            elif (reason := self._backoff.refusal(now)) is not None:
                refusal = f"reading from {end.peer} is held back: {reason}"
            else:
                asked = _Asked(read, targets, lease_id, sources, is_probe, now)
                self._asked.append(asked)
                self._ask(asked)
                end.changed.notify_all()
                end.start(self._run)
                return
        read.fail(refusal)

    def _ask(self, asked: _Asked) -> None:
        """Ask for a read, perhaps again. Called with `changed` held, so that asks are sent in the
        order of their numbers.
        """
        self._last_seq += 1
        asked.seq, asked.answer, asked.generation = self._last_seq, None, 0
        num_bytes = asked.read.num_bytes
        self.end.send(Ask(asked.seq, asked.lease_id, num_bytes, asked.is_probe, asked.sources))

    def _deadline(self, asked: _Asked) -> float:
        return max(asked.asked_s, self._progress_s) + self.end.timeout_s

    def _take_answer(self, answer: Go | No) -> None:
        end = self.end
        with end.changed:
            asked = next((one for one in self._asked if one.seq == answer.seq), None)
            if asked is None:
                return  # given up here, and the owner has been told
            was_promised = isinstance(asked.answer, Go)
            asked.answer = answer
            if isinstance(answer, Go):
                asked.generation = answer.generation
                if answer.generation > end.generation:
                    end.begin_generation(answer.generation)
            end.changed.notify_all()
        if was_promised and isinstance(answer, No):
            end.interrupt(answer.reason)

    def _run(self) -> None:
        while (asked := self._next()) is not None:
            try:
                self._receive(asked)
            except (TransportError, RuntimeError) as error:
                self._give_up(asked, describe(error))
            except Exception as error:
                logger.exception("a KV read failed; owner=%s", self.end.peer)
                self._give_up(asked, repr(error))

    def _next(self) -> _Asked | None:
        """The oldest read, once it is answered or late; None when the connection closes."""
        end = self.end
        with end.changed:
            end.changed.wait_for(lambda: self._asked or end.is_closing)
            if end.is_closing:
                return None
            asked = self._asked[0]
            end.changed.wait_for(
                lambda: asked.answer is not None or end.is_closing,
                self._deadline(asked) - time.monotonic(),
            )
            return None if end.is_closing else asked

    def _receive(self, asked: _Asked) -> None:
        match asked.answer:
            case None:
                raise TransportError("the owner did not answer")
            case No(_, reason) if asked.generation:
                raise TransportError(reason)
            case No(_, reason):
                self._forget(asked)
                asked.read.fail(f"{self.end.peer} refused the read: {reason}")
            case Go(_, generation):
                deadline = self._deadline(asked)
                communicator = self.end.communicator(generation, deadline)
                if communicator is None:
                    raise TransportError(f"communicator {generation} was given up")
                with self.end.changed:
                    self._connected_generation = generation
                    self._backoff.connected()
                blocks = self._pool.blocks
                if asked.is_probe:
                    blocks = communicator.scratch(len(asked.targets))
                communicator.receive_blocks(blocks, asked.targets, self._gate, deadline)
                self._forget(asked)
                asked.read.finish()

    def _give_up(self, asked: _Asked, error: str) -> None:
        """Drop the communicator, fail the read and ask for the others again.

        Others fail with it when pairs cannot connect, and when they are late too and nothing has
        ended since the last late read: a pair that stands still gets one more try.
        """
        end, now = self.end, time.monotonic()
        failed, is_broken = [asked], True
        with end.changed:
            if isinstance(asked.answer, No):
                # The owner goes on: the communicator is dropped, and may have a successor.
                error, is_broken = asked.answer.reason, False
            elif self._is_late(asked, now):
                error = f"not done within kv.read_timeout_s, {end.timeout_s} s ({error})"
                if self._is_suspect:
                    failed = [one for one in self._asked if self._is_late(one, now)]
                self._is_suspect, self._progress_s = True, now
            if asked.generation > self._connected_generation and not end.is_closing:
                self._backoff.failed(error, now)
                if self._backoff.refusal(now) is not None:
                    failed, is_broken = list(self._asked), True
            self._asked = deque(one for one in self._asked if one not in failed)
            if is_broken:
                # The owner is told before the abort: until it lets go, it may write to what the
                # abort frees.
                if not end.is_closing:
                    end.send(Drop(self._last_seq))
                end.interrupt(error)
                for one in self._asked:
                    self._ask(one)
        for one in failed:
            one.read.fail(f"reading from {self.end.peer} failed: {error}")

    def _is_late(self, asked: _Asked, now: float) -> bool:
        return self._deadline(asked) < now + 0.01

    def _forget(self, asked: _Asked) -> None:
        """Take out a read that has ended: the pair moves."""
        with self.end.changed:
            self._progress_s, self._is_suspect = time.monotonic(), False
            if asked in self._asked:
                self._asked.remove(asked)
