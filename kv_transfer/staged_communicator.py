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
from functools import partial
from typing import Protocol

import torch

from paceline.errors import TransportError
from paceline.kv_transfer.communicator import WriteGate

logger = logging.getLogger(__name__)

NUM_STAGING = 2
# The first looks find what a fast link moves in tens of microseconds; a slow one costs the GIL less
# than 1 % of its time.
MIN_PAUSE_S, MAX_PAUSE_S = 20e-6, 500e-6
# A copy within the GPU takes well under a millisecond, behind the engine's kernels some more.
LONG_COPY_S = 10.0
# A launch takes some 50 µs. One that has not returned after this hangs in the library, and only the
# abort can end it.
LAUNCH_TIMEOUT_S = 1.0


class Transfer(Protocol):
    """Work that was launched. Keeps its buffers."""

    def is_done(self) -> bool:
        """Look, without waiting. Raises RuntimeError when it has failed."""


class Wire(Protocol):
    """One side of a group of two and its staging buffers. Nothing here waits but `greet`, which may
    hang, and `abort`. Used by one thread at a time; `abort` by any, but not while `greet`, `send`
    or `receive` runs, unless that hangs.
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
        """Make everything that was launched end, and free the group. May block, called once.

        Until it has returned, something may write to the buffers; when it raises, for ever.
        """


class StagedCommunicator:
    """Satisfies `Communicator`."""

    def __init__(
        self,
        wire: Wire,
        start_thread: Callable[[str, Callable[[], None]], None],
        abort_after_s: float = 0.0,
    ) -> None:
        """abort_after_s: how long the peer has to let go before this side's buffers do."""
        self._wire = wire
        self._start_thread = start_thread
        self._abort_after_s = abort_after_s
        self._lock = threading.Lock()
        self._is_aborted = False
        self._launching = threading.Lock()

    def greet(self) -> Transfer:
        return self._launch(self._wire.greet)

    def scratch(self, num_blocks: int) -> torch.Tensor:
        return self._wire.allocate(num_blocks)

    def send_blocks(self, blocks: torch.Tensor, ids: Sequence[int], deadline: float) -> None:
        sent: deque[Transfer] = deque()
        for number, piece in enumerate(self._pieces(ids)):
            if len(sent) == NUM_STAGING:
                self.wait(sent.popleft(), deadline)
            sent.append(self._launch(partial(self._wire.send, blocks, piece, number % NUM_STAGING)))
        for transfer in sent:
            self.wait(transfer, deadline)

    def receive_blocks(
        self, blocks: torch.Tensor, ids: Sequence[int], gate: WriteGate, deadline: float
    ) -> None:
        pieces = self._pieces(ids)
        coming = deque(
            self._launch(partial(self._wire.receive, len(piece), buffer))
            for buffer, piece in enumerate(pieces[:NUM_STAGING])
        )
        for number, piece in enumerate(pieces):
            self.wait(coming.popleft(), deadline)
            buffer = number % NUM_STAGING
            with gate:
                wait_for_copy(self._wire.scatter(buffer, blocks, piece))
            if number + NUM_STAGING < len(pieces):
                next_length = len(pieces[number + NUM_STAGING])
                coming.append(self._launch(partial(self._wire.receive, next_length, buffer)))

    def abort(self) -> None:
        with self._lock:
            if self._is_aborted:
                return
            self._is_aborted = True
        self._start_thread("kv-abort", self._abort_wire)

    def wait(
        self, transfer: Transfer, deadline: float, is_given_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Return when the transfer is done; raise TransportError when it is aborted or late."""
        poll(transfer, deadline, "a transfer", lambda: self._is_aborted or is_given_up())
        # An abort ends transfers as if they were done.
        self._raise_if_aborted()

    def _launch(self, launch: Callable[[], Transfer]) -> Transfer:
        with self._launching:
            self._raise_if_aborted()
            return launch()

    def _abort_wire(self) -> None:
        time.sleep(self._abort_after_s)
        # NCCL forbids an abort beside a launch: let the one that runs end. None begins after it.
        if self._launching.acquire(timeout=LAUNCH_TIMEOUT_S):
            self._launching.release()
        else:
            logger.error("event=kv_launch_hangs timeout_s=%s", LAUNCH_TIMEOUT_S)
        self._wire.abort()

    def _raise_if_aborted(self) -> None:
        if self._is_aborted:
            raise TransportError("the communicator was aborted")

    def _pieces(self, ids: Sequence[int]) -> Sequence[torch.Tensor]:
        self._raise_if_aborted()
        uploaded, size = self._wire.upload(ids), self._wire.num_blocks
        return [uploaded[start : start + size] for start in range(0, len(ids), size)]


def wait_for_copy(copy: Transfer) -> None:
    """Return when the copy has ended; raise RuntimeError when the device is broken.

    Without a deadline, alone in this package: until the copy has ended it may write to its blocks,
    and returning says that they may be used again. A device on which a copy does not end computes
    no steps either; the controller replaces a worker whose steps stand still.
    """
    started_s = time.monotonic()
    while True:
        try:
            poll(copy, time.monotonic() + LONG_COPY_S, "a copy within the GPU", lambda: False)
        except TransportError:
            waited_s = time.monotonic() - started_s
            logger.error("event=kv_copy_hangs waited_s=%.1f its_blocks=held", waited_s)
        else:
            return


def poll(transfer: Transfer, deadline: float, name: str, is_given_up: Callable[[], bool]) -> None:
    """Return when the transfer is done; raise TransportError when it is given up or late."""
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
