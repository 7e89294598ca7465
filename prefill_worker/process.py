"""Put a prefill worker together."""

import time
from collections.abc import Callable, Sequence

from paceline.kv_transfer.lease import FirstToken
from paceline.prefill_worker.core import PrefillCore
from paceline.prefill_worker.scheduler import PrefillScheduler
from paceline.prefill_worker.settings import PrefillSettings
from paceline.request import AttemptKey, Span
from paceline.worker.kv_owner import KvOwner
from paceline.worker.kv_reader import KvReader
from paceline.worker.process import (
    KindOfWorker,
    WiredCore,
    WorkerParts,
    WorkerProcess,
    WorkerSpec,
)


def build(
    spec: WorkerSpec,
    settings: PrefillSettings,
    on_failure: Callable[[BaseException], None] = lambda error: None,
) -> WorkerProcess:
    """Make a prefill worker that has not been started; `on_failure` hears of its engine's end."""

    def build_core(parts: WorkerParts) -> WiredCore:
        scheduler: PrefillScheduler[int] = PrefillScheduler(
            parts.allocator,
            parts.prefix_cache,
            block_tokens=spec.kv.block_tokens,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            age_bound_s=settings.age_bound_s,
            max_model_len=parts.engine.max_model_len,
            eos_token_ids=parts.engine.config.eos_token_ids,
        )
        core = PrefillCore(
            scheduler,
            parts.leases,
            parts.sessions,
            parts.failpoints,
            worker_id=spec.worker_id,
            unix_offset_s=time.time() - time.monotonic(),
        )

        def connect(owner: KvOwner, reader: KvReader) -> None:
            core.notify_changed = owner.notify_changed

        return WiredCore(core, connect, _NoImports(), core.reader_lost, core.released)

    return WorkerProcess(spec, settings, KindOfWorker(False, 0, build_core), on_failure)


class _NoImports:
    """A prefill worker begins no import, so it never hears of one."""

    def import_progressed(self, key: AttemptKey) -> None:
        raise AssertionError(f"{key} was never imported")

    def imported(self, key: AttemptKey, first_tokens: Sequence[FirstToken]) -> None:
        raise AssertionError(f"{key} was never imported")

    def confirmed(self, key: AttemptKey, spans: list[Span], num_bytes: int) -> None:
        raise AssertionError(f"{key} was never imported")

    def lost(self, key: AttemptKey, reason: str) -> None:
        raise AssertionError(f"{key} was never imported")

    def import_ended(self, key: AttemptKey) -> None:
        raise AssertionError(f"{key} was never imported")
