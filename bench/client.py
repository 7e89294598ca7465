"""Send a load to a running deployment over gRPC and write down what came back."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Self

import grpc

from paceline.addresses import parse_address
from paceline.bench.load import PlannedRequest, Vocabulary
from paceline.bench.record import RequestRecord
from paceline.errors import ConfigError, UnavailableError
from paceline.grpc_options import CLIENT_CHANNEL
from paceline.v1 import inference_pb2, inference_pb2_grpc
from paceline.wire import phase_times_from_proto, span_from_proto

CONNECT_TIMEOUT_S = 10.0


def greedy_request(planned: PlannedRequest, request_id: str) -> inference_pb2.GenerateRequest:
    """Ask for exactly `max_tokens` tokens, so that loads compare."""
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=planned.prompt),
        request_id=request_id,
        include_timeline=True,
        sampling=inference_pb2.SamplingParams(
            max_tokens=planned.max_tokens, temperature=0.0, ignore_eos=True
        ),
    )


class LoadClient:
    """One connection to a router. An async context manager."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        """Take host:port of a router. Raises ConfigError if the address has another form."""
        try:
            parse_address(address)
        except ValueError as error:
            raise ConfigError(f"--address: {error}") from None
        self._channel = grpc.aio.insecure_channel(address, options=CLIENT_CHANNEL)
        self._address = address
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._channel.channel_ready()
        except TimeoutError:
            await self._channel.close()
            raise UnavailableError(
                f"no router answers at {self._address} within {CONNECT_TIMEOUT_S:g} s. paceline "
                "status names the routers of a deployment; --address HOST:PORT takes one of them"
            ) from None
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._channel.close()

    async def vocabulary(self) -> tuple[Vocabulary, int]:
        """Ask for the vocabulary and the model's length. Raises UnavailableError."""
        request = inference_pb2.GetModelInfoRequest()
        try:
            info = await self._stub.GetModelInfo(request, timeout=CONNECT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(
                f"{self._address} does not say what it serves: {error.code().name}, "
                f"{error.details()}. Is it a router of paceline?"
            ) from None
        return Vocabulary(info.vocab_size, frozenset(info.eos_token_ids)), info.max_model_len

    async def closed_loop(
        self,
        requests: Sequence[PlannedRequest],
        concurrency: int,
        on_end: Callable[[RequestRecord], None] = lambda record: None,
    ) -> list[RequestRecord]:
        """Keep `concurrency` requests running until all have been sent and have ended."""
        waiting = iter(list(enumerate(requests)))
        records: list[RequestRecord] = []

        async def one_user() -> None:
            for number, planned in waiting:
                records.append(await self.send(planned, f"bench-{number}", time.time()))
                on_end(records[-1])

        await asyncio.gather(*(one_user() for _ in range(concurrency)))
        return records

    async def open_loop(
        self,
        requests: Sequence[PlannedRequest],
        on_end: Callable[[RequestRecord], None] = lambda record: None,
    ) -> list[RequestRecord]:
        """Send each request at its time, whatever has become of the earlier ones."""
        start_s = time.time()

        async def one_request(number: int, planned: PlannedRequest) -> RequestRecord:
            scheduled_s = start_s + planned.at_s
            await asyncio.sleep(max(0.0, scheduled_s - time.time()))
            record = await self.send(planned, f"bench-{number}", scheduled_s)
            on_end(record)
            return record

        tasks = [one_request(number, planned) for number, planned in enumerate(requests)]
        return list(await asyncio.gather(*tasks))

    async def send(
        self, planned: PlannedRequest, request_id: str, scheduled_s: float
    ) -> RequestRecord:
        """Run one request to its end; a failure is written down, not raised."""
        record = RequestRecord(request_id, len(planned.prompt), planned.max_tokens, scheduled_s)
        request = greedy_request(planned, request_id)
        record.sent_s = time.time()
        call = self._stub.Generate(request, timeout=self._timeout_s)
        try:
            async for response in call:
                now = time.time()
                record.token_times_s.extend([now] * len(response.tokens))
                if response.HasField("usage"):
                    _take_last(record, response)
        except grpc.aio.AioRpcError as error:
            record.error = f"{error.code().name}: {error.details()}"
        finally:
            # A task cancelled before its first read would leave the call running.
            call.cancel()
        record.ended_s = time.time()
        return record


def _take_last(record: RequestRecord, response: inference_pb2.GenerateResponse) -> None:
    record.cached_tokens = response.usage.cached_tokens
    record.resumed = response.usage.resumed
    record.phases = phase_times_from_proto(response.phase_times)
    record.timeline = [span_from_proto(span) for span in response.timeline]
