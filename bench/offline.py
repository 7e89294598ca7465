"""A colocated decode worker in this process, without router, Ray or gRPC: scheduler, step loop and
runner as in a worker, requests in at their times and tokens out.
"""

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from paceline.bench.load import PlannedRequest
from paceline.bench.record import RequestRecord
from paceline.decode_worker.core import DecodeCore
from paceline.decode_worker.scheduler import DecodeScheduler
from paceline.decode_worker.settings import DecodeSettings
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.load import LoadedEngine
from paceline.engine.prefix_cache import PrefixCache
from paceline.engine.warm_up import warm_up
from paceline.failpoints import Failpoints
from paceline.request import AttemptKey, FailureReason, Span, Work, num_blocks_promised
from paceline.sampling_params import SamplingParams
from paceline.worker.mailbox import Mailbox
from paceline.worker.step_loop import StepLoop
from paceline.worker.step_output import StepOutput

SESSION = 1
IDLE_ROUND_S = 0.25
STOP_TIMEOUT_S = 10.0


@dataclass(eq=False, slots=True)
class Generation:
    """One prompt and what became of it."""

    prompt: npt.NDArray[np.int32]
    sampling: SamplingParams
    record: RequestRecord
    token_ids: list[int] = field(default_factory=list)
    num_attempts: int = 0


class OfflineEngine:
    """Generates for many requests together. Implements `RouterPort` for the one router there is."""

    def __init__(self, engine: LoadedEngine, settings: DecodeSettings) -> None:
        """Take a loaded engine, warmed up here; `close` closes its runner."""
        self._engine = engine
        self._block_tokens = engine.layout.block_tokens
        allocator = BlockAllocator(engine.num_blocks)
        scheduler = DecodeScheduler(
            allocator,
            PrefixCache(allocator, self._block_tokens, bytes(32)),
            block_tokens=self._block_tokens,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            local_prefill_tokens=None,
            watermark_blocks=settings.watermark_blocks,
            promise_ttl_s=settings.promise_ttl_s,
            prefill_age_bound_s=settings.prefill_age_bound_s,
            eos_token_ids=engine.config.eos_token_ids,
            max_model_len=engine.max_model_len,
        )
        self._core = DecodeCore(
            scheduler,
            self,
            Failpoints(),
            worker_id="offline",
            block_tokens=self._block_tokens,
            transport="",
            unix_offset_s=time.time() - time.monotonic(),
        )
        self._mailbox = Mailbox()
        self._waiting: deque[Generation] = deque()
        self._running: dict[int, Generation] = {}
        """By stream id."""
        self._num_requests = 0
        self._num_streams = 0
        self._num_open = 0
        self._refusal: str | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()
        warm_up(engine.runner, self._block_tokens)
        self._steps = StepLoop(
            self._core,
            engine.runner,
            self._mailbox,
            after_round=self._after_round,
            on_failure=self._fail,
            idle_round_s=IDLE_ROUND_S,
            most_stall_s=math.inf,
            overlap=engine.overlap,
        )
        self._steps.start()

    def generate(
        self, planned: Sequence[PlannedRequest], sampling: SamplingParams, timeout_s: float
    ) -> list[Generation]:
        """Generate for requests in the order of their arrival, each posted when it is due.

        `sampling` is of all of them, but for `max_tokens`. The calling thread sleeps between
        arrivals. Raises TimeoutError `timeout_s` after the last arrival, RuntimeError when a
        request cannot be served, or what ended the engine.
        """
        first, self._num_requests = self._num_requests, self._num_requests + len(planned)
        prompts = [np.array(request.prompt, dtype=np.int32) for request in planned]
        start_s = time.time()
        generations = [
            Generation(
                prompt,
                replace(sampling, max_tokens=request.max_tokens),
                RequestRecord.due(request, str(number), start_s),
            )
            for number, (request, prompt) in enumerate(zip(planned, prompts, strict=True), first)
        ]
        self._ended.clear()
        self._num_open = len(generations)  # the engine thread has nothing of ours yet
        self._post_when_due(generations)
        if not self._ended.wait(timeout_s):
            raise TimeoutError(
                f"{self._num_open} of {len(planned)} requests run {timeout_s} s after the last one "
                "was sent"
            )
        if self._error is not None:
            raise self._error
        return generations

    def _post_when_due(self, generations: Sequence[Generation]) -> None:
        """Post all, those that are due together by one call; return early if the engine fails."""
        for due_s, group in itertools.groupby(generations, lambda found: found.record.scheduled_s):
            delay_s = due_s - time.time()
            if delay_s > 0 and self._ended.wait(delay_s):
                return
            self._mailbox.post(partial(self._take, list(group)))

    def close(self) -> None:
        """Stop the engine's thread and free what the runner holds."""
        self._steps.stop(STOP_TIMEOUT_S)
        self._engine.runner.close()

    # On the engine thread.

    def _take(self, generations: Sequence[Generation], now: float) -> None:
        self._waiting.extend(generations)
        self._dispatch(now)

    def _after_round(self) -> None:
        if self._waiting and self._dispatch(time.monotonic()):
            self._mailbox.wake()

    def _dispatch(self, now: float) -> int:
        """Dispatch what there is credit for, as routers do; say how many requests that were."""
        num_dispatched = 0
        while self._waiting and self._has_credit(self._waiting[0]):
            generation = self._waiting.popleft()
            self._num_streams += 1
            self._running[self._num_streams] = generation
            generation.num_attempts += 1
            work = Work(
                key=AttemptKey(generation.record.request_id, generation.num_attempts),
                choices=(0,),
                stream_ids=(self._num_streams,),
                prompt=generation.prompt,
                output=np.array(generation.token_ids, dtype=np.int32),
                sampling=generation.sampling,
            )
            self._refusal = None
            self._core.dispatch(SESSION, work, None, now)
            if self._refusal is not None:
                self._fail(RuntimeError(self._refusal))
                break
            num_dispatched += 1
        return num_dispatched

    def _has_credit(self, generation: Generation) -> bool:
        if self._core.is_idle:
            return True  # if it does not fit now it never does, and the refusal says why
        load = self._core.load()
        num_tokens = len(generation.prompt) + len(generation.token_ids)
        needed = num_blocks_promised(num_tokens, 1, self._block_tokens)
        return load.credit_sequences >= 1 and load.credit_blocks >= needed

    def _fail(self, error: BaseException) -> None:
        self._waiting.clear()
        self._error = error
        self._ended.set()

    # RouterPort.

    def send_admission(
        self, session: int, key: AttemptKey, *, admitted: bool, message: str, cached_tokens: int
    ) -> None:
        if not admitted:
            self._refusal = message

    def send_output(self, session: int, output: StepOutput) -> None:
        now = time.time()
        for stream_id, token in zip(
            output.stream_ids.tolist(), output.token_ids.tolist(), strict=True
        ):
            generation = self._running[stream_id]
            generation.token_ids.append(token)
            generation.record.token_times_s.append(now)
        for stream_id in output.finished_stream_ids.tolist():
            self._running.pop(stream_id).record.ended_s = now
            self._num_open -= 1
        if not self._num_open:
            self._ended.set()

    def send_failure(
        self, session: int, stream_ids: tuple[int, ...], reason: FailureReason, message: str
    ) -> None:
        if reason is not FailureReason.PREEMPTED:
            self._fail(RuntimeError(f"{reason.name}: {message}"))
            return
        for stream_id in stream_ids:
            generation = self._running.pop(stream_id)
            generation.record.resumed += 1
            self._waiting.appendleft(generation)

    def send_phase(
        self, session: int, key: AttemptKey, spans: list[Span], kv_bytes: int, transport: str
    ) -> None:
        """Phases are not reported: a client's times are what is compared."""
