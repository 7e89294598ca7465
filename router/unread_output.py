"""Notice that a client does not read its output."""

import asyncio
from types import TracebackType
from typing import Self


class UnreadOutput:
    """Raise TimeoutError in the block when one write has waited for `limit_s`.

    One timer serves all writes, and looks at the write that waits: there are thousands of writes a
    second, and a time-out for each would cost more than they do.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._since_s: float | None = None
        """When the write that waits began."""
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._timer = self._loop.call_later(self._limit_s, self._check)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._timeout.__aexit__(kind, error, traceback)

    def begin_write(self) -> None:
        self._since_s = self._loop.time()

    def end_write(self) -> None:
        self._since_s = None

    def _check(self) -> None:
        now = self._loop.time()
        began_s = now if self._since_s is None else self._since_s
        if now - began_s >= self._limit_s:
            self._timeout.reschedule(now)
        else:
            self._timer = self._loop.call_at(began_s + self._limit_s, self._check)
