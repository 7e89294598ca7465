"""A worker without a model: a real gRPC server on loopback that speaks the Session protocol.

Its tokens are a function of (prompt, output so far, choice), as those of a real worker are, so
that any worker can continue any request. Tests script what goes wrong: refusals, failures, holds,
kills.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from paceline.grpc_server import make_server
from paceline.internal.v1 import worker_pb2, worker_pb2_grpc
from paceline.request import (
    AttemptKey,
    FailureReason,
    FinishReason,
    Work,
    num_blocks_for,
    num_blocks_promised,
)
from paceline.router.worker_view import Role, WorkerMember
from paceline.v1 import inference_pb2
from paceline.wire import MAX_MESSAGE_BYTES, MAX_TOKEN_ID, WorkLimits, pack_uint32, work_from_proto

Oracle = Callable[[Sequence[int], Sequence[int], int], int]
BLOCK_TOKENS = 16
LIMITS = WorkLimits(MAX_TOKEN_ID + 1, 2**31)


def arithmetic_oracle(vocab_size: int) -> Oracle:
    """Make tokens that depend on all that went before."""

    def next_token(prompt: Sequence[int], output: Sequence[int], choice: int) -> int:
        state = sum(prompt) * 31 + choice * 17 + 1
        for token in output:
            state = (state * 6_364_136_223_846_793_005 + token + 1) % 2**64
        return (state * 6_364_136_223_846_793_005 % 2**64 >> 33) % vocab_size

    return next_token


def script_oracle(*scripts: Sequence[int]) -> Oracle:
    """Make choice i say scripts[i]."""
    return lambda prompt, output, choice: scripts[choice][len(output)]


def expected_output(
    oracle: Oracle, prompt: Sequence[int], num_tokens: int, choice: int = 0
) -> list[int]:
    output: list[int] = []
    while len(output) < num_tokens:
        output.append(oracle(prompt, output, choice))
    return output


@dataclass
class KvFabric:
    """What real workers move between each other: here only that a prompt is computed, and by
    whom."""

    first_tokens: dict[AttemptKey, dict[int, int]] = field(default_factory=dict)
    confirmed: set[AttemptKey] = field(default_factory=set)


class _Stream:
    """Where messages go out; gRPC takes one at a time."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self._turn = asyncio.Lock()

    async def write(self, message: worker_pb2.SessionResponse) -> None:
        async with self._turn:
            await self.context.write(message)


@dataclass
class _Sequence:
    work: Work
    choice: int
    stream_id: int
    output: list[int]
    num_sent: int


@dataclass
class _Running:
    work: Work
    needs_source: bool
    sequences: list[_Sequence]
    num_blocks: int


HEARTBEAT_S = 0.25


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """One scripted worker. `hold_at` stops every sequence at that output length until it is
    None."""

    def __init__(
        self,
        role: Role,
        oracle: Oracle,
        fabric: KvFabric,
        *,
        worker_id: str | None = None,
        incarnation: int = 1,
        num_blocks: int = 1000,
        max_num_seqs: int = 100,
        local_prefill_tokens: int = 0,
    ) -> None:
        self.role = role
        self.worker_id = worker_id or f"{role.value}-0"
        self.incarnation = incarnation
        self.num_blocks = num_blocks
        self.max_num_seqs = max_num_seqs
        self.local_prefill_tokens = local_prefill_tokens
        self.hold_at: int | None = None
        self.num_refusals_left = 0
        self.failures: list[tuple[int, FailureReason]] = []
        """(output length, reason): give back a sequence when it has that many tokens; used once."""
        self.num_cached_tokens = 0
        """Of each prompt, as it says when it admits one."""
        self.prefill_s: float | None = None
        """Report that a prompt took that long, by a clock that is an hour behind."""
        self.late_s: float | None = None
        """Say when each message was made: this long ago."""
        self.draining = False
        self.is_silent = False
        """Whether it sends no heartbeats, like a process that was stopped."""
        self.received: list[Work] = []
        self.cancelled: list[tuple[AttemptKey, tuple[int, ...]]] = []
        self.running: dict[AttemptKey, _Running] = {}
        self.num_sessions = 0
        self._oracle = oracle
        self._fabric = fabric
        self._num_seen = 0
        self._server: grpc.aio.Server | None = None
        self._port = 0

    @property
    def member(self) -> WorkerMember:
        return WorkerMember(self.worker_id, self.role, self.incarnation, f"127.0.0.1:{self._port}")

    @property
    def num_held_blocks(self) -> int:
        return sum(running.num_blocks for running in self.running.values())

    @property
    def num_sequences(self) -> int:
        return sum(len(running.sequences) for running in self.running.values())

    async def start(self) -> "FakeWorker":
        self._server = make_server(MAX_MESSAGE_BYTES)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        await self._server.start()
        return self

    async def kill(self) -> None:
        """Break every stream at once, as a dead process does."""
        assert self._server is not None
        await self._server.stop(None)
        self.running.clear()

    async def Session(self, request_iterator, context: Any) -> None:
        hello = (await context.read()).hello
        if hello.worker_incarnation != self.incarnation:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"this is incarnation {self.incarnation}"
            )
        stream = _Stream(context)
        self._num_seen = 0
        self.num_sessions += 1
        welcome = worker_pb2.Welcome(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            num_blocks=self.num_blocks,
            block_tokens=BLOCK_TOKENS,
            max_num_seqs=self.max_num_seqs,
            local_prefill_tokens=self.local_prefill_tokens,
            load=self._load(),
        )
        await stream.write(worker_pb2.SessionResponse(welcome=welcome))
        reader = asyncio.create_task(self._read(stream))
        try:
            beat_s = time.monotonic()
            while not reader.done():
                await self._step(stream)
                if not self.is_silent and time.monotonic() > beat_s:
                    beat_s = time.monotonic() + HEARTBEAT_S
                    await stream.write(worker_pb2.SessionResponse(step=worker_pb2.StepReport()))
                await asyncio.sleep(0.001)
        finally:
            reader.cancel()
            self.running.clear()
            self.num_sessions -= 1

    async def report_load(self, stream: "_Stream") -> None:
        await self._write_step(stream, worker_pb2.StepReport(load=self._load()))

    async def _read(self, stream: "_Stream") -> None:
        while isinstance(request := await stream.context.read(), worker_pb2.SessionRequest):
            kind = request.WhichOneof("message")
            if kind == "claim":
                continue  # there is one router
            if kind == "cancel":
                self._cancel(request.cancel)
            else:
                message = getattr(request, kind)
                await self._dispatch(
                    work_from_proto(message.work, LIMITS),
                    needs_source=kind == "admit" and message.HasField("source"),
                    stream=stream,
                )
            await self.report_load(stream)

    async def _dispatch(self, work: Work, *, needs_source: bool, stream: "_Stream") -> None:
        self.received.append(work)
        self._num_seen += 1
        refuse = self.draining or self.num_refusals_left > 0
        if self.num_refusals_left:
            self.num_refusals_left -= 1
        if not refuse:
            blocks = num_blocks_for(work.num_tokens, BLOCK_TOKENS)
            if self.role is Role.DECODE:
                blocks = num_blocks_promised(work.num_tokens, len(work.choices), BLOCK_TOKENS)
            assert self.num_held_blocks + blocks <= self.num_blocks, "the router overdrew"
            num_sequences = self.num_sequences + len(work.choices)
            assert num_sequences <= self.max_num_seqs, "the router overdrew"
            sequences = [
                _Sequence(work, choice, stream_id, work.output.tolist(), len(work.output))
                for choice, stream_id in zip(work.choices, work.stream_ids, strict=True)
            ]
            self.running[work.key] = _Running(work, needs_source, sequences, blocks)
        admission = worker_pb2.Admission(
            request_id=work.key.request_id,
            attempt=work.key.attempt,
            admitted=not refuse,
            message="scripted refusal" if refuse else "",
            cached_tokens=self.num_cached_tokens,
        )
        await stream.write(worker_pb2.SessionResponse(admission=admission))

    def _cancel(self, cancel: worker_pb2.Cancel) -> None:
        key = AttemptKey(cancel.request_id, cancel.attempt)
        self.cancelled.append((key, tuple(cancel.choices)))
        running = self.running.get(key)
        if running is None:
            return
        if cancel.choices:
            running.sequences = [s for s in running.sequences if s.choice not in cancel.choices]
        if not cancel.choices or not running.sequences:
            del self.running[key]

    async def _step(self, stream: "_Stream") -> None:
        columns = _Columns()
        for key, running in list(self.running.items()):
            if self.role is Role.PREFILL:
                self._prefill(key, running, columns)
                if key in self._fabric.first_tokens and self.prefill_s is not None:
                    await stream.write(_prefill_report(key, self.worker_id, self.prefill_s))
            else:
                self._decode(key, running, columns)
        for stream_id, reason in columns.failed:
            failure = worker_pb2.Failure(
                stream_ids=[stream_id],
                reason=worker_pb2.FailureReason.ValueType(reason.value),
                message="scripted failure",
            )
            await stream.write(worker_pb2.SessionResponse(failure=failure))
        if columns.rows or columns.failed or columns.ended:
            await self._write_step(stream, columns.report(self._load()))

    async def _write_step(self, stream: "_Stream", step: worker_pb2.StepReport) -> None:
        if self.late_s is not None:
            step.made_s = time.monotonic() - self.late_s
        await stream.write(worker_pb2.SessionResponse(step=step))

    def _prefill(self, key: AttemptKey, running: _Running, columns: "_Columns") -> None:
        if key in self._fabric.confirmed:
            del self.running[key]
            columns.ended = True
            return
        if key in self._fabric.first_tokens or self._is_held(running.sequences[0]):
            return
        firsts: dict[int, int] = {}
        if self._failed(running.sequences[0], columns):
            # A prompt is computed once for all choices, and fails for all of them.
            reason = columns.failed[-1][1]
            columns.failed += [(other.stream_id, reason) for other in running.sequences[1:]]
            del self.running[key]
            return
        for sequence in running.sequences:
            firsts[sequence.choice] = self._emit(sequence, columns)
        self._fabric.first_tokens[key] = firsts

    def _decode(self, key: AttemptKey, running: _Running, columns: "_Columns") -> None:
        if running.needs_source:
            firsts = self._fabric.first_tokens.get(key)
            if firsts is None or self._is_held(running.sequences[0]):
                return
            self._fabric.confirmed.add(key)
            running.needs_source = False
        for sequence in list(running.sequences):
            if self._is_held(sequence):
                continue
            if self._failed(sequence, columns) or self._ended(sequence, columns):
                running.sequences.remove(sequence)
        if not running.sequences:
            del self.running[key]
            columns.ended = True

    def _ended(self, sequence: _Sequence, columns: "_Columns") -> bool:
        self._emit(sequence, columns)
        return columns.finished[-1:] != [] and columns.finished[-1][0] == sequence.stream_id

    def _is_held(self, sequence: _Sequence) -> bool:
        return self.hold_at is not None and len(sequence.output) >= self.hold_at

    def _failed(self, sequence: _Sequence, columns: "_Columns") -> bool:
        for entry in self.failures:
            if len(sequence.output) == entry[0]:
                self.failures.remove(entry)
                columns.failed.append((sequence.stream_id, entry[1]))
                return True
        return False

    def _emit(self, sequence: _Sequence, columns: "_Columns") -> int:
        work = sequence.work
        index = len(sequence.output)
        token = self._oracle(work.prompt.tolist(), sequence.output, sequence.choice)
        sequence.output.append(token)
        columns.rows.append((sequence.stream_id, index, token))
        if work.sampling.logprobs is not None:
            top = [inference_pb2.TokenLogprob(token_id=token, logprob=-0.5)]
            columns.logprobs.append(
                worker_pb2.TokenLogprobs(position=len(columns.rows) - 1, logprob=-0.5, top=top)
            )
        if token in work.sampling.stop_token_ids:
            columns.finished.append((sequence.stream_id, FinishReason.STOP))
        elif len(sequence.output) == work.sampling.max_tokens:
            columns.finished.append((sequence.stream_id, FinishReason.LENGTH))
        return token

    def _load(self) -> worker_pb2.Load:
        return worker_pb2.Load(
            credit_blocks=self.num_blocks - self.num_held_blocks,
            credit_sequences=self.max_num_seqs - self.num_sequences,
            num_dispatches_seen=self._num_seen,
            num_running=len(self.running),
            num_free_blocks=self.num_blocks - self.num_held_blocks,
            draining=self.draining,
        )


def _prefill_report(
    key: AttemptKey, worker_id: str, prefill_s: float
) -> worker_pb2.SessionResponse:
    start_s = time.time() - 3600
    span = inference_pb2.Span(
        phase="prefill", worker_id=worker_id, start_s=start_s, end_s=start_s + prefill_s
    )
    report = worker_pb2.PhaseReport(request_id=key.request_id, attempt=key.attempt, spans=[span])
    return worker_pb2.SessionResponse(phase=report)


@dataclass
class _Columns:
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    finished: list[tuple[int, FinishReason]] = field(default_factory=list)
    logprobs: list[worker_pb2.TokenLogprobs] = field(default_factory=list)
    failed: list[tuple[int, FailureReason]] = field(default_factory=list)
    ended: bool = False

    def report(self, load: worker_pb2.Load) -> worker_pb2.StepReport:
        return worker_pb2.StepReport(
            stream_ids=pack_uint32([row[0] for row in self.rows]),
            indices=pack_uint32([row[1] for row in self.rows]),
            token_ids=pack_uint32([row[2] for row in self.rows]),
            finished_stream_ids=pack_uint32([stream_id for stream_id, _ in self.finished]),
            finish_reasons=bytes(reason.value for _, reason in self.finished),
            logprobs=self.logprobs,
            load=load,
        )
