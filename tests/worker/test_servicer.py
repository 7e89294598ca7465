"""The routers' streams of one worker, over real gRPC, with a core that writes down its calls."""

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from paceline.failpoints import Failpoints
from paceline.grpc_server import make_server
from paceline.internal.v1 import worker_pb2, worker_pb2_grpc
from paceline.v1 import inference_pb2
from paceline.wire import MAX_MESSAGE_BYTES, WorkLimits
from paceline.worker import servicer as servicer_module
from paceline.worker.core import LoadReport
from paceline.worker.identity import WorkerIdentity
from paceline.worker.mailbox import Mailbox
from paceline.worker.router_sessions import RouterSessions
from paceline.worker.servicer import WorkerServicer

TIMEOUT_S = 20.0
LIMITS = WorkLimits(vocab_size=1000, max_model_len=3_000_000)
IDENTITY = WorkerIdentity("decode-0", 5, 100, 16, 8, 0, b"layout", "a layout")


class RecordingCore:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def dispatch(self, session: int, work: Any, peer: Any, now: float) -> None:
        self.calls.append(("dispatch", work.key.request_id, peer))

    def cancel(self, session: int, key: Any, choices: tuple[int, ...], now: float) -> None:
        self.calls.append(("cancel", key.request_id, choices))

    def end_session(self, session: int, now: float) -> None:
        self.calls.append(("end_session", session))

    def load(self) -> LoadReport:
        return LoadReport(10, 4, 0, 0, 10, False)


class Engine:
    """Runs the mailbox on a thread, like a step loop that has no steps."""

    def __init__(self, core: RecordingCore) -> None:
        self.core, self.mailbox, self.sessions = core, Mailbox(), RouterSessions()
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            self.mailbox.run_calls(0.0)
            self.sessions.report(self.core, 0.0)  # type: ignore[arg-type]
            self.mailbox.wait(0.01)

    def stop(self) -> None:
        self._stop = True
        self._thread.join()


@asynccontextmanager
async def run_worker(
    stalled_s: Callable[[], float] = lambda: 0.0,
) -> AsyncIterator[tuple[RecordingCore, Any]]:
    core = RecordingCore()
    engine = Engine(core)
    server = make_server(MAX_MESSAGE_BYTES)
    servicer = WorkerServicer(
        IDENTITY,
        core,  # type: ignore[arg-type]
        engine.sessions,
        engine.mailbox,
        Failpoints(),
        LIMITS,
        stalled_s,
    )
    watching = asyncio.create_task(servicer.watch_engine())
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield core, worker_pb2_grpc.WorkerServiceStub(channel)
    finally:
        watching.cancel()
        await server.stop(None)
        engine.stop()


def hello(incarnation: int = 5) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(
        hello=worker_pb2.Hello(router_id="router-0", worker_incarnation=incarnation)
    )


def admit(**changes: Any) -> worker_pb2.SessionRequest:
    work = worker_pb2.Work(request_id="r", attempt=1, choices=[0], stream_ids=[7])
    work.prompt_token_ids.extend([1, 2, 3])
    work.sampling.seed, work.sampling.max_tokens = 1, 4
    work.MergeFrom(worker_pb2.Work(**changes))
    return worker_pb2.SessionRequest(admit=worker_pb2.Admit(work=work))


async def read_to_the_end(call: Any) -> None:
    while await call.read():
        pass


async def is_welcome_in_the_end(stub: Any) -> bool:
    while True:
        call = stub.Session()
        await call.write(hello())
        try:
            return (await call.read()).HasField("welcome")
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.01)


async def until(core: RecordingCore, call: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while call not in core.calls:
        assert time.monotonic() < deadline, f"{call} is not among {core.calls}"
        await asyncio.sleep(0.005)


async def test_a_router_is_welcomed_with_what_the_worker_can_take() -> None:
    async with run_worker() as (_, stub):
        call = stub.Session()
        await call.write(hello())
        welcome = (await call.read()).welcome
        assert (welcome.worker_id, welcome.incarnation) == ("decode-0", 5)
        assert (welcome.num_blocks, welcome.block_tokens, welcome.max_num_seqs) == (100, 16, 8)
        assert welcome.load.credit_blocks == 10


async def test_a_router_that_means_another_incarnation_is_refused() -> None:
    async with run_worker() as (_, stub):
        call = stub.Session()
        await call.write(hello(incarnation=4))
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call.read()
        assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "decode-0.5, not incarnation 4" in str(refusal.value.details())


async def test_a_session_must_begin_with_hello() -> None:
    async with run_worker() as (_, stub):
        call = stub.Session()
        await call.write(admit())
        with pytest.raises(grpc.aio.AioRpcError, match="hello"):
            await call.read()


async def test_a_session_that_says_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.worker.hello.HELLO_TIMEOUT_S", 0.1)
    async with run_worker() as (core, stub):
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(grpc.aio.AioRpcError, match="must be hello, within"):
                await stub.Session().read()
        assert core.calls == []


async def test_work_that_makes_no_sense_is_refused_alone_and_the_session_goes_on() -> None:
    async with run_worker() as (core, stub):
        call = stub.Session()
        await call.write(hello())
        await call.read()
        await call.write(admit(request_id="bad", stream_ids=[8]))
        answers = [await call.read(), await call.read()]
        (admission,) = [a.admission for a in answers if a.HasField("admission")]
        assert (admission.request_id, admission.admitted) == ("bad", False)
        assert "stream_ids" in admission.message
        await call.write(admit())
        await until(core, ("dispatch", "r", None))


async def test_work_that_would_hurt_the_engine_never_reaches_it() -> None:
    async with run_worker() as (core, stub):
        call = stub.Session()
        await call.write(hello())
        await call.read()
        reader = worker_pb2.WorkerAddress(worker_id="x" * 2000, address="127.0.0.1:1")
        bad = [
            admit(prompt_token_ids=[1000]),
            admit(sampling=inference_pb2.SamplingParams(temperature=math.nan)),
            admit(sampling=inference_pb2.SamplingParams(stop_token_ids=[2**32 - 1])),
            admit(sampling=inference_pb2.SamplingParams(logit_bias={1000: 1.0})),
            admit(request_id="r" * 100_000),
            worker_pb2.SessionRequest(
                admit=worker_pb2.Admit(work=admit().admit.work, source=reader)
            ),
        ]
        for request in bad:
            await call.write(request)
        refusals = []
        while len(refusals) < len(bad):
            answer = await call.read()
            refusals += [answer.admission] if answer.HasField("admission") else []
        assert not any(refusal.admitted for refusal in refusals)
        assert max(len(refusal.request_id) for refusal in refusals) == 1024
        await call.write(admit())
        await until(core, ("dispatch", "r", None))
        assert len(core.calls) == 1


async def test_the_longest_prompts_reach_the_engine() -> None:
    async with run_worker() as (core, stub):
        call = stub.Session()
        await call.write(hello())
        await call.read()
        await call.write(admit(prompt_token_ids=[999] * 2_000_000))
        await until(core, ("dispatch", "r", None))


async def test_a_message_that_cannot_be_read_ends_its_session_and_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    async with run_worker() as (core, stub):
        good, bad = stub.Session(), stub.Session()
        for call in (good, bad):
            await call.write(hello())
            await call.read()
        bad._request_serializer = bytes
        await bad.write(b"\xff" * 100)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_to_the_end(bad)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await until(core, ("end_session", 1))
        await good.write(admit())
        await until(core, ("dispatch", "r", None))
        ours = [record for record in caplog.records if record.name.startswith("paceline")]
        assert len([record for record in ours if "message_malformed" in record.getMessage()]) == 1
        assert not any(record.exc_info for record in ours)


async def test_when_the_stream_ends_the_engine_hears_it() -> None:
    async with run_worker() as (core, stub):
        call = stub.Session()
        await call.write(hello())
        await call.read()
        call.cancel()
        await until(core, ("end_session", 0))


async def test_sessions_end_while_the_engine_is_stalled_and_new_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(servicer_module, "HEARTBEAT_S", 0.02)
    seconds = [0.0]
    async with run_worker(lambda: seconds[0]) as (_, stub):
        call = stub.Session()
        await call.write(hello())
        assert (await call.read()).HasField("welcome")
        heartbeat = await call.read()
        while heartbeat.step.HasField("load"):
            heartbeat = await call.read()
        assert heartbeat == worker_pb2.SessionResponse(step=worker_pb2.StepReport())
        seconds[0] = 12.3
        for stalled in (call, stub.Session()):
            if stalled is not call:
                await stalled.write(hello())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_to_the_end(stalled)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "has finished no step for 12.3 s" in str(caught.value.details())
        seconds[0] = 0.0
        async with asyncio.timeout(TIMEOUT_S):
            assert await is_welcome_in_the_end(stub)


async def test_a_session_that_brings_more_than_the_engine_can_take_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with run_worker() as (core, stub):
        call = stub.Session()
        await call.write(hello())
        await call.read()
        monkeypatch.setattr("paceline.worker.mailbox.MAX_CALLS", 0)
        await call.write(admit())
        await until(core, ("end_session", 0))
        assert ("dispatch", "r", None) not in core.calls
        assert "event=session_ended session=0 reason=mailbox_full" in caplog.text
