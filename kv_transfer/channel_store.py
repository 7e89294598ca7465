"""Rendezvous over the KV session: a torch Store of two, whose keys travel as messages.

torch's own stores listen on a port or need a shared file. This one mirrors each `set` to the peer,
which is all that a process group of two needs.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

# The public names are typed as missing, because torch can be built without them.
from torch._C._distributed_c10d import Store

from paceline.errors import TransportError

MAX_KEYS = 1024
"""A group of two sets some ten."""


class ChannelStore(Store):
    """One end of the rendezvous for one communicator. Callable on any thread."""

    def __init__(self, send: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._send = send
        self._deadline = math.inf
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed: str | None = None

    # torch's stubs of Store name fewer types than its bindings pass.
    def set(self, key: str, value: str | bytes) -> None:
        encoded = value.encode() if isinstance(value, str) else bytes(value)
        self.receive(key, encoded)
        self._send(key, encoded)

    def get(self, key: str) -> bytes:
        self._wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._wait(keys)  # Gloo passes the time-out of its connections

    def check(self, keys: Sequence[str]) -> bool:
        with self._changed:
            return all(key in self._values for key in keys)

    def receive(self, key: str, value: bytes) -> None:
        """Take a key that the peer has set."""
        with self._changed:
            if key not in self._values and len(self._values) >= MAX_KEYS:
                raise TransportError(f"a rendezvous of two has more than {MAX_KEYS} keys")
            self._values[key] = value
            self._changed.notify_all()

    def expire_after(self, timeout_s: float) -> None:
        """Make waits that last longer than this from now on raise."""
        self._deadline = time.monotonic() + timeout_s

    @property
    def is_closed(self) -> bool:
        return self._closed is not None

    def close(self, reason: str) -> None:
        """Make every wait, present and future, raise TransportError with this reason."""
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    def _wait(self, keys: Sequence[str]) -> None:
        started_s = time.monotonic()
        with self._changed:
            complete = self._changed.wait_for(
                lambda: self._closed is not None or all(key in self._values for key in keys),
                self._deadline - started_s,
            )
            if self._closed is not None:
                raise TransportError(self._closed)
            if not complete:
                missing = [key for key in keys if key not in self._values]
                raise TransportError(
                    f"the peer did not send {missing} for the rendezvous "
                    f"within {time.monotonic() - started_s:.3f} s"
                )
