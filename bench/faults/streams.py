"""Clients that stream without pause, and compare what they get with an undisturbed answer."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import grpc

from paceline.grpc_options import CLIENT_CHANNEL
from paceline.v1 import inference_pb2 as pb
from paceline.v1 import inference_pb2_grpc

REQUEST_TIMEOUT_S = 300.0
SHORTEST_GAP_S = 0.05
"""Between messages of a stream, for it to be written down."""
ON_THE_WAY_S = 0.25
"""What a worker had sent before a fault may still arrive for this long."""
MAX_LOGPROB_DIFFERENCE = 1e-3
RETRY_S = 0.2
"""After a refusal, or an error of the connection."""
MAX_DIFFERENCES = 20


@dataclass(slots=True)
class Answer:
    """All that a client got for one request."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    """By choice."""
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    finish_reasons: dict[int, int] = field(default_factory=dict)
    resumed: int = 0

    def take(self, message: pb.GenerateResponse) -> str | None:
        """Take the next message; say what is wrong with it by itself."""
        tokens = self.tokens.setdefault(message.choice, [])
        for token in message.tokens:
            if token.index != len(tokens):
                return f"token {token.index} came where {len(tokens)} was due"
            tokens.append(token.token_id)
            if token.HasField("logprob"):
                self.logprobs.setdefault(message.choice, []).append(token.logprob)
        if message.finish_reason:
            self.finish_reasons[message.choice] = message.finish_reason
        if message.HasField("usage"):
            self.resumed = message.usage.resumed
        return None

    def difference(self, expected: "Answer") -> str | None:
        """Say how this answer differs from the one that was due."""
        for choice, tokens in expected.tokens.items():
            got = self.tokens.get(choice, [])
            if got != tokens:
                same = next(
                    (i for i, (a, b) in enumerate(zip(got, tokens, strict=False)) if a != b),
                    min(len(got), len(tokens)),
                )
                return f"choice {choice} differs from token {same} on, of {len(tokens)}"
        if self.finish_reasons != expected.finish_reasons:
            return f"it ended with {self.finish_reasons}, not {expected.finish_reasons}"
        for choice, values in expected.logprobs.items():
            pairs = zip(self.logprobs.get(choice, []), values, strict=False)
            if any(abs(a - b) > MAX_LOGPROB_DIFFERENCE for a, b in pairs):
                return f"log-probabilities of choice {choice} differ"
        return None


class Gap(NamedTuple):
    """A stretch in which a stream that had begun got nothing. Monotonic seconds."""

    start_s: float
    end_s: float


class Streams:
    """Some clients of one router."""

    def __init__(self, address: str, requests: Sequence[pb.GenerateRequest]) -> None:
        self._address = address
        self._requests = requests
        self._expected: list[Answer] = []
        self.usable: list[int] = []
        """Requests whose undisturbed answers were the same twice."""
        self.num_completed = 0
        self.num_resumed = 0
        self.num_tokens = 0
        self.errors: Counter[str] = Counter()
        """Requests that were accepted and failed, by status and message."""
        self.refusals: Counter[str] = Counter()
        self.differences: list[str] = []
        self.gaps: list[Gap] = []

    async def learn(self) -> None:
        """Get the undisturbed answers, alone and side by side."""
        async with self._channel() as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            alone = [await self._ask(stub, number, "learn") for number in self._all()]
            beside = await asyncio.gather(
                *(self._ask(stub, number, "learn-again") for number in self._all())
            )
        self._expected = alone
        self.usable = [
            number for number in self._all() if beside[number].difference(alone[number]) is None
        ]
        self.gaps.clear()
        self.num_tokens = 0

    async def run(self, num_clients: int, end: asyncio.Event) -> None:
        """Stream until `end` is set; what runs then is still waited for."""
        await asyncio.gather(*(self._client(number, end) for number in range(num_clients)))

    def longest_gap_s(self, at_s: float) -> float:
        """Return how long the stream that a fault at that moment held up longest stood still."""
        return max(
            (
                gap.end_s - at_s
                for gap in self.gaps
                if gap.start_s - ON_THE_WAY_S <= at_s < gap.end_s
            ),
            default=0.0,
        )

    def _all(self) -> range:
        return range(len(self._requests))

    def _channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self._address, options=CLIENT_CHANNEL)

    async def _client(self, client: int, end: asyncio.Event) -> None:
        turn = client
        async with self._channel() as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            while not end.is_set():
                number = self.usable[turn % len(self.usable)]
                turn += 7
                try:
                    answer = await self._ask(stub, number, f"{client}-{turn}")
                except grpc.aio.AioRpcError as error:
                    self._failed(error)
                    await asyncio.sleep(RETRY_S)
                    continue
                self.num_completed += 1
                self.num_resumed += answer.resumed > 0
                difference = answer.difference(self._expected[number])
                if difference is not None and len(self.differences) < MAX_DIFFERENCES:
                    self.differences.append(f"request {number}, client {client}: {difference}")

    def _failed(self, error: grpc.aio.AioRpcError) -> None:
        code = error.code()
        what = f"{code.name}: {error.details()}"
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            self.refusals[what[:200]] += 1
        else:
            self.errors[what[:200]] += 1

    async def _ask(
        self, stub: "inference_pb2_grpc.InferenceServiceAsyncStub", number: int, name: str
    ) -> Answer:
        request = pb.GenerateRequest()
        request.CopyFrom(self._requests[number])
        request.request_id = f"faults-{number}-{name}"
        answer = Answer()
        last_s: float | None = None
        call = stub.Generate(request, timeout=REQUEST_TIMEOUT_S)
        try:
            async for message in call:
                now = time.monotonic()
                if last_s is not None and now - last_s > SHORTEST_GAP_S:
                    self.gaps.append(Gap(last_s, now))
                last_s = now
                self.num_tokens += len(message.tokens)
                wrong = answer.take(message)
                if wrong is not None:
                    self.differences.append(f"request {number}: {wrong}")
        finally:
            call.cancel()
        return answer
