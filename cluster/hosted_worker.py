"""A prefill or decode worker inside a Ray actor's process."""

import asyncio
import os
import time
from typing import TYPE_CHECKING

from paceline.cluster.hosted import HostContext, HostedLoad
from paceline.cluster.launcher import Membership
from paceline.cluster.model_cache import model_cache_dir
from paceline.cluster.process_state import Role
from paceline.engine.model_source import ModelFolder, prepare_model
from paceline.kv_transfer.settings import KvSettings

if TYPE_CHECKING:
    from paceline.worker.process import WorkerProcess

ANY_ADDRESS = "0.0.0.0"
STOP_TIMEOUT_S = 5.0


class HostedWorker:
    """Calls of `WorkerProcess` that may block run on a thread beside the loop."""

    def __init__(self, context: HostContext) -> None:
        self._context = context
        self._worker: WorkerProcess | None = None

    async def start(self) -> str:
        return await asyncio.to_thread(self._start)

    def load(self) -> HostedLoad:
        if self._worker is None:
            return HostedLoad()
        status = self._worker.status()
        return HostedLoad(
            draining=status.draining,
            is_idle=status.is_idle,
            stalled_s=status.stalled_s,
            num_blocks=status.num_blocks,
            num_free_blocks=status.num_free_blocks,
            num_running=status.num_running,
        )

    async def update_membership(self, membership: Membership) -> None:
        from paceline.worker.core import Peer

        if self._worker is None:
            return
        live = {m: Peer(m.worker_id, m.incarnation, m.address) for m in membership.members}
        reads = self._context.name.role is Role.DECODE
        sources = [peer for m, peer in live.items() if reads and m.role is Role.PREFILL]
        self._worker.update_membership(list(live.values()), sources)

    async def drain(self) -> None:
        if self._worker is not None:
            self._worker.drain()

    async def stop(self) -> None:
        if self._worker is not None:
            await asyncio.to_thread(self._worker.stop, STOP_TIMEOUT_S)

    async def check_integrity(self) -> None:
        if self._worker is not None:
            await asyncio.to_thread(self._worker.check_integrity)

    def arm_failpoint(self, specification: str) -> None:
        if self._worker is not None:
            self._worker.arm_failpoint(specification)

    def _start(self) -> str:
        context = self._context
        num_threads = _num_threads(context)
        # Read when torch is imported, so this has to come first. Ray sets OMP_NUM_THREADS to 1.
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(num_threads)
        # How long OpenMP's threads spin for the next product before they sleep. For ever, they take
        # the cores of the other workers on a machine; not at all, a lone worker loses a third.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        started = time.monotonic()
        folder = prepare_model(context.settings.model, model_cache_dir(), context.on_progress)
        context.on_step("prepare the model", time.monotonic() - started)
        started = time.monotonic()
        worker = self._build(folder, num_threads)
        context.on_step("import torch", time.monotonic() - started)
        worker.start(context.on_step, context.on_progress)
        self._worker = worker
        return worker.address

    def _build(self, folder: ModelFolder, num_threads: int) -> "WorkerProcess":
        from paceline.decode_worker import process as decode_process
        from paceline.prefill_worker import process as prefill_process
        from paceline.worker.process import WorkerSpec

        context, settings = self._context, self._context.settings
        spec = WorkerSpec(
            worker_id=context.name.worker_id,
            incarnation=context.name.incarnation,
            host=context.host,
            model=settings.model,
            model_folder=folder,
            kv=_kv_settings(context),
        )
        threads = {"num_threads": num_threads}
        if context.name.role is Role.PREFILL:
            prefill = settings.prefill.model_copy(update=threads)
            return prefill_process.build(spec, prefill, context.on_failure)
        decode = settings.decode.model_copy(update=threads)
        return decode_process.build(spec, decode, context.on_failure)


def _kv_settings(context: HostContext) -> KvSettings:
    """Put this node's own address where the settings, which all nodes share, name any."""
    kv = context.settings.kv
    if kv.listen_host != ANY_ADDRESS:
        return kv
    return kv.model_copy(update={"listen_host": context.host})


def _num_threads(context: HostContext) -> int:
    settings = context.settings
    pool = settings.prefill if context.name.role is Role.PREFILL else settings.decode
    return pool.num_threads or len(os.sched_getaffinity(0))
