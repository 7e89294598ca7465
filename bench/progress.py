"""How far a load has come, on standard error: a bar on a terminal, lines elsewhere."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from rich.console import Console
from rich.progress import Progress

from paceline.bench.record import RequestRecord

LINE_EVERY_S = 5.0


@contextlib.asynccontextmanager
async def shown_progress(
    num_requests: int, console: Console, line_every_s: float = LINE_EVERY_S
) -> AsyncIterator[Callable[[RequestRecord], None]]:
    """Show how many requests have ended; yields what is to be called with each of them."""
    if console.is_terminal:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("requests", total=num_requests)
            yield lambda record: progress.advance(task)
        return
    ended: list[bool] = []
    """Of each request that has ended: whether it succeeded."""
    lines = asyncio.create_task(_say_lines(ended, num_requests, console, line_every_s))
    try:
        yield lambda record: ended.append(record.succeeded)
    finally:
        lines.cancel()


async def _say_lines(
    ended: list[bool], num_requests: int, console: Console, line_every_s: float
) -> None:
    started_s = time.monotonic()
    while True:
        await asyncio.sleep(line_every_s)
        failed = f", {ended.count(False)} of them failed" if not all(ended) else ""
        console.print(
            f"{len(ended)} of {num_requests} requests have ended after "
            f"{time.monotonic() - started_s:.0f} s{failed}"
        )
