"""Put a decode worker together."""

import time
from collections.abc import Callable

from paceline.decode_worker.core import DecodeCore
from paceline.decode_worker.intake import Intake
from paceline.decode_worker.scheduler import DecodeScheduler
from paceline.decode_worker.settings import DecodeSettings
from paceline.request import AttemptKey
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
    settings: DecodeSettings,
    on_failure: Callable[[BaseException], None] = lambda error: None,
) -> WorkerProcess:
    """Make a decode worker that has not been started; `on_failure` hears of its engine's end."""

    def build_core(parts: WorkerParts) -> WiredCore:
        scheduler = DecodeScheduler(
            parts.allocator,
            parts.prefix_cache,
            block_tokens=spec.kv.block_tokens,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            local_prefill_tokens=settings.max_local_prefill_tokens,
            watermark_blocks=settings.watermark_blocks,
            promise_ttl_s=settings.promise_ttl_s,
            prefill_age_bound_s=settings.prefill_age_bound_s,
            eos_token_ids=parts.engine.config.eos_token_ids,
            max_model_len=parts.engine.max_model_len,
        )
        core = DecodeCore(
            scheduler,
            parts.sessions,
            parts.failpoints,
            worker_id=spec.worker_id,
            block_tokens=spec.kv.block_tokens,
            transport=parts.transport.name,
            unix_offset_s=time.time() - time.monotonic(),
        )

        def connect(owner: KvOwner, reader: KvReader) -> None:
            core.importer = reader

        return WiredCore(core, connect, Intake(core, parts.mailbox), _no_reader_lost, _no_release)

    local_prefill = settings.max_local_prefill_tokens
    kind = KindOfWorker(True, 2**32 - 1 if local_prefill is None else local_prefill, build_core)
    return WorkerProcess(spec, settings, kind, on_failure)


def _no_reader_lost(reader: str, now: float) -> None:
    """A decode worker grants no lease (migration comes later), so nothing was this reader's."""


def _no_release(reader: str, key: AttemptKey, now: float) -> None:
    """See `_no_reader_lost`."""
