"""The sending half of a gRPC stream, fed from any thread."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

Message = TypeVar("Message")


class Outgoing(Generic[Message]):
    """Messages on their way out of one stream, in the order of `send`.

    Made on the io loop. `send` and `close` may be called on any thread and never block; the io loop
    is woken once for any number of messages that wait.
    """

    def __init__(self) -> None:
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
        while True:
            # Before looking at the queue, so that a `send` from now on asks for another wake-up.
            self._wake_requested = False
            self._wake.clear()
            while self._waiting:
                yield self._waiting.popleft()
            if self._closed:
                return
            await self._wake.wait()
