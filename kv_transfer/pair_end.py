"""What both ends of a `torch_distributed` pair have: a thread, a rendezvous, a communicator."""

import threading
import time
from collections.abc import Callable

from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.communicator import OWNER_RANK, Communicator, CommunicatorFactory
from paceline.kv_transfer.pair_messages import PairMessage, Put, encode
from paceline.kv_transfer.transport import Channel


class PairEnd:
    """State of one end, guarded by `changed`; the io thread and the end's own thread meet here."""

    def __init__(
        self,
        peer: str,
        channel: Channel,
        communicators: CommunicatorFactory,
        rank: int,
        timeout_s: float,
    ) -> None:
        self.peer = peer
        self.timeout_s = timeout_s
        self.changed = threading.Condition()
        self.is_closing = False
        self.generation = 0
        """Number of the newest communicator that the owner has announced."""
        self._channel = channel
        self._communicators = communicators
        self._rank = rank
        self._store: ChannelStore | None = None
        self._communicator: Communicator | None = None
        self._thread: threading.Thread | None = None

    def send(self, message: PairMessage) -> None:
        self._channel.send(encode(message))

    def start(self, run: Callable[[], None]) -> None:
        """Start the thread with the end's loop if it does not run. Called with `changed` held."""
        if self._thread is None:
            name = f"kv-{'send' if self._rank == OWNER_RANK else 'recv'}-{self.peer}"
            self._thread = threading.Thread(
                target=self._run_and_free, args=(run,), name=name, daemon=True
            )
            self._thread.start()

    def begin_generation(self, generation: int) -> None:
        """Open the rendezvous of a new communicator. Called with `changed` held."""
        self.interrupt("a newer communicator takes its place")
        self.generation = generation
        self._store = ChannelStore(lambda key, value: self.send(Put(generation, key, value)))

    @property
    def has_rendezvous(self) -> bool:
        """Whether a communicator exists or is being made. Asked with `changed` held."""
        return self._store is not None

    def take_put(self, put: Put) -> None:
        with self.changed:
            store = self._store if put.generation == self.generation else None
        if store is not None:
            store.receive(put.key, put.value)

    def communicator(self, generation: int, deadline: float) -> Communicator | None:
        """Return the communicator of this generation; None when it has been given up.

        Makes it if need be, and then blocks until the peer comes. On the end's own thread only.
        """
        with self.changed:
            if self._communicator is not None and generation == self.generation:
                return self._communicator
            store = self._store
            if store is None or generation != self.generation or self.is_closing:
                return None
        timeout_s = max(0.0, deadline - time.monotonic())
        store.expire_after(timeout_s / 2)
        made = self._communicators.connect(store, self._rank, timeout_s)
        with self.changed:
            if self._store is store and not store.is_closed:
                self._communicator = made
                return made
        made.abort()
        return None

    def interrupt(self, reason: str) -> None:
        """Drop the communicator, and make the end's thread raise if it waits on it. Any thread."""
        with self.changed:
            store, communicator = self._store, self._communicator
            self._store = self._communicator = None
            if store is not None:
                store.close(reason)
        if communicator is not None:
            communicator.abort()

    def begin_close(self) -> None:
        """End the thread soon: at once if it waits, else after what it does now."""
        with self.changed:
            self.is_closing = True
            self.changed.notify_all()
        self.interrupt("the connection was closed")

    @property
    def has_ended(self) -> bool:
        """Whether it was closed and nothing of it is left."""
        return self.is_closing and not (self._thread and self._thread.is_alive())

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread after `begin_close`; say whether it has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self.has_ended

    def _run_and_free(self, run: Callable[[], None]) -> None:
        try:
            run()
        finally:
            self.interrupt("the connection was closed")
