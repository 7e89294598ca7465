"""Whatever the interleaving: the right tokens, sums that add up, and nothing left at the end."""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prefill_simulation import EOS, PrefillSimulation, make_work

from paceline.prefill_worker.outcomes import Accepted
from paceline.request import AttemptKey
from paceline.sampling_params import SamplingParams

# Prompts are beginnings of few texts, so that they share prefixes of every length.
TEXTS = [[(text * 31 + i * i) % 97 for i in range(400)] for text in range(3)]

sampling_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (1,), (1, EOS)]),
    logprobs=st.sampled_from([None, 0, 3]),
)
choice_numbers = st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True).map(tuple)


class PrefillMachine(RuleBasedStateMachine):
    @initialize(
        chunk=st.integers(16, 512),
        num_blocks=st.integers(4, 80),
        max_num_seqs=st.integers(1, 8),
        age_bound_s=st.floats(0, 20),
        depth=st.integers(0, 1),
        runs_late=st.booleans(),
    )
    def start(
        self,
        chunk: int,
        num_blocks: int,
        max_num_seqs: int,
        age_bound_s: float,
        depth: int,
        runs_late: bool,
    ) -> None:
        self.simulation = PrefillSimulation(
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=chunk,
            age_bound_s=age_bound_s,
            max_model_len=380,
            vocab_size=12,  # few enough that first tokens often stop
            depth=depth,
            runs_late=runs_late,
        )
        self.num_requests = 0
        self.computing: set[AttemptKey] = set()
        self.cancelled_choices: dict[AttemptKey, set[int]] = {}
        self.complete: list[AttemptKey] = []
        self.pinned: list[AttemptKey] = []

    @rule(
        text=st.integers(0, len(TEXTS) - 1),
        num_tokens=st.integers(1, 400),
        num_output=st.sampled_from([0, 0, 1, 16, 40]),
        choices=choice_numbers,
        sampling=sampling_params,
        tenant=st.sampled_from(["", "", "other"]),
    )
    def arrive(
        self,
        text: int,
        num_tokens: int,
        num_output: int,
        choices: tuple[int, ...],
        sampling: SamplingParams,
        tenant: str,
    ) -> None:
        self.num_requests += 1
        prompt = TEXTS[text][:num_tokens]
        if num_output:
            choices = choices[:1]
            sampling = replace(sampling, max_tokens=num_output + (sampling.max_tokens or 1))
        output = self.simulation.runner.reference_output(prompt, sampling, choices[0], num_output)
        work = make_work(
            f"request-{self.num_requests}",
            prompt,
            attempt=1 + (num_output > 0),
            output=output,
            choices=choices,
            sampling=sampling,
            tenant=tenant,
        )
        load = self.simulation.scheduler.load()
        if isinstance(self.simulation.add(work), Accepted):
            self.computing.add(work.key)
            self.cancelled_choices[work.key] = set()
        else:
            assert self.simulation.scheduler.load() == load

    @rule()
    def step(self) -> None:
        step = self.simulation.step()
        if step is None:
            return
        for done in step.completed:
            self.computing.remove(done.key)
            self.complete.append(done.key)
            work = self.simulation.works[done.key]
            expected = set(work.choices) - self.cancelled_choices[done.key]
            assert {sample.choice for sample in done.first_samples} == expected
        for key, _ in step.progressed:
            assert key in self.computing

    @precondition(lambda self: self.computing)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.computing)))
        choices = data.draw(st.one_of(st.just(()), choice_numbers))
        cancelled = self.cancelled_choices[key]
        all_choices = set(self.simulation.works[key].choices)
        cancelled.update(choices or all_choices)
        is_over = self.simulation.scheduler.cancel(key, choices)
        assert is_over == (cancelled >= all_choices)
        if is_over:
            self.computing.remove(key)

    @precondition(lambda self: self.complete)
    @rule(data=st.data(), pins=st.booleans())
    def release(self, data: st.DataObject, pins: bool) -> None:
        key = data.draw(st.sampled_from(self.complete))
        self.complete.remove(key)
        if pins:
            self.simulation.allocator.pin(self.simulation.blocks[key])
            self.pinned.append(key)
        self.simulation.scheduler.release(key)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.pinned))
        self.pinned.remove(key)
        self.simulation.allocator.unpin(self.simulation.blocks[key])

    @invariant()
    def everything_adds_up(self) -> None:
        simulation = self.simulation
        simulation.scheduler.check_integrity()
        assert simulation.num_in_flight <= 2
        for key in [*self.complete, *self.pinned]:
            simulation.check_kv(key, simulation.works[key].num_tokens)

    def teardown(self) -> None:
        if not hasattr(self, "simulation"):
            return
        deadline = self.simulation.now + 1000
        while self.simulation.scheduler.has_work:
            self.step()
            assert self.simulation.now < deadline, "the scheduler does not come to an end"
        assert not self.computing
        for key in self.complete:
            self.simulation.scheduler.release(key)
        for key in self.pinned:
            self.simulation.allocator.unpin(self.simulation.blocks[key])
        self.simulation.check_nothing_left()


PrefillMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPrefillMachine = PrefillMachine.TestCase
