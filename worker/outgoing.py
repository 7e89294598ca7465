"""The sending half of a gRPC stream, fed from any thread."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Message = TypeVar("Message")

MAX_WAITING = 65_536
"""Messages: far more than one moment brings, all requests of a worker answered at once included. So
many wait only when the peer does not read."""


class Outgoing(Generic[Message]):
    """Messages on their way out of one stream, in the order of `send`.

    A stream whose peer does not read ends when MAX_WAITING messages wait: what ends with it is work
    that others can do.

    Made on the io loop. `send` and `close` may be called on any thread and never block; the io loop
    is woken once for any number of messages that wait.
    """

    def __init__(self, heartbeat: Message | None = None, heartbeat_s: float | None = None) -> None:
        """heartbeat: what is sent when nothing else was for `heartbeat_s`, so that the peer can
        tell a break from silence. Not before the first message, for which the peer waits.
        """
        self._heartbeat = heartbeat
        self._heartbeat_s = heartbeat_s
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Message] = deque()
        self._wake = asyncio.Event()
        self._wake_requested = False
        self._closed = False

    @property
    def is_closed(self) -> bool:
        return self._closed

    def send(self, message: Message) -> None:
        """Queue a message; dropped when the stream is closed."""
        if self._closed:
            return
        if len(self._waiting) >= MAX_WAITING:
            logger.warning("event=stream_ended reason=unread num_waiting=%d", MAX_WAITING)
            self.close()
            self._waiting.clear()
            return
        self._waiting.append(message)
        self._request_wake()

    def close(self) -> None:
        """End the stream after what waits now."""
        self._closed = True
        self._request_wake()

    def _request_wake(self) -> None:
        if self._wake_requested:
            return
        self._wake_requested = True
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:
            # The loop is closed: the process is stopping and nobody can read any more.
            self._waiting.clear()

    async def __aiter__(self) -> AsyncIterator[Message]:
        interval_s: float | None = None
        while True:
            # Before looking at the queue, so that a `send` from now on asks for another wake-up.
            self._wake_requested = False
            self._wake.clear()
            while self._waiting:
                try:
                    message = self._waiting.popleft()
                except IndexError:  # cleared by a sender on another thread
                    break
                yield message
                interval_s = self._heartbeat_s
            if self._closed:
                return
            try:
                async with asyncio.timeout(interval_s):
                    await self._wake.wait()
            except TimeoutError:
                if self._heartbeat is not None:
                    yield self._heartbeat
