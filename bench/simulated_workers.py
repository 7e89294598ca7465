"""A prefill worker and a decode worker that compute nothing and take their time, so that the
capacity of the pair is known. For benchmarks of the router."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import grpc

from paceline.internal.v1 import worker_pb2, worker_pb2_grpc
from paceline.request import num_blocks_for, num_blocks_promised
from paceline.router.worker_view import Role, WorkerMember
from paceline.v1 import inference_pb2
from paceline.wire import pack_uint32

BLOCK_TOKENS = 16
NUM_BLOCKS = 1 << 14
MIN_OUTPUT_TOKENS = 16
MAX_OUTPUT_TOKENS = 48
"""The first token of a prompt says how many tokens its output has."""


class SimulatedRates(NamedTuple):
    """What the pair can do."""

    prefill_tokens_per_s: float
    step_s: float
    """Of both workers; a decode step gives each running sequence a token."""
    num_slots: int
    """Sequences that the decode worker runs at once."""


class ComputedTokens(NamedTuple):
    """Tokens of prompts and outputs that were computed since the last question."""

    num_all: int
    num_wasted: int
    """Of requests that were cancelled before their end."""


_Key = tuple[str, int]


@dataclass(slots=True)
class _Sequence:
    """One attempt, at both workers."""

    stream_id: int
    num_prompt: int
    num_output: int
    num_prompt_computed: int = 0
    num_sent: int = 0

    @property
    def has_prompt(self) -> bool:
        return self.num_prompt_computed == self.num_prompt


@dataclass
class Fabric:
    """What the two workers share: attempts, and counts of what was computed."""

    sequences: dict[_Key, _Sequence] = field(default_factory=dict)
    num_all: int = 0
    num_wasted: int = 0

    def add(self, key: _Key, work: worker_pb2.Work) -> None:
        """Note an attempt that reaches its first or its second worker."""
        prompt = work.prompt_token_ids
        self.sequences.setdefault(key, _Sequence(work.stream_ids[0], len(prompt), prompt[0]))

    def cancel(self, key: _Key) -> None:
        sequence = self.sequences.pop(key, None)
        if sequence is not None:
            self.num_wasted += sequence.num_prompt_computed + sequence.num_sent

    def take_counts(self) -> ComputedTokens:
        counts = ComputedTokens(self.num_all, self.num_wasted)
        self.num_all = self.num_wasted = 0
        return counts


@dataclass
class _Rows:
    """Tokens of one step."""

    stream_ids: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)

    def add(self, stream_id: int, index: int, *, is_last: bool) -> None:
        self.stream_ids.append(stream_id)
        self.indices.append(index)
        if is_last:
            self.finished.append(stream_id)

    def report(self, load: worker_pb2.Load) -> worker_pb2.SessionResponse:
        step = worker_pb2.StepReport(
            stream_ids=pack_uint32(self.stream_ids),
            indices=pack_uint32(self.indices),
            token_ids=pack_uint32([65 + index % 26 for index in self.indices]),
            finished_stream_ids=pack_uint32(self.finished),
            finish_reasons=bytes([inference_pb2.FINISH_REASON_STOP]) * len(self.finished),
            load=load,
            made_s=time.monotonic(),
        )
        return worker_pb2.SessionResponse(step=step)


class SimulatedWorker(worker_pb2_grpc.WorkerServiceServicer):
    """One of the pair, for one router."""

    def __init__(self, role: Role, rates: SimulatedRates, fabric: Fabric) -> None:
        self._role = role
        self._rates = rates
        self._fabric = fabric
        self._held: dict[_Key, None] = {}
        """Attempts that hold blocks here, oldest first."""
        self._num_seen = 0
        self._unused_tokens = 0.0

    async def Session(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        hello = (await context.read()).hello
        self._num_seen = 0
        self._writing = asyncio.Lock()
        welcome = worker_pb2.Welcome(
            worker_id=f"{self._role.value}-0",
            incarnation=hello.worker_incarnation,
            num_blocks=NUM_BLOCKS,
            block_tokens=BLOCK_TOKENS,
            max_num_seqs=self._num_slots,
            load=self._load(),
        )
        await self._write(context, worker_pb2.SessionResponse(welcome=welcome))
        stepping = asyncio.create_task(self._step_until_cancelled(context))
        try:
            while isinstance(request := await context.read(), worker_pb2.SessionRequest):
                await self._take(request, context)
        finally:
            stepping.cancel()
            await asyncio.gather(stepping, return_exceptions=True)

    @property
    def _num_slots(self) -> int:
        return self._rates.num_slots if self._role is Role.DECODE else 1 << 16

    async def _take(self, request: worker_pb2.SessionRequest, context: Any) -> None:
        kind = request.WhichOneof("message")
        if kind == "cancel":
            key = (request.cancel.request_id, request.cancel.attempt)
            self._fabric.cancel(key)
            self._held.pop(key, None)
            return
        work = request.admit.work if kind == "admit" else request.prefill.work
        key = (work.request_id, work.attempt)
        self._num_seen += 1
        self._fabric.add(key, work)
        self._held[key] = None
        admission = worker_pb2.Admission(request_id=key[0], attempt=key[1], admitted=True)
        await self._write(context, worker_pb2.SessionResponse(admission=admission))

    async def _step_until_cancelled(self, context: Any) -> None:
        loop = asyncio.get_running_loop()
        last_s = loop.time()
        while True:
            await asyncio.sleep(self._rates.step_s)
            now = loop.time()
            rows = _Rows()
            for key in [key for key in self._held if key not in self._fabric.sequences]:
                del self._held[key]  # it was cancelled, or has ended at the other worker
            if self._role is Role.PREFILL:
                self._prefill(now - last_s, rows)
            else:
                self._decode(rows)
            last_s = now
            await self._write(context, rows.report(self._load()))

    def _prefill(self, passed_s: float, rows: _Rows) -> None:
        """Compute the prompts one after the other, as far as the rate allows."""
        self._unused_tokens += passed_s * self._rates.prefill_tokens_per_s
        for key in self._held:
            sequence = self._fabric.sequences[key]
            if sequence.has_prompt:
                continue
            num_tokens = min(
                sequence.num_prompt - sequence.num_prompt_computed, int(self._unused_tokens)
            )
            sequence.num_prompt_computed += num_tokens
            self._unused_tokens -= num_tokens
            self._fabric.num_all += num_tokens
            if not sequence.has_prompt:
                return
            rows.add(sequence.stream_id, 0, is_last=False)
        self._unused_tokens = 0.0  # nothing waits: what is not used is lost

    def _decode(self, rows: _Rows) -> None:
        """Give each sequence whose prompt has been computed its next token."""
        for key in list(self._held):
            sequence = self._fabric.sequences[key]
            if not sequence.has_prompt:
                continue
            is_last = sequence.num_sent + 1 == sequence.num_output
            rows.add(sequence.stream_id, sequence.num_sent, is_last=is_last)
            sequence.num_sent += 1
            self._fabric.num_all += 1
            if is_last:
                del self._fabric.sequences[key], self._held[key]

    async def _write(self, context: Any, message: worker_pb2.SessionResponse) -> None:
        async with self._writing:
            await context.write(message)

    def _load(self) -> worker_pb2.Load:
        num_used, num_pending = 0, 0
        for key in self._held:
            sequence = self._fabric.sequences.get(key)
            if sequence is None:
                continue
            if self._role is Role.PREFILL:
                num_used += num_blocks_for(sequence.num_prompt, BLOCK_TOKENS)
                num_pending += sequence.num_prompt - sequence.num_prompt_computed
            else:
                num_tokens = sequence.num_prompt + sequence.num_sent
                num_used += num_blocks_promised(num_tokens, 1, BLOCK_TOKENS)
        return worker_pb2.Load(
            credit_blocks=NUM_BLOCKS - num_used,
            credit_sequences=self._num_slots - len(self._held),
            num_dispatches_seen=self._num_seen,
            num_running=len(self._held),
            num_pending_tokens=num_pending,
            num_free_blocks=NUM_BLOCKS - num_used,
        )


def run_workers(pipe: Connection, rates: SimulatedRates) -> None:
    """Serve the pair: say its members on the pipe, then its counts for each message, until that is
    "stop"."""

    async def serve() -> None:
        fabric = Fabric()
        members: list[WorkerMember] = []
        async with contextlib.AsyncExitStack() as stack:
            for role in (Role.PREFILL, Role.DECODE):
                server = grpc.aio.server()
                worker = SimulatedWorker(role, rates, fabric)
                worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server)
                port = server.add_insecure_port("127.0.0.1:0")
                await server.start()
                stack.push_async_callback(server.stop, None)
                members.append(WorkerMember(f"{role.value}-0", role, 1, f"127.0.0.1:{port}"))
            pipe.send(members)
            while await asyncio.get_running_loop().run_in_executor(None, pipe.recv) != "stop":
                pipe.send(fabric.take_counts())

    asyncio.run(serve())
