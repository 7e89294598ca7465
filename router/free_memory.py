"""Give memory back to the system after a burst: glibc keeps what gRPC has freed in pools."""

import asyncio
import ctypes
import logging
from collections.abc import Callable

import psutil

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
GROWTH_BYTES = 64 << 20
"""Less is not worth the walk over the pools."""


class MemoryReturn:
    """Trims glibc's pools when the process has grown since the last time."""

    def __init__(self, resident_bytes: Callable[[], int], trim: Callable[[], None]) -> None:
        self._resident_bytes = resident_bytes
        self._trim = trim
        self._kept_bytes = resident_bytes()

    def check(self) -> None:
        """Trim if that is worth it. Blocks for some milliseconds, without the GIL."""
        before = self._resident_bytes()
        self._kept_bytes = min(self._kept_bytes, before)
        if before - self._kept_bytes < GROWTH_BYTES:
            return
        self._trim()
        self._kept_bytes = self._resident_bytes()
        logger.info("memory_returned before_bytes=%d after_bytes=%d", before, self._kept_bytes)


async def return_memory_for_ever() -> None:
    """Check every few seconds, on a thread; ends at once where there is no glibc."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:
        return
    process = psutil.Process()
    memory = MemoryReturn(lambda: int(process.memory_info().rss), lambda: trim(0))
    while True:
        await asyncio.sleep(INTERVAL_S)
        await asyncio.to_thread(memory.check)
