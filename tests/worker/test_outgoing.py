"""The sending half of a stream."""

import asyncio
import threading

import pytest

from paceline.worker.outgoing import Outgoing

TIMEOUT_S = 20.0


async def collect(stream: Outgoing[int]) -> list[int]:
    return [message async for message in stream]


async def test_messages_of_many_threads_arrive_each_in_order_and_none_is_lost() -> None:
    stream: Outgoing[int] = Outgoing()
    received = asyncio.create_task(collect(stream))

    def send(base: int) -> None:
        for number in range(2000):
            stream.send(base + number)

    threads = [threading.Thread(target=send, args=(base,)) for base in (0, 10_000, 20_000)]
    for thread in threads:
        thread.start()
    await asyncio.to_thread(lambda: [thread.join() for thread in threads])
    stream.close()
    async with asyncio.timeout(TIMEOUT_S):
        messages = await received
    assert len(messages) == 6000
    for base in (0, 10_000, 20_000):
        own = [message for message in messages if base <= message < base + 2000]
        assert own == list(range(base, base + 2000))


async def test_what_waits_is_sent_before_a_closed_stream_ends() -> None:
    stream: Outgoing[int] = Outgoing()
    stream.send(1)
    stream.close()
    stream.send(2)
    async with asyncio.timeout(TIMEOUT_S):
        assert await collect(stream) == [1]


async def test_a_waiting_reader_is_woken_by_a_message_from_another_thread() -> None:
    stream: Outgoing[int] = Outgoing()
    received = asyncio.create_task(collect(stream))
    for number in range(200):
        # Give the reader the chance to go to sleep in between.
        await asyncio.to_thread(stream.send, number)
    stream.close()
    async with asyncio.timeout(TIMEOUT_S):
        assert await received == list(range(200))


async def test_a_heartbeat_is_sent_when_nothing_else_is_but_not_before_the_first_message() -> None:
    stream: Outgoing[int] = Outgoing(heartbeat=-1, heartbeat_s=0.02)
    received: list[int] = []

    async def receive() -> None:
        async for message in stream:
            received.append(message)

            if received[:3] == [1, -1, -1] and 2 not in received:
                stream.send(2)
            elif 2 in received:
                stream.close()

    receiving = asyncio.create_task(receive())
    await asyncio.sleep(0.1)
    assert received == []
    stream.send(1)
    async with asyncio.timeout(TIMEOUT_S):
        await receiving
    assert received[:4] == [1, -1, -1, 2]


async def test_a_stream_whose_peer_does_not_read_ends_instead_of_growing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("paceline.worker.outgoing.MAX_WAITING", 100)
    stream: Outgoing[int] = Outgoing()
    for number in range(1000):
        stream.send(number)
        assert len(stream._waiting) <= 100
    assert stream.is_closed
    assert caplog.text.count("event=stream_ended reason=unread num_waiting=100") == 1
    async with asyncio.timeout(TIMEOUT_S):
        assert await collect(stream) == []


async def test_a_peer_that_reads_again_too_late_finds_the_stream_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paceline.worker.outgoing.MAX_WAITING", 100)
    stream: Outgoing[int] = Outgoing()
    stream.send(0)
    reading = aiter(stream)
    assert await anext(reading) == 0
    for number in range(200):
        stream.send(number)
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(StopAsyncIteration):
            await anext(reading)
