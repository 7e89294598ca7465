"""A real router with fake workers, on loopback, in the test's own event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from fake_worker import FakeWorker, KvFabric, Oracle, arithmetic_oracle
from tiny_tokenizer import EOS_ID, VOCAB_SIZE, write_tokenizer

from paceline.router.model import ServedModel
from paceline.router.server import Router
from paceline.router.settings import RouterSettings
from paceline.router.worker_view import Role, WorkerMember
from paceline.v1 import inference_pb2, inference_pb2_grpc

DEADLINE_S = 10.0


async def until(condition: Callable[[], bool], what: str) -> None:
    """Poll until the condition holds; fail with `what` after a deadline."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + DEADLINE_S
    while not condition():
        assert loop.time() < end_s, f"not within {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.002)


@dataclass
class Answer:
    """What a client collected; checks indices as they come."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    finish_reasons: dict[int, int] = field(default_factory=dict)
    messages: list[inference_pb2.GenerateResponse] = field(default_factory=list)

    @property
    def last(self) -> inference_pb2.GenerateResponse:
        return self.messages[-1]

    def add(self, message: inference_pb2.GenerateResponse) -> None:
        self.messages.append(message)
        tokens = self.tokens.setdefault(message.choice, [])
        for token in message.tokens:
            assert token.index == len(tokens), "a gap or a repeat in the stream"
            tokens.append(token.token_id)
        self.texts[message.choice] = self.texts.get(message.choice, "") + message.text
        if message.finish_reason:
            assert message.choice not in self.finish_reasons
            self.finish_reasons[message.choice] = message.finish_reason


@dataclass
class RouterDeployment:
    """A router, its workers and a client."""

    router: Router
    workers: dict[str, FakeWorker]
    fabric: KvFabric
    oracle: Oracle
    stub: "inference_pb2_grpc.InferenceServiceAsyncStub"
    channel: grpc.aio.Channel
    version: int = 0

    @property
    def prefill(self) -> FakeWorker:
        return self.workers["prefill-0"]

    @property
    def decode(self) -> FakeWorker:
        return self.workers["decode-0"]

    async def add(self, worker: FakeWorker) -> FakeWorker:
        """Start a worker and tell the router; one of the same name takes the place of the old."""
        self.workers[worker.worker_id] = await worker.start()
        await self.announce([worker.member for worker in self.workers.values()])
        return worker

    async def replace(self, worker_id: str) -> FakeWorker:
        """Start the next incarnation of a killed worker."""
        old = self.workers[worker_id]
        worker = FakeWorker(
            old.role,
            self.oracle,
            self.fabric,
            worker_id=worker_id,
            incarnation=old.incarnation + 1,
            num_blocks=old.num_blocks,
            local_prefill_tokens=old.local_prefill_tokens,
        )
        return await self.add(worker)

    async def announce(self, members: Sequence[WorkerMember]) -> None:
        self.version += 1
        await self.router.update_membership(self.version, members)

    async def connected(self) -> None:
        await until(
            lambda: all(link.is_connected for link in self.router.status().workers),
            "all workers are connected",
        )

    async def generate(
        self, request: inference_pb2.GenerateRequest, *, deadline_s: float | None = None
    ) -> Answer:
        answer = Answer()
        call = self.stub.Generate(request, timeout=deadline_s)
        try:
            async for message in call:
                answer.add(message)
        finally:
            # A task that is cancelled before its call's first read does not always cancel the call.
            call.cancel()
        return answer

    def assert_idle(self) -> None:
        """Nothing is left of any request, in the router or at the workers."""
        status = self.router.status()
        assert (status.num_waiting, status.num_running) == (0, 0)
        assert not any(worker.running for worker in self.workers.values())

    async def idle(self) -> None:
        await until(
            lambda: (
                not self.router.status().num_running
                and not self.router.status().num_waiting
                and not any(worker.running for worker in self.workers.values())
            ),
            "router and workers are idle",
        )


@asynccontextmanager
async def router_deployment(
    folder: Path,
    *,
    oracle: Oracle | None = None,
    settings: RouterSettings | None = None,
    max_model_len: int = 512,
    num_blocks: int = 1000,
    workers: bool = True,
) -> AsyncIterator[RouterDeployment]:
    """Start a router, with one prefill and one decode worker if `workers`."""
    oracle = oracle or arithmetic_oracle(VOCAB_SIZE - 4)
    settings = settings or RouterSettings(grpc_port=0, drain_timeout_s=0.0)
    model = ServedModel("tiny", max_model_len, VOCAB_SIZE, (EOS_ID,), write_tokenizer(folder))
    router = Router(settings, model)
    await router.start()
    async with grpc.aio.insecure_channel(router.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        deployment = RouterDeployment(router, {}, KvFabric(), oracle, stub, channel)
        try:
            if workers:
                for role in Role:
                    fake = FakeWorker(role, oracle, deployment.fabric, num_blocks=num_blocks)
                    await deployment.add(fake)
                await deployment.connected()
            yield deployment
        finally:
            await router.stop()
            for worker in deployment.workers.values():
                await worker.kill()
