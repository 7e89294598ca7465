"""Makes staged communicators, and bears with a library that hangs while they connect or abort."""

import logging
import threading
import time
from collections.abc import Callable

from paceline.errors import TransportError
from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.communicator import READER_RANK
from paceline.kv_transfer.staged_communicator import StagedCommunicator, Transfer, Wire, poll

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
# Connects that hang in the library are lost threads; so many say that the next would hang too.
MAX_HANGING_CONNECTS = 8
# The owner's sends may write to the reader's memory. It is told first, by message, and aborts on
# its side; the reader frees that memory this much later.
READER_ABORTS_AFTER_S = 0.05


class StagedCommunicators:
    """Makes communicators on threads of their own; satisfies `CommunicatorFactory`."""

    def __init__(self, make_wire: Callable[[ChannelStore, int], Wire]) -> None:
        """make_wire(store, rank) meets the peer; it may hang."""
        self._make_wire = make_wire
        self._threads: list[threading.Thread] = []
        self._given_up: list[_Meeting] = []
        # What could not be aborted, with its buffers: a receive may still write to them, and what
        # the allocator gave them to next would be the engine's. Kept on purpose, for ever.
        self._leaked: list[object] = []
        self._lock = threading.Lock()

    def connect(self, store: ChannelStore, rank: int, timeout_s: float) -> StagedCommunicator:
        self._check_hanging()
        deadline = time.monotonic() + timeout_s
        meeting = _Meeting(lambda: self._make(store, rank))
        self._start_thread("kv-connect", meeting.run)
        try:
            poll(meeting, deadline, "connecting", lambda: store.is_closed)
        except BaseException:
            with self._lock:
                self._given_up.append(meeting)
            meeting.give_up()
            raise
        communicator = meeting.communicator
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

    def _make(self, store: ChannelStore, rank: int) -> StagedCommunicator:
        abort_after_s = READER_ABORTS_AFTER_S if rank == READER_RANK else 0.0
        return StagedCommunicator(self._make_wire(store, rank), self._start_thread, abort_after_s)

    def _check_hanging(self) -> None:
        with self._lock:
            self._given_up = [meeting for meeting in self._given_up if not meeting.has_ended]
            num_hanging = len(self._given_up)
        if num_hanging >= MAX_HANGING_CONNECTS:
            raise TransportError(
                f"{num_hanging} connects to peers hang in NCCL, and no more are tried until one "
                "ends. Check that peers can reach the interface of kv.listen_host on every port "
                "(firewall) and that all workers run the same version of NCCL; then restart this "
                "worker"
            )

    def _start_thread(self, name: str, run: Callable[[], None]) -> None:
        def log_failure() -> None:
            try:
                run()
            except Exception:
                logger.exception("event=kv_thread_failed thread=%s", name)
                self._leaked.append(run)

        thread = threading.Thread(target=log_failure, name=name, daemon=True)
        with self._lock:
            self._threads = [known for known in self._threads if known.is_alive()]
            self._threads.append(thread)
            thread.start()


class _Meeting:
    """The making of a communicator, on a thread; to whoever waits for it, a transfer."""

    communicator: StagedCommunicator
    greeting: Transfer

    def __init__(self, make: Callable[[], StagedCommunicator]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: StagedCommunicator | None = None
        self._is_given_up = False
        self._error: Exception | None = None
        self.has_ended = False

    def run(self) -> None:
        try:
            made = self._make()
            with self._lock:
                self._made = made
                is_given_up = self._is_given_up
            if is_given_up:
                made.abort()
            else:
                self.communicator, self.greeting = made, made.greet()
        except Exception as error:
            self._error = error
        self.has_ended = True

    def is_done(self) -> bool:
        if self._error is not None:
            raise self._error
        return self.has_ended

    def give_up(self) -> None:
        """Abort what was made, or what will be."""
        with self._lock:
            self._is_given_up = True
            made = self._made
        if made is not None:
            made.abort()
