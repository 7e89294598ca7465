"""Who gives up its blocks: the youngest, and never the oldest sequence."""

import random
from collections import Counter, OrderedDict
from collections.abc import Iterator

import pytest
from decode_simulation import DecodeSimulation, make_attempt
from opcodes import num_opcodes

from paceline.decode_worker.attempts import Attempt, AttemptState, Sequence, SequenceState
from paceline.decode_worker.outcomes import Admitted
from paceline.decode_worker.planning import StepPlanner
from paceline.decode_worker.preemption import Victim, choose_victim
from paceline.request import FailureReason
from paceline.sampling_params import SamplingParams

WAITING, RUNNING = SequenceState.WAITING, SequenceState.RUNNING
FINISHED = SequenceState.FINISHED
LONG = SamplingParams(max_tokens=100, temperature=0.0, seed=1, ignore_eos=True)


def make(*states: SequenceState) -> Attempt:
    attempt = make_attempt(AttemptState.RUNNING)
    attempt.sequences = tuple(
        Sequence(attempt, choice, choice, choice, state) for choice, state in enumerate(states)
    )
    return attempt


def choose(*attempts: Attempt) -> Victim | None:
    return choose_victim(OrderedDict.fromkeys(a for a in attempts if a.holds_blocks))


def test_the_youngest_goes_whether_it_runs_or_waits() -> None:
    old, middle = make(RUNNING), make(RUNNING)
    for young in (make(RUNNING), make(WAITING)):
        victim = choose(old, middle, young)
        assert victim is not None
        assert victim.attempt is young


def test_of_a_running_attempt_one_choice_goes_and_of_a_waiting_one_all() -> None:
    running, waiting = make(RUNNING, RUNNING), make(WAITING, WAITING)
    victim = choose(make(RUNNING), running)
    assert victim is not None
    assert victim.sequences == (running.sequences[1],)
    victim = choose(make(RUNNING), waiting)
    assert victim is not None
    assert victim.sequences == waiting.sequences


def test_what_has_finished_holds_no_blocks_and_is_passed_over() -> None:
    done, old, young = make(FINISHED), make(RUNNING), make(FINISHED)
    middle = make(RUNNING)
    victim = choose(done, old, middle, young)
    assert victim is not None
    assert victim.attempt is middle
    assert choose(done, old, young) is None


def test_the_oldest_attempt_keeps_one_choice() -> None:
    oldest = make(RUNNING, RUNNING, FINISHED)
    victim = choose(oldest)
    assert victim is not None
    assert victim.sequences == (oldest.sequences[1],)
    assert choose(make(RUNNING, FINISHED)) is None
    assert choose(make(WAITING, WAITING)) is None
    assert choose() is None


class PlainPlanner(StepPlanner):
    """Works everything out again for each victim."""

    def _preempt(self, num_wanted: int, now: float) -> None:
        roster, batch = self._roster, self._roster.batch
        while True:
            rows = batch.rows_at_capacity()
            num_lacking = len(rows) - int(batch.promised[rows].sum()) - roster.budget.num_spare
            leaving = Counter(roster.departures.block_ids)
            num_coming = sum(
                self._allocator.num_references(block_id) == count
                and not self._allocator.num_pins(block_id)
                for block_id, count in leaving.items()
            )
            holders = [attempt for attempt in roster.attempts.values() if attempt.holds_blocks]
            victim = choose(*holders)
            if num_lacking <= max(num_coming, 0) or victim is None:
                return
            roster.fail(list(victim.sequences), FailureReason.PREEMPTED, "test", now)
            roster.departures.settle(roster.last_applied_step)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("seed", range(12))
def test_victims_are_those_that_a_plain_search_finds(seed: int, depth: int) -> None:
    preempted = []
    for planner_type in (StepPlanner, PlainPlanner):
        simulation = DecodeSimulation(num_blocks=30, depth=depth)
        scheduler = simulation.scheduler
        scheduler._planner = planner_type(
            simulation.allocator, scheduler._limits, scheduler._roster
        )
        preempted.append(list(preemptions(simulation, random.Random(seed))))
    assert preempted[0] == preempted[1]
    assert any(preempted[0])


def preemptions(simulation: DecodeSimulation, rng: random.Random) -> Iterator[list[str]]:
    """Run a load that is too large, and tell after each step who was preempted so far."""
    for number in range(25):
        prompt = [*range(10, 10 + rng.randrange(4, 12))]  # prefixes of one text: blocks are shared
        choices = range(rng.choice([1, 1, 2, 3]))
        work = simulation.make_work(f"r{number}", prompt, choices=choices, sampling=LONG)
        has_source = rng.random() < 0.5
        if isinstance(simulation.admit(work, has_source=has_source), Admitted) and has_source:
            simulation.import_all(work.key)
            if rng.random() < 0.8:
                simulation.confirm(work.key)
        for _ in range(rng.randrange(4)):
            simulation.step()
        for dispatch in simulation.dispatches.values():
            if dispatch.is_abandoned and dispatch.is_importing:
                simulation.end_import(dispatch.work.key)
        yield sorted(
            f"{dispatch.work.key} {choice}"
            for dispatch in simulation.dispatches.values()
            for choice in dispatch.gone
        )


def test_a_victim_costs_the_same_however_many_sequences_run() -> None:
    few, many = (cost_of_a_victim(num_running) for num_running in (16, 256))
    assert many < 1.5 * few


def cost_of_a_victim(num_running: int) -> float:
    """Count what making room executes for each victim, when all rows need a block at once."""
    simulation = DecodeSimulation(
        num_blocks=3 * num_running,
        max_num_seqs=num_running,
        max_num_batched_tokens=10_000,
        depth=1,
    )
    for number in range(num_running):
        prompt = [number % 40, number // 40, 7]
        work = simulation.make_work(f"r{number}", prompt, sampling=LONG)
        assert isinstance(simulation.admit(work, has_source=False), Admitted)
    planner, roster = simulation.scheduler._planner, simulation.scheduler._roster
    while roster.budget.num_spare or not len(roster.batch.rows_at_capacity()):
        assert simulation.step()
    count = num_opcodes(lambda: planner._make_room(simulation.now))
    num_victims = num_running - len(roster.holders)
    assert num_victims >= num_running // 4
    return count / num_victims
