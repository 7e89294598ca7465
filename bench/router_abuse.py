"""Measure what hostile clients can do to others: `python -m paceline.bench.router_abuse`.

Three processes: the router, a simulated worker, and this one, which plays the hostile clients and a
good one beside them. For each abuse it reports

- the longest pause of the router's event loop, watched inside the router;
- the longest time of the good client's calls, which are sent one after the other;
- the router's memory before, at most, and at the end;
- how the abuse was answered, where it was.
"""

import argparse
import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import psutil

from paceline.bench import raw_http2
from paceline.bench.environment import write_result
from paceline.bench.router_throughput import make_request, run_worker, write_tokenizer
from paceline.grpc_options import INTERNAL_CHANNEL
from paceline.router.model import ServedModel
from paceline.router.server import Router
from paceline.router.settings import RouterSettings
from paceline.router.worker_view import Role, WorkerMember
from paceline.v1 import inference_pb2 as pb
from paceline.v1 import inference_pb2_grpc

GENERATE = "/paceline.v1.InferenceService/Generate"
MAX_MODEL_LEN = 1 << 16
POLL_S = 0.001
SETTLE_S = 8.0
"""The router looks for memory to give back every 5 s."""
NUM_RESETS = 50_000
NUM_CONNECTIONS = 500
NUM_SILENT_READERS = 200
CLIENT_READ_TIMEOUT_S = 5.0


class Watched(NamedTuple):
    """What happened meanwhile."""

    longest_pause_s: float
    peak_bytes: int


class Abuse(NamedTuple):
    """One thing that a hostile client does; returns how it was answered."""

    name: str
    run: Callable[[str], Awaitable[dict[str, int]]]


def run_router(pipe: Connection, folder: Path, worker_address: str) -> None:
    """Serve a router, and say for each message on the pipe what was seen since the last."""

    async def serve() -> None:
        model = ServedModel("simulated", MAX_MODEL_LEN, 256, (), folder)
        settings = RouterSettings(
            grpc_port=0, drain_timeout_s=0.0, client_read_timeout_s=CLIENT_READ_TIMEOUT_S
        )
        router = Router(settings, model)
        await router.warm_up()
        await router.start()
        await router.update_membership(
            1, [WorkerMember("decode-0", Role.DECODE, 1, worker_address)]
        )
        pipe.send(router.address)
        told = asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        longest_s, peak, last_s = 0.0, 0, time.monotonic()
        process = psutil.Process()
        while True:
            await asyncio.sleep(POLL_S)
            now = time.monotonic()
            longest_s, last_s = max(longest_s, now - last_s - POLL_S), now
            peak = max(peak, process.memory_info().rss)
            if told.done():
                if told.result() == "stop":
                    break
                pipe.send(Watched(longest_s, peak))
                longest_s, peak, last_s = 0.0, 0, time.monotonic()
                told = asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        await router.stop()

    asyncio.run(serve())


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


async def _send(address: str, message: bytes, counts: dict[str, int], **options: Any) -> None:
    """Send a request as it is and count the status."""
    channel_options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=channel_options) as channel:
        generate: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(GENERATE)
        call = generate(message, timeout=60, **options)
        try:
            async for _ in call:
                pass
            _count(counts, "OK")
        except grpc.aio.AioRpcError as error:
            _count(counts, error.code().name)


def _requests(*messages: bytes, **options: Any) -> Callable[[str], Awaitable[dict[str, int]]]:
    async def run(address: str) -> dict[str, int]:
        counts: dict[str, int] = {}
        for message in messages:
            await _send(address, message, counts, **options)
        return counts

    return run


def _bad_lists(num_bytes: int) -> list[bytes]:
    """Requests that are nothing but the shortest entries of a list."""
    few = num_bytes - 64
    return [
        pb.GenerateRequest(
            sampling=pb.SamplingParams(stop_token_ids=[1] * few)
        ).SerializeToString(),
        pb.GenerateRequest(sampling=pb.SamplingParams(stop=[""] * (few // 3))).SerializeToString(),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * few)).SerializeToString(),
        pb.GenerateRequest(
            chat=pb.ChatPrompt(messages=[pb.ChatMessage()] * (few // 2))
        ).SerializeToString(),
    ]


def _texts(num_bytes: int) -> list[bytes]:
    few = num_bytes - 64
    texts = ["a" * few, " " * few, "hello world " * (few // 12), "😀" * (few // 4)]
    return [pb.GenerateRequest(text=text).SerializeToString() for text in texts]


async def _discard(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 16):
        pass


async def rapid_resets(address: str) -> dict[str, int]:
    """Begin calls and give each up at once, on four connections."""
    message = pb.GenerateRequest(text="hello").SerializeToString()

    async def one() -> int:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(raw_http2.opening())
        discarding = asyncio.create_task(_discard(reader))
        try:
            for number in range(NUM_RESETS // 4):
                stream_id = 2 * number + 1
                writer.write(raw_http2.call(stream_id, GENERATE, message))
                writer.write(raw_http2.reset(stream_id))
                await writer.drain()
        except ConnectionError:
            return 0
        finally:
            discarding.cancel()
            writer.close()
        return 1

    return {"connections_not_closed": sum(await asyncio.gather(*(one() for _ in range(4))))}


async def silent_connections(address: str) -> dict[str, int]:
    """Open connections that say nothing; count those that are still open after some seconds."""
    host, port = address.split(":")
    pairs = [await asyncio.open_connection(host, int(port)) for _ in range(NUM_CONNECTIONS)]

    async def is_open(reader: asyncio.StreamReader) -> bool:
        try:
            async with asyncio.timeout(12):
                while await reader.read(1024):
                    pass
            return False
        except TimeoutError:
            return True

    still_open = await asyncio.gather(*(is_open(reader) for reader, _ in pairs))
    for _, writer in pairs:
        writer.close()
    return {"connections": NUM_CONNECTIONS, "open_after_12_s": sum(still_open)}


async def silent_readers(address: str) -> dict[str, int]:
    """Ask for much output on many streams and read none of it."""
    host, port = address.split(":")
    request = make_request(MAX_MODEL_LEN // 2)
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw_http2.opening(window_bytes=0))
    for number in range(NUM_SILENT_READERS):
        writer.write(raw_http2.call(2 * number + 1, GENERATE, request.SerializeToString()))
    await writer.drain()
    await asyncio.sleep(2 * CLIENT_READ_TIMEOUT_S)
    writer.close()
    return {"streams": NUM_SILENT_READERS}


def abuses(num_bytes: int) -> list[Abuse]:
    gzip = {"compression": grpc.Compression.Gzip}
    bomb = pb.GenerateRequest(text="a" * (500 << 20)).SerializeToString()
    return [
        Abuse("nothing", _requests()),
        Abuse("texts", _requests(*_texts(num_bytes))),
        Abuse("lists", _requests(*_bad_lists(num_bytes))),
        Abuse("malformed", _requests(*[b"\xff" * 1000] * 200)),
        Abuse("gzip_bomb", _requests(bomb, **gzip)),
        Abuse("rapid_resets", rapid_resets),
        Abuse("silent_connections", silent_connections),
        Abuse("silent_readers", silent_readers),
    ]


async def good_client(address: str, times_s: list[float]) -> None:
    """Generate ten tokens again and again."""
    async with grpc.aio.insecure_channel(address, options=INTERNAL_CHANNEL) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        while True:
            began_s = time.perf_counter()
            async for _ in stub.Generate(make_request(10)):
                pass
            times_s.append(time.perf_counter() - began_s)


async def measure(address: str, pipe: Connection, pid: int, num_bytes: int) -> dict[str, Any]:
    loop, process = asyncio.get_running_loop(), psutil.Process(pid)

    async def watched() -> Watched:
        pipe.send("say")
        seen: Watched = await loop.run_in_executor(None, pipe.recv)
        return seen

    results: dict[str, Any] = {}
    for abuse in abuses(num_bytes):
        before = process.memory_info().rss
        await watched()
        times_s: list[float] = []
        client = asyncio.create_task(good_client(address, times_s))
        await asyncio.sleep(0.2)
        answers = await abuse.run(address)
        await asyncio.sleep(0.2)
        client.cancel()
        await asyncio.gather(client, return_exceptions=True)
        seen = await watched()
        await asyncio.sleep(SETTLE_S)
        results[abuse.name] = {
            "longest_pause_ms": round(seen.longest_pause_s * 1e3, 1),
            "good_clients_longest_ms": round(max(times_s, default=float("nan")) * 1e3, 1),
            "memory_before_mb": round(before / 1e6),
            "memory_peak_mb": round(seen.peak_bytes / 1e6),
            "memory_after_mb": round(process.memory_info().rss / 1e6),
            "answers": answers,
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what hostile clients can do to others.")
    parser.add_argument("--request-bytes", type=int, default=1 << 20, help="of the large requests")
    parser.add_argument("--output", type=Path, help="file for the JSON; default: print it")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        worker_pipe, worker_end = spawn.Pipe()
        worker = spawn.Process(target=run_worker, args=(worker_end, 0.002))
        worker.start()
        router_pipe, router_end = spawn.Pipe()
        arguments = (router_end, Path(folder), worker_pipe.recv())
        router = spawn.Process(target=run_router, args=arguments)
        router.start()
        try:
            address = router_pipe.recv()
            assert router.pid is not None
            result = asyncio.run(measure(address, router_pipe, router.pid, options.request_bytes))
        finally:
            for pipe in (router_pipe, worker_pipe):
                pipe.send("stop")
            router.join(10)
            worker.join(10)
    write_result(options.output, "router_abuse", {"request_bytes": options.request_bytes}, result)


if __name__ == "__main__":
    main()
