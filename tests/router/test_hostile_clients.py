"""What clients do that no client should: others are served, and nothing of it stays."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from router_deployment import RouterDeployment, router_deployment, until

from paceline.bench import raw_http2
from paceline.grpc_options import server_options
from paceline.router.settings import RouterSettings
from paceline.v1 import inference_pb2 as pb

GENERATE = "/paceline.v1.InferenceService/Generate"
TIMEOUT_S = 20.0


@asynccontextmanager
async def raw_connection(
    deployment: RouterDeployment,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = deployment.router.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def status_of(
    deployment: RouterDeployment, method: str, message: bytes
) -> grpc.aio.AioRpcError:
    call = deployment.channel.unary_stream(method)(message, timeout=TIMEOUT_S)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


async def assert_served(deployment: RouterDeployment) -> None:
    answer = await deployment.generate(
        pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(max_tokens=3)),
        deadline_s=TIMEOUT_S,
    )
    assert len(answer.tokens[0]) == 3


@pytest.mark.parametrize("method", ["Generate", "Tokenize"])
async def test_a_message_that_cannot_be_read_is_an_invalid_argument_and_one_log_line(
    tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with router_deployment(tmp_path) as deployment:
        caplog.clear()
        error = await status_of(
            deployment, f"/paceline.v1.InferenceService/{method}", b"\xff" * 1000
        )
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "could not be read" in str(error.details())
        [record] = [r for r in caplog.records if r.name.startswith("paceline")]
        assert record.getMessage().startswith("message_malformed ")
        assert record.exc_info is None
        await assert_served(deployment)


async def test_a_message_that_would_unpack_to_many_times_its_size_is_not_unpacked(
    tmp_path: Path,
) -> None:
    bomb = pb.GenerateRequest(text="a" * (32 << 20)).SerializeToString()
    async with router_deployment(tmp_path) as deployment:
        async with grpc.aio.insecure_channel(
            deployment.router.address, options=[("grpc.max_send_message_length", -1)]
        ) as channel:
            call = channel.unary_stream(GENERATE)(
                bomb, timeout=TIMEOUT_S, compression=grpc.Compression.Gzip
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "gzip" in str(caught.value.details())
        await assert_served(deployment)


async def test_a_client_that_reads_nothing_loses_its_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = RouterSettings(grpc_port=0, drain_timeout_s=0.0, client_read_timeout_s=0.3)
    request = pb.GenerateRequest(
        text="hello",
        request_id="r" * 128,
        sampling=pb.SamplingParams(max_tokens=100_000, ignore_eos=True),
    )
    async with (
        router_deployment(
            tmp_path, settings=settings, max_model_len=1 << 20, num_blocks=1 << 16
        ) as deployment,
        raw_connection(deployment) as (_, writer),
    ):
        writer.write(raw_http2.opening(window_bytes=0))
        writer.write(raw_http2.call(1, GENERATE, request.SerializeToString()))
        await until(lambda: bool(deployment.decode.running), "the request runs")
        await deployment.idle()
        assert "has not read its output for 0.3 s" in caplog.text
        await assert_served(deployment)


async def test_calls_that_are_given_up_at_once_leave_nothing(tmp_path: Path) -> None:
    message = pb.GenerateRequest(text="hello").SerializeToString()
    async with (
        router_deployment(tmp_path) as deployment,
        raw_connection(deployment) as (_, writer),
    ):
        writer.write(raw_http2.opening())
        for number in range(2000):
            writer.write(raw_http2.call(2 * number + 1, GENERATE, message))
            writer.write(raw_http2.reset(2 * number + 1))
        await writer.drain()
        await assert_served(deployment)
        await deployment.idle()


def shorten(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make times of the servers' options 300 ms, which is what a test can wait for."""

    def options(max_request_bytes: int) -> tuple[tuple[str, int], ...]:
        chosen = dict(server_options(max_request_bytes))
        assert all(chosen[name] <= 10_000 for name in names)
        return tuple((chosen | dict.fromkeys(names, 300)).items())

    monkeypatch.setattr("paceline.grpc_server.server_options", options)


async def test_a_request_ends_when_its_client_answers_no_ping_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(
        monkeypatch,
        "grpc.keepalive_time_ms",
        "grpc.keepalive_timeout_ms",
        "grpc.http2.ping_timeout_ms",
    )
    request = pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(max_tokens=5))
    async with (
        router_deployment(tmp_path) as deployment,
        raw_connection(deployment) as (_, writer),
    ):
        deployment.decode.hold_at = 1
        writer.write(raw_http2.opening())
        writer.write(raw_http2.call(1, GENERATE, request.SerializeToString()))
        await until(lambda: bool(deployment.decode.running), "the request runs")
        await deployment.idle()


async def test_a_connection_that_says_nothing_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, "grpc.server_handshake_timeout_ms")
    async with (
        router_deployment(tmp_path, workers=False) as deployment,
        raw_connection(deployment) as (reader, _),
        asyncio.timeout(TIMEOUT_S),
    ):
        while await reader.read(1024):
            pass


def _largest_requests() -> list[bytes]:
    """Requests of nearly 1 MiB, the default limit, each of what costs most of its kind."""
    size = (1 << 20) - 64
    return [
        request.SerializeToString()
        for request in (
            pb.GenerateRequest(text="a" * size),
            pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage(content="a" * size)])),
            pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage()] * (size // 2))),
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * size)),
            pb.GenerateRequest(sampling=pb.SamplingParams(stop_token_ids=[1] * size)),
            pb.GenerateRequest(sampling=pb.SamplingParams(stop=[""] * (size // 3))),
            pb.GenerateRequest(model="😀" * (size // 4)),
            pb.GenerateRequest(request_id="\n" * size),
        )
    ]


async def test_the_largest_requests_do_not_hold_up_the_event_loop(tmp_path: Path) -> None:
    """The goal is 50 ms, as `bench/router_abuse.py` measures; here the machine may be busy."""
    requests = _largest_requests()
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        loop = asyncio.get_running_loop()
        last_s = loop.time()
        while True:
            await asyncio.sleep(0.001)
            longest_s, last_s = max(longest_s, loop.time() - last_s), loop.time()

    async with router_deployment(tmp_path, max_model_len=400_000) as deployment:
        await deployment.router.warm_up()
        watching = asyncio.create_task(watch())
        for request in requests:
            error = await status_of(deployment, GENERATE, request)
            assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        watching.cancel()
    assert longest_s < 0.5, f"{longest_s:.3f} s"
