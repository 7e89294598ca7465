"""The first message of a session, which says who is there."""

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

Message = TypeVar("Message")

HELLO_TIMEOUT_S = 10.0
"""A peer says hello in the same breath as it opens the stream; a busy machine may delay it."""


async def first_message(messages: AsyncIterator[Message]) -> Message | None:
    """Wait for a session's first message; None if it ended, or said nothing for too long."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            return await anext(messages, None)
    except TimeoutError:
        return None
