"""Random interleavings of everything that can happen to a decode scheduler.

Whatever the order of arrivals, reads, confirmations, losses, cancellations, preemptions and steps:
each emitted token is the reference's, none is emitted before its attempt is confirmed, counts add
up after every step, a block that a read may still write belongs to nobody else, and at the end
nothing is left.
"""

import numpy as np
import pytest
from decode_simulation import DecodeSimulation, Dispatch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from paceline.decode_worker.outcomes import Admitted
from paceline.request import AttemptKey, FailureReason
from paceline.sampling_params import SamplingParams

PREFIXES = [[], [7, 8, 9, 10], [7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22, 23, 24]]


class DecodeSchedulerStates(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.simulation = DecodeSimulation()
        self.num_requests = 0
        self.next_attempt: dict[str, int] = {}

    @initialize(
        num_blocks=st.sampled_from([12, 18, 60]),
        max_num_seqs=st.sampled_from([3, 8]),
        budget=st.sampled_from([9, 30]),
        depth=st.sampled_from([0, 1]),
        runs_late=st.booleans(),
    )
    def build(
        self, num_blocks: int, max_num_seqs: int, budget: int, depth: int, runs_late: bool
    ) -> None:
        self.simulation = DecodeSimulation(
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            depth=depth,
            runs_late=runs_late,
            promise_ttl_s=1000.0,
            max_model_len=60,
            vocab_size=30,
        )

    def some(self, number: int, dispatches: list[Dispatch]) -> Dispatch:
        return dispatches[number % len(dispatches)]

    def importing(self) -> list[Dispatch]:
        return [d for d in self.simulation.dispatches.values() if d.is_importing]

    def unconfirmed(self) -> list[Dispatch]:
        found = self.simulation.dispatches.values()
        return [d for d in found if not d.is_confirmed and not d.is_importing and d.open_choices]

    def open(self) -> list[Dispatch]:
        return [d for d in self.simulation.dispatches.values() if d.open_choices]

    def failed(self) -> list[tuple[Dispatch, int]]:
        """Choices that no later attempt has taken up."""
        return [
            (dispatch, choice)
            for dispatch in self.simulation.dispatches.values()
            if dispatch.failures
            for choice in sorted(dispatch.gone)
            if dispatch.work.key.attempt + 1 == self.next_attempt[dispatch.work.key.request_id]
        ]

    @rule(
        prefix=st.sampled_from(PREFIXES),
        tail=st.lists(st.integers(0, 3), min_size=1, max_size=9),
        num_choices=st.integers(1, 4),
        max_tokens=st.sampled_from([1, 2, 5, 30, 50]),
        seed=st.one_of(st.none(), st.integers(0, 3)),
        stop=st.sampled_from([(), (), (3,), (4, 6, 8, 10, 12, 14)]),
        ignore_eos=st.booleans(),
        has_source=st.booleans(),
        session=st.integers(1, 2),
    )
    def submit(
        self,
        prefix: list[int],
        tail: list[int],
        num_choices: int,
        max_tokens: int,
        seed: int | None,
        stop: tuple[int, ...],
        ignore_eos: bool,
        has_source: bool,
        session: int,
    ) -> None:
        self.num_requests += 1
        request_id = f"r{self.num_requests}"
        self.next_attempt[request_id] = 2
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if seed is None else 1.0,
            seed=seed or 0,
            stop_token_ids=stop,
            ignore_eos=ignore_eos,
            logprobs=1 if max_tokens % 5 == 0 else None,
        )
        work = self.simulation.make_work(
            request_id, prefix + tail, choices=range(num_choices), sampling=sampling
        )
        self.simulation.admit(work, has_source=has_source, session=session)

    @precondition(lambda self: self.failed())
    @rule(number=st.integers(0, 1000), has_source=st.booleans())
    def resume(self, number: int, has_source: bool) -> None:
        """Dispatch a choice that came back, with its output, under a new attempt."""
        found = self.failed()
        dispatch, choice = found[number % len(found)]
        self.dispatch_again(dispatch, choice, has_source)

    @precondition(lambda self: self.open())
    @rule(number=st.integers(0, 1000), has_source=st.booleans())
    def dispatch_newer(self, number: int, has_source: bool) -> None:
        """The router has given up an attempt that this worker still runs."""
        dispatch = self.some(number, self.open())
        self.dispatch_again(dispatch, dispatch.open_choices[0], has_source)

    def dispatch_again(self, dispatch: Dispatch, choice: int, has_source: bool) -> None:
        old = dispatch.work
        attempt = self.next_attempt[old.key.request_id]
        self.next_attempt[old.key.request_id] += 1
        work = self.simulation.make_work(
            old.key.request_id,
            old.prompt.tolist(),
            attempt=attempt,
            output=dispatch.outputs[choice],
            choices=(choice,),
            sampling=old.sampling,
        )
        # Whether it is admitted or not, the older attempt's choice has ended.
        dispatch.gone.add(choice)
        answer = self.simulation.admit(work, has_source=has_source, session=dispatch.session)
        if not isinstance(answer, Admitted):
            self.simulation.scheduler.cancel(old.key, (choice,), now=self.simulation.now)
        self.simulation.take_output()

    @precondition(lambda self: self.importing())
    @rule(number=st.integers(0, 1000))
    def read_partly(self, number: int) -> None:
        """Reads go on, also those that have been given up."""
        dispatch = self.some(number, self.importing())
        self.simulation.read(dispatch.work.key, garbage=True)
        self.simulation.scheduler.import_progressed(dispatch.work.key, self.simulation.now)

    @precondition(lambda self: self.importing())
    @rule(number=st.integers(0, 1000), confirm=st.booleans())
    def end_reads(self, number: int, confirm: bool) -> None:
        dispatch = self.some(number, self.importing())
        key = dispatch.work.key
        if dispatch.is_abandoned:
            self.simulation.end_import(key)
            return
        self.simulation.import_all(key)
        if confirm:
            self.simulation.confirm(key)

    @precondition(lambda self: self.unconfirmed())
    @rule(number=st.integers(0, 1000), held=st.booleans())
    def judge(self, number: int, held: bool) -> None:
        dispatch = self.some(number, self.unconfirmed())
        if held:
            self.simulation.confirm(dispatch.work.key)
        else:
            self.simulation.lose(dispatch.work.key)

    @precondition(lambda self: self.importing())
    @rule(number=st.integers(0, 1000), reads_end_first=st.booleans())
    def lose_owner(self, number: int, reads_end_first: bool) -> None:
        key = self.some(number, self.importing()).work.key
        if reads_end_first:
            self.simulation.end_import(key)
        self.simulation.lose(key)

    @precondition(lambda self: self.open())
    @rule(number=st.integers(0, 1000), all_choices=st.booleans())
    def cancel(self, number: int, all_choices: bool) -> None:
        dispatch = self.some(number, self.open())
        open_choices = dispatch.open_choices
        choices = () if all_choices else (open_choices[number % len(open_choices)],)
        self.simulation.cancel(dispatch.work.key, choices)

    @rule(session=st.integers(1, 12))
    def end_session(self, session: int) -> None:
        """Mostly of a router that has no work here: others would never get far."""
        self.simulation.end_session(session)

    @precondition(lambda self: self.importing())
    @rule(idle_s=st.integers(1, 1100))
    def expire_promises(self, idle_s: int) -> None:
        self.simulation.now += idle_s
        self.simulation.scheduler.expire(self.simulation.now)
        self.simulation.take_output()

    @rule(count=st.sampled_from([1, 1, 1, 2, 5, 25]))
    def run_steps(self, count: int) -> None:
        oldest = next((d for d in self.open()), None)
        for _ in range(count):
            self.simulation.step()
        if oldest is not None:
            assert FailureReason.PREEMPTED not in oldest.failures or len(oldest.work.choices) > 1

    @invariant()
    def counts_add_up(self) -> None:
        self.simulation.scheduler.check_integrity()
        load = self.simulation.scheduler.load()
        assert 0 <= load.credit_blocks <= load.num_free_blocks
        assert self.simulation.allocator.num_available >= 0

    def teardown(self) -> None:
        simulation = self.simulation
        for dispatch in self.importing():
            if dispatch.is_abandoned:
                simulation.end_import(dispatch.work.key)
            else:
                simulation.import_all(dispatch.work.key)
        simulation.step()
        for dispatch in self.unconfirmed():
            simulation.confirm(dispatch.work.key)
        for _ in range(3):
            # A preemption during these steps can abandon nothing: nothing imports any more.
            simulation.run_to_end()
        for dispatch in simulation.dispatches.values():
            simulation.assert_complete(dispatch)
        simulation.assert_nothing_left()


DecodeSchedulerStates.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestDecodeSchedulerStates = DecodeSchedulerStates.TestCase


@pytest.mark.parametrize(("depth", "runs_late"), [(0, False), (1, False), (1, True)])
@pytest.mark.parametrize("seed", range(4))
def test_a_long_run_under_pressure_ends_every_choice_with_the_reference(
    depth: int, runs_late: bool, seed: int
) -> None:
    """Rare mishaps, many tokens, a pool that is too small: what came back is dispatched again."""
    machine = DecodeSchedulerStates()
    machine.build(num_blocks=24, max_num_seqs=6, budget=12, depth=depth, runs_late=runs_late)
    simulation, rng = machine.simulation, np.random.default_rng(seed)

    def chance(probability: float) -> bool:
        return bool(rng.random() < probability)

    for _ in range(300):
        if chance(0.3):
            machine.submit(
                prefix=PREFIXES[rng.integers(len(PREFIXES))],
                tail=rng.integers(0, 4, size=rng.integers(1, 10)).tolist(),
                num_choices=int(rng.integers(1, 4)),
                max_tokens=int(rng.integers(1, 45)),
                seed=int(rng.integers(3)),
                stop=(),
                ignore_eos=chance(0.7),
                has_source=chance(0.6),
                session=int(rng.integers(1, 3)),
            )
        number = int(rng.integers(1000))
        if machine.importing() and chance(0.5):
            machine.end_reads(number, confirm=chance(0.4))
        if machine.unconfirmed() and chance(0.4):
            machine.judge(number, held=chance(0.9))
        if machine.importing() and chance(0.02):
            machine.lose_owner(number, reads_end_first=chance(0.5))
        if machine.open() and chance(0.1):
            machine.cancel(-1 if chance(0.5) else number, all_choices=chance(0.3))  # -1: the newest
        if machine.open() and chance(0.02):
            machine.dispatch_newer(number, has_source=chance(0.5))
        if machine.failed() and chance(0.7):
            machine.resume(number, has_source=chance(0.5))
        for _ in range(int(rng.integers(1, 4))):
            simulation.step()
    machine.teardown()
    failures = [f for d in simulation.dispatches.values() for f in d.failures]
    assert FailureReason.PREEMPTED in failures
    assert simulation.runner.num_blocks_copied > 0
    assert sum(len(o) for d in simulation.dispatches.values() for o in d.outputs.values()) > 500


def test_both_depths_give_the_same_output() -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 30, size=rng.integers(1, 25)).tolist() for _ in range(20)]
    outputs = []
    for depth in (0, 1):
        simulation = DecodeSimulation(num_blocks=30, max_num_seqs=5, depth=depth)
        waiting = [(f"r{i}", prompt) for i, prompt in enumerate(prompts)]
        given: dict[str, list[int]] = {}
        attempts: dict[str, int] = {}
        while waiting or simulation.step():
            simulation.step()
            for request_id, prompt in list(waiting):
                attempts[request_id] = attempts.get(request_id, 0) + 1
                work = simulation.make_work(
                    request_id,
                    prompt,
                    attempt=attempts[request_id],
                    output=given.get(request_id, ()),
                    sampling=SamplingParams(max_tokens=40, temperature=1.0, seed=len(prompt)),
                )
                has_source = len(prompt) % 2 == 0
                if not isinstance(simulation.admit(work, has_source=has_source), Admitted):
                    continue
                waiting.remove((request_id, prompt))
                if has_source:
                    simulation.import_all(work.key)
                    simulation.step()
                    simulation.confirm(work.key)
            for request_id, attempt in attempts.items():
                dispatch = simulation.dispatches.get(AttemptKey(request_id, attempt))
                if dispatch is None:
                    continue
                given[request_id] = dispatch.outputs[0]
                pair = (request_id, dispatch.work.prompt.tolist())
                if dispatch.failures and pair not in waiting:
                    waiting.append(pair)
        outputs.append(given)
        simulation.assert_nothing_left()
    assert outputs[0] == outputs[1]
    assert all(len(output) > 0 for output in outputs[0].values())
