"""Blocks between pools in GPU memory, through staging buffers, by transfers that are polled.

    owner     gather ─▶ send          gather ─▶ send            two buffers in turn: one on the
                           ║                      ║             wire, one filled or emptied
    reader             receive ─▶ scatter    receive ─▶ scatter
                                  └ in the gate, until it has ended on the GPU

A transfer between GPUs that has lost its peer ends neither well nor badly: it hangs. So nobody
waits for one without looking at the clock and at the communicator's abort. What could hang inside a
library, making a communicator and aborting it, runs on a thread of its own that nobody waits for.

*Visible before published*: the owner publishes KV only after the event of the step that wrote it
has completed on the host, so a gather that is launched after a GO sees it, on whatever stream. In
the same way a read is DONE only after the event of its last scatter has completed.

No byte tells the owner that the reader has a piece, as over Gloo: a send ends when its receive has
begun to take it, and the reader's confirmation is what frees the blocks.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from paceline.errors import TransportError
from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.communicator import WriteGate

logger = logging.getLogger(__name__)

NUM_STAGING = 2
# The first looks find what a fast link moves in tens of microseconds; a slow one costs the GIL less
# than 1 % of its time.
MIN_PAUSE_S, MAX_PAUSE_S = 20e-6, 500e-6
COPY_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 2.0


class Transfer(Protocol):
    """Work that was launched. Keeps its buffers."""

    def is_done(self) -> bool:
        """Look, without waiting. Raises RuntimeError when it has failed."""


class Wire(Protocol):
    """One side of a group of two and its staging buffers. Nothing here waits but `greet`, which may
    hang, and `abort`. Used by one thread at a time; `abort` by any.
    """

    num_blocks: int
    """Blocks in a staging buffer."""

    def greet(self) -> Transfer:
        """Exchange a block of no meaning, so that later transfers find all connections made."""

    def allocate(self, num_blocks: int) -> torch.Tensor:
        """Return blocks that hold garbage."""

    def upload(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the ids as int64 where the blocks are."""

    def send(self, blocks: torch.Tensor, ids: torch.Tensor, buffer: int) -> Transfer:
        """Gather blocks into a buffer and send them."""

    def receive(self, num_blocks: int, buffer: int) -> Transfer:
        """Receive blocks into a buffer."""

    def scatter(self, buffer: int, blocks: torch.Tensor, ids: torch.Tensor) -> Transfer:
        """Write a buffer's blocks to these."""

    def abort(self) -> None:
        """Make everything that was launched end, and free the group. May block, called once."""


class StagedCommunicator:
    """Satisfies `Communicator`."""

    def __init__(self, wire: Wire, start_thread: Callable[[str, Callable[[], None]], None]) -> None:
        self._wire = wire
        self._start_thread = start_thread
        self._lock = threading.Lock()
        self._is_aborted = False

    def scratch(self, num_blocks: int) -> torch.Tensor:
        return self._wire.allocate(num_blocks)

    def send_blocks(self, blocks: torch.Tensor, ids: Sequence[int], deadline: float) -> None:
        sent: deque[Transfer] = deque()
        for number, piece in enumerate(self._pieces(ids)):
            if len(sent) == NUM_STAGING:
                self.wait(sent.popleft(), deadline)
            sent.append(self._wire.send(blocks, piece, number % NUM_STAGING))
        for transfer in sent:
            self.wait(transfer, deadline)

    def receive_blocks(
        self, blocks: torch.Tensor, ids: Sequence[int], gate: WriteGate, deadline: float
    ) -> None:
        pieces = self._pieces(ids)
        coming = deque(
            self._wire.receive(len(piece), buffer)
            for buffer, piece in enumerate(pieces[:NUM_STAGING])
        )
        for number, piece in enumerate(pieces):
            self.wait(coming.popleft(), deadline)
            buffer = number % NUM_STAGING
            with gate:
                # Whatever else happens: the gate says that nothing writes any more.
                copy_deadline = time.monotonic() + COPY_TIMEOUT_S
                copy = self._wire.scatter(buffer, blocks, piece)
                _poll(copy, copy_deadline, "a copy within the GPU", lambda: False)
            if number + NUM_STAGING < len(pieces):
                self._raise_if_aborted()
                coming.append(self._wire.receive(len(pieces[number + NUM_STAGING]), buffer))

    def abort(self) -> None:
        with self._lock:
            if self._is_aborted:
                return
            self._is_aborted = True
        self._start_thread("kv-abort", self._wire.abort)

    def wait(
        self, transfer: Transfer, deadline: float, is_given_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Return when the transfer is done; raise TransportError when it is aborted or late."""
        _poll(transfer, deadline, "a transfer", lambda: self._is_aborted or is_given_up())
        # An abort ends transfers as if they were done.
        self._raise_if_aborted()

    def _raise_if_aborted(self) -> None:
        if self._is_aborted:
            raise TransportError("the communicator was aborted")

    def _pieces(self, ids: Sequence[int]) -> Sequence[torch.Tensor]:
        self._raise_if_aborted()
        uploaded, size = self._wire.upload(ids), self._wire.num_blocks
        return [uploaded[start : start + size] for start in range(0, len(ids), size)]


class StagedCommunicators:
    """Makes communicators on threads of their own; satisfies `CommunicatorFactory`."""

    def __init__(self, make_wire: Callable[[ChannelStore, int], Wire]) -> None:
        """make_wire(store, rank) meets the peer; it may hang."""
        self._make_wire = make_wire
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def connect(self, store: ChannelStore, rank: int, timeout_s: float) -> StagedCommunicator:
        deadline = time.monotonic() + timeout_s
        meeting = _Meeting(lambda: self._make_wire(store, rank))
        self._start_thread("kv-connect", meeting.run)
        try:
            _poll(meeting, deadline, "connecting", lambda: store.is_closed)
        except BaseException:
            if (wire := meeting.give_up()) is not None:
                self._start_thread("kv-abort", wire.abort)
            raise
        communicator = StagedCommunicator(meeting.wire, self._start_thread)
        try:
            communicator.wait(meeting.greeting, deadline, lambda: store.is_closed)
        except BaseException:
            communicator.abort()
            raise
        return communicator

    def close(self) -> None:
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        with self._lock:
            threads, self._threads = self._threads, []
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.error(
                    "event=kv_thread_hangs thread=%s timeout_s=%s", thread.name, CLOSE_TIMEOUT_S
                )

    def _start_thread(self, name: str, run: Callable[[], None]) -> None:
        def log_failure() -> None:
            try:
                run()
            except Exception:
                logger.exception("event=kv_thread_failed thread=%s", name)

        thread = threading.Thread(target=log_failure, name=name, daemon=True)
        with self._lock:
            self._threads = [known for known in self._threads if known.is_alive()]
            self._threads.append(thread)
            thread.start()


class _Meeting:
    """The making of a wire, on a thread; to whoever waits for it, a transfer."""

    wire: Wire
    greeting: Transfer

    def __init__(self, make_wire: Callable[[], Wire]) -> None:
        self._make_wire = make_wire
        self._lock = threading.Lock()
        self._made: Wire | None = None
        self._is_given_up = False
        self._error: Exception | None = None
        self._has_ended = False

    def run(self) -> None:
        try:
            wire = self._make_wire()
            with self._lock:
                self._made = wire
                is_given_up = self._is_given_up
            if is_given_up:
                wire.abort()
                return
            self.wire, self.greeting = wire, wire.greet()
        except Exception as error:
            self._error = error
        self._has_ended = True

    def is_done(self) -> bool:
        if self._error is not None:
            raise self._error
        return self._has_ended

    def give_up(self) -> Wire | None:
        """Return what the caller has to abort; what is made later is aborted here."""
        with self._lock:
            self._is_given_up = True
            return self._made


def _poll(transfer: Transfer, deadline: float, name: str, is_given_up: Callable[[], bool]) -> None:
    started_s = time.monotonic()
    pause_s = MIN_PAUSE_S
    while not transfer.is_done():
        if is_given_up():
            raise TransportError(f"{name} was given up")
        now = time.monotonic()
        if now > deadline:
            raise TransportError(f"{name} has not ended after {now - started_s:.3f} s")
        time.sleep(min(pause_s, max(0.0, deadline - now)))
        pause_s = min(pause_s * 1.5, MAX_PAUSE_S)
