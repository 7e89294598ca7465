"""One worker: the engine thread, the io thread and what they share, put together and taken apart.

The thread that calls `start` and `stop` is *main*; in a deployment it runs Ray's methods only.
"""

import asyncio
import concurrent.futures
import logging
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import grpc
import torch

from paceline.block_keys import make_root_key
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.load import LoadedEngine, load_engine
from paceline.engine.model_source import ModelFolder
from paceline.engine.prefix_cache import PrefixCache
from paceline.engine.settings import ModelSettings
from paceline.engine.warm_up import warm_up
from paceline.failpoints import Failpoints
from paceline.grpc_server import make_server
from paceline.internal.v1 import kv_pb2_grpc, worker_pb2_grpc
from paceline.kv_transfer.lease import LeaseTable
from paceline.kv_transfer.pool_memory import PoolMemory
from paceline.kv_transfer.select import build_transport
from paceline.kv_transfer.settings import KvSettings
from paceline.kv_transfer.transport import LocalPool, Transport
from paceline.request import AttemptKey
from paceline.wire import MAX_MESSAGE_BYTES, WorkLimits
from paceline.worker.core import Core, LoadReport, Peer
from paceline.worker.identity import WorkerIdentity
from paceline.worker.kv_import import ImportListener
from paceline.worker.kv_owner import KvOwner
from paceline.worker.kv_reader import KvReader
from paceline.worker.mailbox import Mailbox
from paceline.worker.router_sessions import RouterSessions
from paceline.worker.servicer import WorkerServicer
from paceline.worker.settings import WorkerSettings
from paceline.worker.step_loop import StepLoop

logger = logging.getLogger(__name__)

IDLE_ROUND_S = 0.25
"""How often an idle engine looks at deadlines, such as those of leases."""
STOP_TIMEOUT_S = 10.0
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Which worker this is and what it serves."""

    worker_id: str
    incarnation: int
    host: str
    """Address that the worker's gRPC server listens on."""
    model: ModelSettings
    model_folder: ModelFolder
    """Prepared by `paceline.engine.model_source.prepare_model`."""
    kv: KvSettings


class WorkerStatus(NamedTuple):
    """A worker as it was after its last round."""

    num_blocks: int
    num_free_blocks: int
    num_running: int
    num_pending_tokens: int
    draining: bool
    is_idle: bool
    stalled_s: float
    """Since the last progress, once that is longer than its steps explain; else 0."""
    num_steps: int


@dataclass(frozen=True, slots=True, eq=False)
class WorkerParts:
    """What a kind of worker builds its core from."""

    spec: WorkerSpec
    identity: WorkerIdentity
    engine: LoadedEngine
    allocator: BlockAllocator
    prefix_cache: PrefixCache
    leases: LeaseTable
    sessions: RouterSessions
    mailbox: Mailbox
    transport: Transport
    failpoints: Failpoints


class KindOfWorker(NamedTuple):
    """What differs between kinds of worker."""

    decodes: bool
    """Whether most of its steps decode."""
    local_prefill_tokens: int
    """Longest uncached context that it computes itself for routers; 0: none."""
    build: Callable[[WorkerParts], "WiredCore"]
    """Build the core; called once, on main, before any thread has started."""


class WiredCore(NamedTuple):
    """A core, and how the io thread's KV sessions reach it."""

    core: Core
    connect: Callable[[KvOwner, KvReader], None]
    """Called once on the io thread, before the server listens."""
    import_listener: ImportListener
    on_reader_lost: Callable[[str, float], None]
    on_released: Callable[[str, AttemptKey, float], None]


class WorkerProcess:
    """A worker in this process: `start`, then any of the others, then `stop`, all from main."""

    def __init__(
        self,
        spec: WorkerSpec,
        settings: WorkerSettings,
        kind: KindOfWorker,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.spec = spec
        self.address = ""
        self.failpoints = Failpoints.from_environment()
        self._settings = settings
        self._kind = kind
        self._on_failure = on_failure
        self._memory: PoolMemory | None = None
        self._transport: Transport | None = None
        self._reader: KvReader | None = None
        self._server: grpc.aio.Server | None = None
        self._watching: asyncio.Task[None] | None = None
        self._steps: StepLoop | None = None
        self._parts: WorkerParts | None = None
        self._core: Core | None = None
        self._draining = False
        self._snapshot = (LoadReport(0, 0, 0, 0, 0, False), True)
        self._io = asyncio.new_event_loop()
        self._io_thread = threading.Thread(target=self._io.run_forever, name="io", daemon=True)

    def start(
        self,
        on_step: Callable[[str, float], None],
        on_progress: Callable[[str, float], None] = lambda name, share: None,
    ) -> None:
        """Load, allocate, connect, warm up and listen; returns when the worker can take work.

        `on_step(name, seconds)` is called after each step of the start-up checklist,
        `on_progress(name, share done)` while the model loads.
        """
        engine = self._load(on_step, on_progress)
        parts = self._parts = self._build_parts(engine)
        self._timed(on_step, "warm up", lambda: warm_up(engine.runner, parts.identity.block_tokens))
        wired = self._kind.build(parts)
        self._core = wired.core
        steps = self._steps = StepLoop(
            wired.core,
            engine.runner,
            parts.mailbox,
            after_round=lambda: self._after_round(parts, wired.core),
            on_failure=self._on_failure,
            idle_round_s=IDLE_ROUND_S,
            most_stall_s=self._settings.progress_timeout_s,
            overlap=engine.overlap,
        )
        self._io_thread.start()
        self._timed(on_step, "listen", lambda: self._run_on_io(self._listen(parts, wired, steps)))
        steps.start()

    def status(self) -> WorkerStatus:
        """Describe the worker; waits for nothing."""
        parts, _, steps = self._started()
        load, is_idle = self._snapshot
        return WorkerStatus(
            num_blocks=parts.identity.num_blocks,
            num_free_blocks=load.num_free_blocks,
            num_running=load.num_running,
            num_pending_tokens=load.num_pending_tokens,
            draining=self._draining,
            is_idle=is_idle,
            stalled_s=steps.stalled_s(),
            num_steps=steps.num_steps,
        )

    def drain(self) -> None:
        """Take no new work; what runs finishes. `status().is_idle` says when."""
        parts, core, _ = self._started()
        self._draining = True
        parts.mailbox.post(core.drain)

    def update_membership(self, live: Sequence[Peer], sources: Sequence[Peer] = ()) -> None:
        """Learn which workers live; what belonged to others is dropped at once.

        `sources` are those whose KV this worker will read: it connects to them now, so that no
        request has to wait for that.
        """
        self._started()
        self._io.call_soon_threadsafe(self._learn_peers, live, sources)

    def check_integrity(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Check every invariant between two steps; raises IntegrityError, or TimeoutError."""
        parts, core, _ = self._started()
        self._call_engine(parts.mailbox, lambda now: core.check_integrity(), timeout_s)

    def arm_failpoint(self, specification: str) -> None:
        """Arm faults for tests, in addition to none: earlier ones are forgotten."""
        self.failpoints.arm(specification)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End threads and free everything, whatever still runs. Peers see their sessions end."""
        if self._io_thread.is_alive():
            self._run_on_io(self._close_io(), timeout_s)
        if self._steps is not None:
            self._steps.stop(timeout_s)
        if self._io_thread.is_alive():
            self._io.call_soon_threadsafe(self._io.stop)
            self._io_thread.join(timeout_s)
        if not self._io.is_running():
            self._io.close()
        if self._transport is not None:
            self._transport.close()
        if self._parts is not None:
            self._parts.engine.runner.close()
        # All of these hold the pool.
        self._transport = self._parts = self._steps = self._core = None
        if self._memory is not None:
            self._memory.close()

    def _after_round(self, parts: WorkerParts, core: Core) -> None:
        """On the engine thread, so that nobody else has to look into the core."""
        parts.sessions.report(core, time.monotonic())
        self._snapshot = (core.load(), core.is_idle)

    def _load(
        self, on_step: Callable[[str, float], None], on_progress: Callable[[str, float], None]
    ) -> LoadedEngine:
        return load_engine(
            self.spec.model,
            self.spec.model_folder,
            self._settings,
            block_tokens=self.spec.kv.block_tokens,
            allocate=self._allocate,
            on_step=on_step,
            on_progress=on_progress,
            decodes=self._kind.decodes,
        )

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        """Allocate a pool in CPU memory, which other processes can map."""
        self._memory = PoolMemory.create(
            num_bytes, f"{self.spec.worker_id}.{self.spec.incarnation}"
        )
        return self._memory.tensor

    def _build_parts(self, engine: LoadedEngine) -> WorkerParts:
        spec = self.spec
        fingerprint = engine.layout.fingerprint(engine.model_revision)
        identity = WorkerIdentity(
            worker_id=spec.worker_id,
            incarnation=spec.incarnation,
            num_blocks=engine.num_blocks,
            block_tokens=spec.kv.block_tokens,
            max_num_seqs=self._settings.max_num_seqs,
            local_prefill_tokens=self._kind.local_prefill_tokens,
            layout_fingerprint=fingerprint,
            layout_description=engine.layout.describe(),
        )
        allocator = BlockAllocator(engine.num_blocks)
        pool = LocalPool(
            spec.worker_id, spec.incarnation, engine.layout, engine.num_blocks, engine.pool.blocks
        )
        self._transport = build_transport(spec.kv, pool, self._memory)
        return WorkerParts(
            spec=spec,
            identity=identity,
            engine=engine,
            allocator=allocator,
            prefix_cache=PrefixCache(
                allocator,
                spec.kv.block_tokens,
                make_root_key(fingerprint, secrets.token_bytes(32)),
            ),
            leases=LeaseTable(allocator, spec.kv.lease_ttl_s),
            sessions=RouterSessions(),
            mailbox=Mailbox(),
            transport=self._transport,
            failpoints=self.failpoints,
        )

    async def _listen(self, parts: WorkerParts, wired: WiredCore, steps: StepLoop) -> None:
        owner = KvOwner(
            parts.identity,
            parts.leases,
            parts.transport,
            parts.mailbox,
            on_reader_lost=wired.on_reader_lost,
            on_released=wired.on_released,
            failpoints=parts.failpoints,
        )
        self._reader = KvReader(
            parts.identity,
            parts.transport,
            wired.import_listener,
            parts.failpoints,
            heartbeat_s=self.spec.kv.heartbeat_s,
            silence_limit_s=self.spec.kv.silence_limit_s,
            verdict_timeout_s=self.spec.kv.read_timeout_s,
            vocab_size=parts.engine.config.vocab_size,
        )
        wired.connect(owner, self._reader)
        servicer = WorkerServicer(
            parts.identity,
            wired.core,
            parts.sessions,
            parts.mailbox,
            parts.failpoints,
            WorkLimits(parts.engine.config.vocab_size, parts.engine.max_model_len),
            steps.stalled_s,
        )
        self._watching = asyncio.create_task(servicer.watch_engine(), name="watch the engine")
        self._server = make_server(MAX_MESSAGE_BYTES)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, self._server)
        kv_pb2_grpc.add_KvServiceServicer_to_server(owner, self._server)
        port = self._server.add_insecure_port(f"{self.spec.host}:0")
        await self._server.start()
        self.address = f"{self.spec.host}:{port}"

    async def _close_io(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._reader is not None:
            await self._reader.close()
        if self._server is not None:
            await self._server.stop(grace=None)

    def _learn_peers(self, live: Sequence[Peer], sources: Sequence[Peer]) -> None:
        if self._reader is None:
            return
        self._reader.drop_absent({peer.name for peer in live})
        for source in sources:
            self._reader.connect(source)

    def _run_on_io(
        self, coroutine: Coroutine[Any, Any, Result], timeout_s: float = STOP_TIMEOUT_S
    ) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._io).result(timeout_s)

    @staticmethod
    def _call_engine(mailbox: Mailbox, call: Callable[[float], Result], timeout_s: float) -> Result:
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def run(now: float) -> None:
            try:
                future.set_result(call(now))
            except BaseException as error:
                future.set_exception(error)

        mailbox.post(run)
        return future.result(timeout_s)

    @staticmethod
    def _timed(
        on_step: Callable[[str, float], None], name: str, action: Callable[[], Result]
    ) -> Result:
        started = time.monotonic()
        result = action()
        on_step(name, time.monotonic() - started)
        return result

    def _started(self) -> tuple[WorkerParts, Core, StepLoop]:
        if self._parts is None or self._core is None or self._steps is None:
            raise RuntimeError(f"{self.spec.worker_id} has not been started, or was stopped")
        return self._parts, self._core, self._steps
