"""Which prompts a prefill worker takes, and which of their tokens each step computes."""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic

import numpy as np

from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.chunking import Chunk, ChunkTime, PromptQueue
from paceline.engine.prefix_cache import PrefixCache
from paceline.engine.step_plan import SlotStart, StepPlan, StepResult
from paceline.engine.step_plan_builder import StepPlanBuilder
from paceline.engine.stop_conditions import StopConditions
from paceline.errors import IntegrityError
from paceline.prefill_worker.outcomes import (
    Accepted,
    FirstSample,
    PrefillDone,
    PrefillFailed,
    PrefillLoad,
    PrefillStep,
    PromptProgress,
    Refused,
)
from paceline.prefill_worker.prompt import Prompt, PromptState, SessionT
from paceline.request import AttemptKey, Work, num_blocks_for


@dataclass(frozen=True, slots=True, eq=False)
class _PlannedChunk(Generic[SessionT]):
    prompt: Prompt[SessionT]
    num_tokens: int
    first_sample: int | None
    """Number of the first choice's sample in the step's result; None: not the last chunk."""
    sampled: tuple[tuple[int, int], ...]
    """(choice, stream id) of each sample, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class _StepInFlight(Generic[SessionT]):
    step_id: int
    planned_s: float
    chunks: tuple[_PlannedChunk[SessionT], ...]


class PrefillScheduler(Generic[SessionT]):
    """Computes several prompts in chunks. Called by the engine thread alone; times are arguments.

    A prompt is taken with all its blocks and slots in hand or refused, so nothing here ever waits
    for memory. Up to two steps may be planned and not yet applied.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        prefix_cache: PrefixCache,
        *,
        block_tokens: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        age_bound_s: float,
        max_model_len: int,
        eos_token_ids: Collection[int],
    ) -> None:
        self._allocator = allocator
        self._prefix_cache = prefix_cache
        self._block_tokens = block_tokens
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._prompts: dict[AttemptKey, Prompt[SessionT]] = {}
        self._waiting: PromptQueue[Prompt[SessionT]] = PromptQueue(age_bound_s)
        """Those with tokens that no step computes yet."""
        self._num_computing = 0
        """Choices of the prompts that are COMPUTING."""
        self._num_pending_tokens = 0
        """Tokens of these prompts that are not final yet."""
        self._cancelled: set[Prompt[SessionT]] = set()
        """Those that a step in flight still uses; their keys are forgotten."""
        self._free_slots = list(reversed(range(max_num_seqs)))
        self._in_flight: deque[_StepInFlight[SessionT]] = deque()
        self._next_step_id = 0

    @property
    def has_work(self) -> bool:
        """Whether a step is in flight or could be planned."""
        return bool(self._in_flight or len(self._waiting))

    def add(self, work: Work, session: SessionT, now: float) -> Accepted | Refused:
        """Take the work with everything it needs, or refuse it and keep nothing."""
        message = self._reason_to_refuse(work)
        if message is not None:
            return Refused(message)
        context = np.concatenate((work.prompt, work.output)).astype(np.int32, copy=False)
        match = self._prefix_cache.match(context, work.tenant)
        num_new_blocks = num_blocks_for(work.num_tokens, self._block_tokens) - len(match.block_ids)
        num_available = self._allocator.num_available
        if num_new_blocks > num_available:
            self._allocator.release(match.block_ids)
            return Refused(
                f"{work.num_tokens} tokens need {num_new_blocks} KV blocks beside "
                f"{len(match.block_ids)} cached ones, {num_available} of "
                f"{self._allocator.num_blocks} can be freed now. If this happens often, raise "
                "prefill.num_kv_blocks or prefill.replicas"
            )
        block_ids = [*match.block_ids, *self._allocator.allocate(num_new_blocks)]
        cached_tokens = len(match.block_ids) * self._block_tokens
        prompt = Prompt(
            num_tokens=work.num_tokens,
            num_planned=cached_tokens,
            arrived_s=now,
            work=work,
            session=session,
            context=context,
            block_ids=block_ids,
            slots=[self._free_slots.pop() for _ in work.choices],
            stop_conditions=StopConditions.of(
                work.sampling,
                num_prompt_tokens=len(work.prompt),
                max_model_len=self._max_model_len,
                eos_token_ids=self._eos_token_ids,
            ),
            num_final=cached_tokens,
            chain=match.chain,
        )
        self._prompts[work.key] = prompt
        self._waiting.add(prompt)
        self._num_computing += len(work.choices)
        self._num_pending_tokens += prompt.num_tokens - prompt.num_final
        return Accepted(cached_tokens, tuple(block_ids))

    def cancel(self, key: AttemptKey, choices: Collection[int] = ()) -> bool:
        """Give up some choices of a prompt, or all when none is named; say whether none is left.

        Unknown and complete prompts are left alone: what is complete waits for its release.
        Blocks and slots that a step in flight uses are freed when that step has been applied.
        """
        prompt = self._prompts.get(key)
        if prompt is None or prompt.state is not PromptState.COMPUTING:
            return False
        prompt.cancelled_choices.update(choices or prompt.work.choices)
        if not prompt.cancelled_choices.issuperset(prompt.work.choices):
            return False
        self._end_computing(prompt, PromptState.CANCELLED)
        self._waiting.discard(prompt)
        del self._prompts[key]
        if prompt.num_steps_in_flight:
            self._cancelled.add(prompt)
        else:
            self._free(prompt)
        return True

    def release(self, key: AttemptKey) -> None:
        """Drop the references to the blocks of a complete prompt, once."""
        prompt = self._prompts.get(key)
        if prompt is None or prompt.state is not PromptState.COMPLETE:
            raise IntegrityError(f"released {key}, which is not a complete prompt of this worker")
        del self._prompts[key]
        self._allocator.release(prompt.block_ids)

    def plan(self, now: float) -> StepPlan | None:
        """Plan the next step; None when every prompt is planned to its end."""
        if len(self._in_flight) > 1:
            raise IntegrityError(f"planned a step while {len(self._in_flight)} are not applied")
        chunks = self._waiting.plan(self._max_num_batched_tokens, now)
        if not chunks:
            return None
        builder = StepPlanBuilder(self._next_step_id)
        self._next_step_id += 1
        planned = tuple(self._plan_chunk(builder, chunk) for chunk in chunks)
        self._in_flight.append(_StepInFlight(builder.step_id, now, planned))
        return builder.build()

    def apply(self, result: StepResult, now: float) -> PrefillStep[SessionT]:
        """Take over what the oldest step in flight computed."""
        if not self._in_flight or self._in_flight[0].step_id != result.step_id:
            expected = [step.step_id for step in self._in_flight]
            raise IntegrityError(f"result of step {result.step_id} while {expected} are in flight")
        step = self._in_flight.popleft()
        progressed: list[PromptProgress] = []
        completed: list[PrefillDone[SessionT]] = []
        failed: list[PrefillFailed[SessionT]] = []
        for chunk in step.chunks:
            prompt = chunk.prompt
            prompt.num_steps_in_flight -= 1
            prompt.chunk_times.append(ChunkTime(chunk.num_tokens, step.planned_s, now))
            self._advance(prompt, chunk.num_tokens)
            message = _failure(chunk, result)
            if message is not None:
                self._prefix_cache.forget(prompt.chain)
            if prompt.state is PromptState.CANCELLED:
                if not prompt.num_steps_in_flight:
                    self._cancelled.remove(prompt)
                    self._free(prompt)
                continue
            if message is not None:
                failed.append(PrefillFailed(prompt.work.key, prompt.session, message))
                self.cancel(prompt.work.key)
            elif chunk.first_sample is None:
                progressed.append(PromptProgress(prompt.work.key, prompt.num_final))
            else:
                completed.append(self._complete(chunk, chunk.first_sample, result))
        return PrefillStep(tuple(progressed), tuple(completed), tuple(failed))

    def load(self) -> PrefillLoad:
        return PrefillLoad(
            credit_blocks=self._allocator.num_available,
            credit_sequences=len(self._free_slots),
            num_running=self._num_computing,
            num_pending_tokens=self._num_pending_tokens,
        )

    def check_integrity(self) -> None:
        """Add everything up; raise IntegrityError with the numbers that disagree."""
        self._allocator.check_integrity()
        prompts = [*self._prompts.values(), *self._cancelled]
        slots = [*self._free_slots, *(slot for prompt in prompts for slot in prompt.slots)]
        if sorted(slots) != list(range(self._max_num_seqs)):
            raise IntegrityError(f"slots are not 0 to {self._max_num_seqs - 1} once: {slots}")
        self._check_counts()
        num_chunks = sum(len(step.chunks) for step in self._in_flight)
        num_awaited = sum(prompt.num_steps_in_flight for prompt in prompts)
        if num_chunks != num_awaited:
            raise IntegrityError(f"{num_chunks} chunks in flight, prompts await {num_awaited}")
        num_holders: dict[int, int] = {}
        for prompt in prompts:
            prompt.check_integrity(self._block_tokens)
            for block_id in prompt.block_ids:
                num_holders[block_id] = num_holders.get(block_id, 0) + 1
        for block_id, count in num_holders.items():
            if self._allocator.num_references(block_id) < count:
                raise IntegrityError(
                    f"block {block_id} is used by {count} prompts and has "
                    f"{self._allocator.num_references(block_id)} references"
                )

    def _check_counts(self) -> None:
        computing = [p for p in self._prompts.values() if p.state is PromptState.COMPUTING]
        self._waiting.check_integrity([p for p in computing if p.num_unplanned])
        num_choices = sum(len(p.work.choices) for p in computing)
        num_tokens = sum(p.num_tokens - p.num_final for p in computing)
        if (num_choices, num_tokens) != (self._num_computing, self._num_pending_tokens):
            raise IntegrityError(
                f"{num_choices} choices are computed and {num_tokens} tokens of them are not "
                f"final, the counters say {self._num_computing} and {self._num_pending_tokens}"
            )
        for prompt in self._cancelled:
            if prompt.state is not PromptState.CANCELLED or not prompt.num_steps_in_flight:
                raise IntegrityError(
                    f"prompt {prompt.work.key} is {prompt.state.value} with "
                    f"{prompt.num_steps_in_flight} steps in flight, and waits to be freed"
                )

    def _reason_to_refuse(self, work: Work) -> str | None:
        if work.key in self._prompts:
            return f"attempt {work.key.attempt} of {work.key.request_id} runs here already"
        if not len(work.prompt):
            return "the prompt is empty"
        if len(work.output) and len(work.choices) != 1:
            return f"output so far belongs to one choice, the work has {len(work.choices)}"
        max_tokens = work.sampling.max_tokens
        if max_tokens is not None and work.next_index >= max_tokens:
            return f"{work.next_index} output tokens are there already, max_tokens is {max_tokens}"
        if work.num_tokens >= self._max_model_len:
            return (
                f"{work.num_tokens} tokens leave no room for another one: the model's length, "
                f"model.max_model_len, is {self._max_model_len}"
            )
        num_blocks = num_blocks_for(work.num_tokens, self._block_tokens)
        if num_blocks > self._allocator.num_blocks:
            return (
                f"{work.num_tokens} tokens need {num_blocks} KV blocks, the pool has "
                f"{self._allocator.num_blocks}. Raise prefill.num_kv_blocks"
            )
        if len(work.choices) > len(self._free_slots):
            return (
                f"{len(work.choices)} choices are as many sequences, {len(self._free_slots)} of "
                f"{self._max_num_seqs} are free now. If this happens often, raise "
                "prefill.max_num_seqs or prefill.replicas"
            )
        return None

    def _plan_chunk(
        self, builder: StepPlanBuilder, chunk: Chunk[Prompt[SessionT]]
    ) -> _PlannedChunk[SessionT]:
        prompt, start, num_tokens = chunk
        work = prompt.work
        if not prompt.is_started:
            prompt.is_started = True
            for slot, choice in zip(prompt.slots, work.choices, strict=True):
                builder.start_slot(SlotStart(slot, work.sampling, choice, work.prompt, work.output))
            builder.set_blocks(prompt.slots[0], 0, prompt.block_ids)
        end = start + num_tokens
        last = builder.add_row(prompt.slots[0], start, prompt.context[start:end])
        prompt.num_steps_in_flight += 1
        if end < prompt.num_tokens:
            return _PlannedChunk(prompt, num_tokens, None, ())
        first_sample = builder.num_samples
        sampled = []
        for slot, choice, stream_id in zip(
            prompt.slots, work.choices, work.stream_ids, strict=True
        ):
            if choice not in prompt.cancelled_choices:
                builder.add_sample(last, slot, work.next_index)
                sampled.append((choice, stream_id))
        return _PlannedChunk(prompt, num_tokens, first_sample, tuple(sampled))

    def _advance(self, prompt: Prompt[SessionT], num_tokens: int) -> None:
        """Count tokens as final and put the blocks that they fill into the prefix cache."""
        size = self._block_tokens
        first_block = prompt.num_final // size
        prompt.num_final += num_tokens
        if prompt.state is PromptState.COMPUTING:
            self._num_pending_tokens -= num_tokens
        for number in range(first_block, prompt.num_final // size):
            tokens = prompt.context[number * size : (number + 1) * size]
            prompt.chain = self._prefix_cache.insert(prompt.chain, tokens, prompt.block_ids[number])

    def _complete(
        self, chunk: _PlannedChunk[SessionT], first_sample: int, result: StepResult
    ) -> PrefillDone[SessionT]:
        prompt = chunk.prompt
        index = prompt.work.next_index
        samples = []
        for number, (choice, stream_id) in enumerate(chunk.sampled, start=first_sample):
            if choice in prompt.cancelled_choices:
                continue
            token_id = int(result.token_ids[number])
            reason = prompt.stop_conditions.reason_to_finish(token_id, index)
            logprobs = result.logprobs.get(number)
            samples.append(FirstSample(choice, stream_id, index, token_id, reason, logprobs))
        self._end_computing(prompt, PromptState.COMPLETE)
        self._return_slots(prompt)
        return PrefillDone(
            key=prompt.work.key,
            session=prompt.session,
            num_tokens=prompt.num_tokens,
            first_samples=tuple(samples),
            chunk_times=tuple(prompt.chunk_times),
        )

    def _end_computing(self, prompt: Prompt[SessionT], state: PromptState) -> None:
        prompt.move_to(state)
        self._num_computing -= len(prompt.work.choices)
        self._num_pending_tokens -= prompt.num_tokens - prompt.num_final

    def _free(self, prompt: Prompt[SessionT]) -> None:
        self._return_slots(prompt)
        self._allocator.release(prompt.block_ids)

    def _return_slots(self, prompt: Prompt[SessionT]) -> None:
        self._free_slots.extend(prompt.slots)
        prompt.slots.clear()


def _failure(chunk: _PlannedChunk[SessionT], result: StepResult) -> str | None:
    """Say why a prompt has no first token; its choices share their logits and parameters."""
    if chunk.first_sample is None or not result.failures:
        return None
    numbers = range(chunk.first_sample, chunk.first_sample + len(chunk.sampled))
    return next((result.failures[n] for n in numbers if n in result.failures), None)
