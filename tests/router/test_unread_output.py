import asyncio

import pytest

from paceline.router.unread_output import UnreadOutput


async def _write_for_ever(limit_s: float) -> None:
    async with UnreadOutput(limit_s) as output:
        output.begin_write()
        await asyncio.Event().wait()


async def test_a_write_that_waits_too_long_ends_the_block() -> None:
    with pytest.raises(TimeoutError):
        await _write_for_ever(0.05)


async def test_neither_short_writes_nor_the_time_between_them_end_the_block() -> None:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    async with UnreadOutput(0.2) as output:
        while loop.time() - began_s < 0.6:
            output.begin_write()
            await asyncio.sleep(0.005)
            output.end_write()
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)


async def test_a_cancellation_from_outside_stays_one() -> None:
    task = asyncio.create_task(_write_for_ever(30.0))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
