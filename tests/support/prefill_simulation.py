"""A prefill scheduler with a simulated runner, stepped by hand."""

from collections import deque
from collections.abc import Sequence

import numpy as np
from simulated_runner import SimulatedHandle, SimulatedRunner

from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.prefix_cache import PrefixCache
from paceline.engine.step_plan import StepPlan
from paceline.prefill_worker.outcomes import Accepted, PrefillDone, PrefillStep, Refused
from paceline.prefill_worker.scheduler import PrefillScheduler
from paceline.request import AttemptKey, FinishReason, Work
from paceline.sampling_params import SamplingParams

BLOCK_TOKENS = 16
EOS = 5


def make_work(
    request_id: str,
    prompt: Sequence[int],
    *,
    attempt: int = 1,
    output: Sequence[int] = (),
    choices: tuple[int, ...] = (0,),
    sampling: SamplingParams | None = None,
    tenant: str = "",
) -> Work:
    return Work(
        key=AttemptKey(request_id, attempt),
        choices=choices,
        stream_ids=tuple(100 + choice for choice in choices),
        prompt=np.array(prompt, dtype=np.int32),
        output=np.array(output, dtype=np.int32),
        sampling=sampling or SamplingParams(max_tokens=20, temperature=0.0, seed=1),
        tenant=tenant,
    )


class PrefillSimulation:
    """Launches plans and applies results; checks every answer against the reference."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        age_bound_s: float = 1000.0,
        max_model_len: int = 4096,
        vocab_size: int = 1000,
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
        self.scheduler: PrefillScheduler[str] = PrefillScheduler(
            self.allocator,
            self.prefix_cache,
            block_tokens=BLOCK_TOKENS,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            age_bound_s=age_bound_s,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
        )
        self.now = 0.0
        self.works: dict[AttemptKey, Work] = {}
        self.blocks: dict[AttemptKey, tuple[int, ...]] = {}
        self.plans: list[StepPlan] = []
        self.done: dict[AttemptKey, PrefillDone[str]] = {}
        self._handles: deque[SimulatedHandle] = deque()

    def add(self, work: Work, session: str = "router") -> Accepted | Refused:
        answer = self.scheduler.add(work, session, self.now)
        if isinstance(answer, Accepted):
            self.works[work.key] = work
            self.blocks[work.key] = answer.block_ids
            self.check_kv(work.key, answer.cached_tokens)
        return answer

    def accept(self, work: Work, session: str = "router") -> Accepted:
        answer = self.add(work, session)
        assert isinstance(answer, Accepted), answer
        return answer

    def plan(self) -> bool:
        """Plan and launch a step; say whether there was one."""
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.plans.append(plan)
            self._handles.append(self.runner.launch(plan))
        self.scheduler.check_integrity()
        return plan is not None

    def apply(self) -> PrefillStep[str]:
        """Apply the oldest step in flight, and check what it says."""
        result = self.runner.finish(self._handles.popleft(), self.allocator)
        step = self.scheduler.apply(result, self.now)
        self.scheduler.check_integrity()
        self.prefix_cache.check_integrity(self.runner.checksum)
        for key, num_tokens in step.progressed:
            self.check_kv(key, num_tokens)
        for done in step.completed:
            self.check_kv(done.key, done.num_tokens)
            self._check_samples(done)
            self.done[done.key] = done
        return step

    def step(self) -> PrefillStep[str] | None:
        """Advance by one step, so that `depth` steps stay in flight; None when idle."""
        self.now += 1.0
        launched = self.plan()
        if len(self._handles) > self.depth or (self._handles and not launched):
            return self.apply()
        return None

    @property
    def num_in_flight(self) -> int:
        return len(self._handles)

    def run_to_the_end(self) -> None:
        deadline = self.now + 10_000
        while self.scheduler.has_work:
            self.step()
            assert self.now < deadline, "the scheduler does not come to an end"

    def check_kv(self, key: AttemptKey, num_tokens: int) -> None:
        """Compare the prompt's blocks with what its tokens must give."""
        work = self.works[key]
        expected = self.runner.model.kv_of([*work.prompt, *work.output][:num_tokens])
        found = self.runner.pool[list(self.blocks[key])].reshape(-1)[:num_tokens]
        assert found.tolist() == expected

    def check_nothing_left(self) -> None:
        load = self.scheduler.load()
        assert not self.scheduler.has_work
        assert self.allocator.num_available == self.allocator.num_blocks
        assert load == (self.allocator.num_blocks, self.runner.max_num_slots, 0, 0)
        self.scheduler.check_integrity()

    def _check_samples(self, done: PrefillDone[str]) -> None:
        work = self.works[done.key]
        assert done.num_tokens == work.num_tokens
        for sample in done.first_samples:
            reference = self.runner.reference_output(
                work.prompt, work.sampling, sample.choice, work.next_index + 1
            )
            assert sample.index == work.next_index
            assert [*work.output, sample.token_id] == reference
            assert sample.stream_id == work.stream_ids[work.choices.index(sample.choice)]
            assert (sample.logprobs is None) == (work.sampling.logprobs is None)
            assert sample.finish_reason == self._reason(work, sample.token_id)

    def _reason(self, work: Work, token_id: int) -> FinishReason | None:
        sampling = work.sampling
        if token_id in sampling.stop_token_ids or (token_id == EOS and not sampling.ignore_eos):
            return FinishReason.STOP
        num_output = work.next_index + 1
        is_full = len(work.prompt) + num_output >= self.max_model_len
        return FinishReason.LENGTH if is_full or num_output == sampling.max_tokens else None
