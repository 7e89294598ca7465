"""A decode scheduler with a simulated runner, routers and prefill workers, stepped by hand.

Reads write straight into the simulated pool, garbage included when they have been given up. Every
token that leaves the scheduler is compared with the reference at once.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from simulated_runner import GARBAGE, SimulatedHandle, SimulatedRunner

from paceline.decode_worker.attempts import Attempt, AttemptState
from paceline.decode_worker.outcomes import Admitted, DecodeStep, Refused
from paceline.decode_worker.scheduler import DecodeScheduler
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.prefix_cache import ChainPosition, PrefixCache
from paceline.engine.stop_conditions import StopConditions
from paceline.kv_transfer.lease import FirstToken
from paceline.request import AttemptKey, FailureReason, FinishReason, Work
from paceline.sampling_params import SamplingParams

BLOCK_TOKENS = 4
EOS = 5
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, seed=1)


def make_attempt(state: AttemptState = AttemptState.IMPORTING) -> Attempt:
    prompt = np.arange(5, dtype=np.int32)
    work = Work(
        AttemptKey("r", 1), (0,), (1,), prompt, np.empty(0, np.int32), SamplingParams(max_tokens=4)
    )
    return Attempt(
        num_tokens=5,
        num_planned=0,
        arrived_s=0.0,
        work=work,
        session=1,
        context=prompt,
        context_block_ids=(0, 1),
        stop_conditions=StopConditions(frozenset(), 4),
        chain=ChainPosition(b"", None, None),
        num_cached_blocks=0,
        state=state,
        renewed_s=0.0,
    )


@dataclass
class Dispatch:
    """One attempt as its router, and the reads for it, see it."""

    work: Work
    session: int
    has_source: bool
    block_ids: tuple[int, ...]
    num_cached_tokens: int
    is_confirmed: bool
    """True from the start where there is nothing to confirm."""
    is_importing: bool
    """Reads may write its blocks."""
    outputs: dict[int, list[int]]
    """By choice: the whole output, as far as reported."""
    finished: dict[int, FinishReason] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    """Choices that were cancelled or failed."""
    failures: list[FailureReason] = field(default_factory=list)
    is_abandoned: bool = False

    @property
    def open_choices(self) -> list[int]:
        return [c for c in self.work.choices if c not in self.finished and c not in self.gone]


class DecodeSimulation:
    def __init__(
        self,
        *,
        num_blocks: int = 64,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 24,
        local_prefill_tokens: int | None = None,
        watermark_blocks: int = 0,
        promise_ttl_s: float = 100.0,
        max_model_len: int = 128,
        vocab_size: int = 50,
        depth: int = 0,
        runs_late: bool = True,
    ) -> None:
        """runs_late: a step runs when its result is asked for; only with a depth it matters."""
        self.depth = depth
        self.max_model_len = max_model_len
        self.allocator = BlockAllocator(num_blocks)
        self.prefix_cache = PrefixCache(self.allocator, BLOCK_TOKENS, b"root key of tests")
        self.runner = SimulatedRunner(
            max_num_seqs, vocab_size, num_blocks, BLOCK_TOKENS, (EOS,), runs_late=runs_late
        )
        self.scheduler = DecodeScheduler(
            self.allocator,
            self.prefix_cache,
            block_tokens=BLOCK_TOKENS,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            local_prefill_tokens=local_prefill_tokens,
            watermark_blocks=watermark_blocks,
            promise_ttl_s=promise_ttl_s,
            prefill_age_bound_s=10.0,
            eos_token_ids=(EOS,),
            max_model_len=max_model_len,
        )
        self.now = 0.0
        self.dispatches: dict[AttemptKey, Dispatch] = {}
        self._by_stream: dict[tuple[int, int], tuple[AttemptKey, int]] = {}
        self._num_streams = 0
        self._in_flight: deque[SimulatedHandle] = deque()
        self.num_steps = 0
        self.most_rows = 0

    def make_work(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        attempt: int = 1,
        output: Sequence[int] = (),
        choices: Sequence[int] = (0,),
        sampling: SamplingParams = GREEDY,
    ) -> Work:
        first = self._num_streams
        self._num_streams += len(choices)
        return Work(
            key=AttemptKey(request_id, attempt),
            choices=tuple(choices),
            stream_ids=tuple(range(first, self._num_streams)),
            prompt=np.array(prompt, dtype=np.int32),
            output=np.array(output, dtype=np.int32),
            sampling=sampling,
        )

    def admit(self, work: Work, *, has_source: bool = True, session: int = 1) -> Admitted | Refused:
        answer = self.scheduler.admit(work, session, has_source=has_source, now=self.now)
        if isinstance(answer, Refused):
            return answer
        for choice, stream_id in zip(work.choices, work.stream_ids, strict=True):
            self._by_stream[session, stream_id] = (work.key, choice)
        self._end_older(work)
        self.dispatches[work.key] = Dispatch(
            work=work,
            session=session,
            has_source=has_source,
            block_ids=answer.block_ids,
            num_cached_tokens=answer.num_cached_tokens,
            is_confirmed=not has_source,
            is_importing=has_source,
            outputs={choice: work.output.tolist() for choice in work.choices},
        )
        if has_source:
            self.read(work.key, garbage=True)
        return answer

    def run(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        has_source: bool = True,
        choices: Sequence[int] = (0,),
        sampling: SamplingParams = GREEDY,
    ) -> Dispatch:
        """Admit new work and, with a source, import and confirm it at once."""
        work = self.make_work(request_id, prompt, choices=choices, sampling=sampling)
        answer = self.admit(work, has_source=has_source)
        assert isinstance(answer, Admitted), answer
        if has_source:
            self.import_all(work.key)
            self.confirm(work.key)
        return self.dispatches[work.key]

    # What prefill workers and reads do.

    def read(self, key: AttemptKey, *, garbage: bool = False) -> None:
        """Write what the reads of an import write: the blocks after the cached ones."""
        dispatch = self.dispatches[key]
        assert dispatch.is_importing
        context = (*dispatch.work.prompt.tolist(), *dispatch.work.output.tolist())
        kv = np.array(self.runner.model.kv_of(context), dtype=np.uint64)
        if garbage:
            kv[:] = GARBAGE
        blocks = np.array(dispatch.block_ids)
        positions = np.arange(dispatch.num_cached_tokens, len(kv))
        self.runner.pool[blocks[positions // BLOCK_TOKENS], positions % BLOCK_TOKENS] = kv[
            positions
        ]

    def import_all(self, key: AttemptKey) -> None:
        """Read everything and say so, with the right first tokens."""
        dispatch = self.dispatches[key]
        if not dispatch.is_abandoned:
            self.read(key)
        dispatch.is_importing = dispatch.is_abandoned
        work = dispatch.work
        first_tokens = []
        for choice in work.choices:
            token = self.expected(work, choice)[work.next_index]
            reason = self.conditions(work).reason_to_finish(token, work.next_index)
            first_tokens.append(FirstToken(choice, token, reason))
        self.scheduler.imported(key, first_tokens, self.now)

    def confirm(self, key: AttemptKey) -> None:
        self.dispatches[key].is_confirmed = True
        self.scheduler.confirmed(key, self.now)
        self.scheduler.import_ended(key)
        self.take_output()

    def lose(self, key: AttemptKey) -> None:
        self.scheduler.lost(key, "the owner is gone", self.now)
        self.take_output()

    def end_import(self, key: AttemptKey) -> None:
        dispatch = self.dispatches[key]
        if dispatch.is_importing:
            self.read(key, garbage=True)
        dispatch.is_importing = False
        self.scheduler.import_ended(key)

    # What routers do.

    def cancel(self, key: AttemptKey, choices: Collection[int] = ()) -> None:
        self.dispatches[key].gone.update(choices or self.dispatches[key].work.choices)
        self.scheduler.cancel(key, choices, now=self.now)
        self.take_output()

    def end_session(self, session: int) -> None:
        for dispatch in self.dispatches.values():
            if dispatch.session == session:
                dispatch.gone.update(dispatch.work.choices)
        self.scheduler.end_session(session, self.now)
        self.take_output()

    # Steps.

    def step(self) -> bool:
        """Do one round of the step loop; say whether anything was computed."""
        self.now += 0.01
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self._in_flight.append(self.runner.launch(plan))
            self.num_steps += 1
            self.most_rows = max(self.most_rows, len(plan.slots))
        else:
            self.take_output()
        applied = len(self._in_flight) > (self.depth if plan is not None else 0)
        if applied:
            result = self.runner.finish(self._in_flight.popleft(), self.allocator)
            self._take(self.scheduler.apply(result, self.now))
        self.scheduler.check_integrity()
        self.prefix_cache.check_integrity(self.runner.checksum)
        return applied or plan is not None

    def run_to_end(self, max_num_steps: int = 1000) -> None:
        for _ in range(max_num_steps):
            if not self.step():
                return
        raise AssertionError(f"work is left after {max_num_steps} steps")

    def take_output(self) -> None:
        self._take(self.scheduler.take_output())

    def assert_nothing_left(self) -> None:
        self.scheduler.tidy()
        self.scheduler.check_integrity()
        assert self.scheduler.is_idle
        assert self.allocator.num_available == self.allocator.num_blocks
        load = self.scheduler.load()
        assert load.num_running == load.num_pending_tokens == 0
        assert load.num_free_blocks == self.allocator.num_blocks

    # What is right.

    def conditions(self, work: Work) -> StopConditions:
        return StopConditions.of(
            work.sampling,
            num_prompt_tokens=len(work.prompt),
            max_model_len=self.max_model_len,
            eos_token_ids=(EOS,),
        )

    def expected(self, work: Work, choice: int) -> list[int]:
        """The whole output of a choice, up to its last token."""
        conditions = self.conditions(work)
        output = self.runner.reference_output(
            work.prompt, work.sampling, choice, conditions.max_output_tokens
        )
        for index, token in enumerate(output):
            if conditions.reason_to_finish(token, index) is not None:
                return output[: index + 1]
        return output

    def assert_complete(self, dispatch: Dispatch) -> None:
        """The choices that were not given up have ended with all that they should have given."""
        for choice in dispatch.work.choices:
            if choice not in dispatch.gone:
                assert dispatch.outputs[choice] == self.expected(dispatch.work, choice)
                assert choice in dispatch.finished

    def _end_older(self, work: Work) -> None:
        for dispatch in self.dispatches.values():
            if dispatch.work.key.request_id == work.key.request_id:
                dispatch.gone.update(set(dispatch.work.choices) & set(work.choices))

    def _take(self, step: DecodeStep) -> None:
        for key in step.abandoned_imports:
            dispatch = self.dispatches[key]
            assert dispatch.is_importing
            assert not dispatch.is_abandoned
            dispatch.is_abandoned = True
        for failure in step.failures:
            assert failure.message
            for stream_id in failure.stream_ids:
                key, choice = self._by_stream[failure.session, stream_id]
                dispatch = self.dispatches[key]
                assert choice in dispatch.open_choices
                dispatch.gone.add(choice)
                dispatch.failures.append(failure.reason)
        for session, output in step.outputs.items():
            columns = (output.stream_ids, output.indices, output.token_ids)
            assert all(column.dtype == np.uint32 for column in columns)
            touched = set()
            for number, (stream_id, index, token) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True)
            ):
                key, choice = self._by_stream[session, stream_id]
                dispatch = self.dispatches[key]
                assert dispatch.is_confirmed, f"{key} emitted before it was confirmed"
                assert choice in dispatch.open_choices, f"{key} emitted after its end"
                assert index == len(dispatch.outputs[choice]), f"{key} skipped or repeated"
                assert token == self.expected(dispatch.work, choice)[index]
                dispatch.outputs[choice].append(token)
                touched.add(stream_id)
                # The first token of an import comes with the lease, which has no log-probabilities.
                is_echo = dispatch.has_source and index == dispatch.work.next_index
                wants = dispatch.work.sampling.logprobs is not None and not is_echo
                assert (number in output.logprobs) == wants
            ends = zip(
                output.finished_stream_ids.tolist(), output.finish_reasons.tolist(), strict=True
            )
            for stream_id, reason in ends:
                assert stream_id in touched
                key, choice = self._by_stream[session, stream_id]
                dispatch = self.dispatches[key]
                last = len(dispatch.outputs[choice]) - 1
                conditions = self.conditions(dispatch.work)
                token = dispatch.outputs[choice][last]
                assert conditions.reason_to_finish(token, last) is FinishReason(reason)
                dispatch.finished[choice] = FinishReason(reason)
