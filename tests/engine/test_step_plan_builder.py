import numpy as np
import pytest
from simulated_runner import SimulatedRunner, SimulationError

from paceline.engine.step_plan import SlotStart, StepPlan
from paceline.engine.step_plan_builder import StepPlanBuilder
from paceline.sampling_params import SamplingParams

PROMPT = np.arange(10, 20, dtype=np.int32)
GREEDY = SamplingParams(max_tokens=10, temperature=0.0)


def start_prompt(
    builder: StepPlanBuilder, slot: int, blocks: list[int], end: int = len(PROMPT)
) -> int:
    builder.start_slot(SlotStart(slot, GREEDY, 0, PROMPT, np.empty(0, dtype=np.int32)))
    builder.set_blocks(slot, 0, blocks)
    return builder.add_row(slot, 0, PROMPT[:end])


def run(runner: SimulatedRunner, plan: StepPlan) -> list[int]:
    tokens: list[int] = runner.launch(plan).result().token_ids.tolist()
    return tokens


def test_decode_and_prefill_rows_mix_in_one_step() -> None:
    runner = SimulatedRunner(max_num_slots=4, vocab_size=50, num_blocks=16, block_tokens=4)
    first = StepPlanBuilder(0)
    for slot in (0, 1):
        last = start_prompt(first, slot, [slot * 3, slot * 3 + 1, slot * 3 + 2])
        assert first.add_sample(last, slot, 0) == slot
    sampled = run(runner, first.build())
    second = StepPlanBuilder(1)
    slots = np.array([0, 1], dtype=np.int32)
    assert second.add_decode_rows(slots, np.full(2, 10, np.int32), np.full(2, 1, np.int32)) == 0
    last = start_prompt(second, 2, [6, 7, 8])
    assert (last, second.num_tokens) == (11, 12)
    assert second.add_sample(last, 2, 0) == 2
    plan = second.build()
    assert plan.num_new_tokens.tolist() == [1, 1, 10]
    assert plan.from_last_sample.tolist() == [True, True, False]
    following = run(runner, plan)
    reference = runner.reference_output(PROMPT, GREEDY, 0, 2)
    assert sampled == [reference[0]] * 2
    assert following == [reference[1], reference[1], reference[0]]


def test_an_empty_builder_gives_empty_arrays() -> None:
    builder = StepPlanBuilder(3)
    none = np.empty(0, dtype=np.int32)
    assert builder.add_decode_rows(none, none, none) == 0
    assert not builder.has_rows
    plan = builder.build()
    assert (plan.step_id, plan.num_tokens, len(plan.from_last_sample)) == (3, 0, 0)


def test_copies_happen_before_writes() -> None:
    runner = SimulatedRunner(max_num_slots=2, vocab_size=50, num_blocks=8, block_tokens=4)
    first = StepPlanBuilder(0)
    start_prompt(first, 0, [0, 1, 2], end=6)
    run(runner, first.build())
    second = StepPlanBuilder(1)
    second.copy_block(1, 5)
    second.start_slot(SlotStart(1, GREEDY, 0, PROMPT, np.empty(0, dtype=np.int32)))
    second.set_blocks(1, 0, [0, 5, 6])
    second.add_row(0, 6, PROMPT[6:])
    last = second.add_row(1, 6, PROMPT[6:])
    second.add_sample(last, 1, 0)
    assert run(runner, second.build()) == runner.reference_output(PROMPT, GREEDY, 0, 1)


class TestSimulatedRunnerRefuses:
    """The fake that scheduler tests stand on finds each kind of wrong plan."""

    def make_runner(self) -> SimulatedRunner:
        runner = SimulatedRunner(max_num_slots=3, vocab_size=50, num_blocks=8, block_tokens=4)
        builder = StepPlanBuilder(0)
        start_prompt(builder, 0, [0, 1, 2], end=6)
        run(runner, builder.build())
        return runner

    def refuses(self, builder: StepPlanBuilder, message: str) -> None:
        with pytest.raises(SimulationError, match=message):
            self.make_runner().launch(builder.build())

    def test_a_wrong_start(self) -> None:
        builder = StepPlanBuilder(1)
        builder.add_row(0, 7, PROMPT[7:])
        self.refuses(builder, "wrong KV before the step at positions .6. of 7")

    def test_a_wrong_block(self) -> None:
        builder = StepPlanBuilder(1)
        builder.set_blocks(0, 0, [4])
        builder.add_row(0, 6, PROMPT[6:])
        self.refuses(builder, "wrong KV before the step")

    def test_a_stale_copy(self) -> None:
        builder = StepPlanBuilder(1)
        builder.copy_block(3, 1)
        builder.add_row(0, 6, PROMPT[6:])
        self.refuses(builder, "wrong KV before the step at positions .4, 5.")

    def test_a_missing_copy_on_write(self) -> None:
        builder = StepPlanBuilder(1)
        start_prompt(builder, 1, [0, 1, 5], end=7)
        builder.add_row(0, 6, PROMPT[6:])
        self.refuses(builder, "write block 1 together")

    def test_a_missing_block(self) -> None:
        builder = StepPlanBuilder(1)
        start_prompt(builder, 1, [4, 5])
        self.refuses(builder, "no block for position 8")

    def test_wrong_tokens(self) -> None:
        builder = StepPlanBuilder(1)
        builder.add_row(0, 6, PROMPT[5:9])
        self.refuses(builder, "gets tokens")

    def test_a_sample_before_the_end_of_the_context(self) -> None:
        builder = StepPlanBuilder(1)
        builder.add_sample(builder.add_row(0, 6, PROMPT[6:9]), 0, 0)
        self.refuses(builder, "samples after position 8")

    def test_a_wrong_sample_index(self) -> None:
        builder = StepPlanBuilder(1)
        builder.add_sample(builder.add_row(0, 6, PROMPT[6:]), 0, 1)
        self.refuses(builder, "samples index 1, its next is 0")

    def test_a_skipped_step_and_a_third_one_in_flight(self) -> None:
        builder = StepPlanBuilder(2)
        builder.add_row(0, 6, PROMPT[6:])
        self.refuses(builder, "step 2 launched after step 0")
        runner = self.make_runner()
        for step_id in (1, 2):
            builder = StepPlanBuilder(step_id)
            builder.add_row(0, 5 + step_id, PROMPT[5 + step_id : 6 + step_id])
            runner.launch(builder.build())
        builder = StepPlanBuilder(3)
        builder.add_row(0, 8, PROMPT[8:])
        with pytest.raises(SimulationError, match="two earlier steps unfinished"):
            runner.launch(builder.build())


def test_a_table_entry_set_twice_travels_once_as_the_last_call_left_it() -> None:
    builder = StepPlanBuilder(1)
    builder.set_blocks(3, 0, (10, 11))
    builder.set_blocks(3, 1, (12,))
    builder.add_row(3, 0, np.array([1], dtype=np.int32))
    plan = builder.build()
    entries = zip(plan.table_slots, plan.table_columns, plan.table_blocks, strict=True)
    assert sorted(tuple(map(int, entry)) for entry in entries) == [(3, 0, 10), (3, 1, 12)]
