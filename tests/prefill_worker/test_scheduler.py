import numpy as np
import pytest
from prefill_simulation import PrefillSimulation, make_work

from paceline.engine.step_plan import StepResult
from paceline.errors import IntegrityError
from paceline.prefill_worker.outcomes import Accepted, Refused
from paceline.prefill_worker.prompt import MOVES, Prompt, PromptState
from paceline.request import AttemptKey, FinishReason, Work
from paceline.sampling_params import SamplingParams

LONG = range(10, 210)


def finish(simulation: PrefillSimulation) -> None:
    simulation.run_to_the_end()
    for key in simulation.done:
        simulation.scheduler.release(key)
    simulation.check_nothing_left()


def refusal(simulation: PrefillSimulation, work: Work) -> str:
    load = simulation.scheduler.load()
    answer = simulation.add(work)
    assert isinstance(answer, Refused)
    assert simulation.scheduler.load() == load
    simulation.scheduler.check_integrity()
    return answer.message


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("chunk", [16, 50, 512])
def test_a_prompt_is_computed_in_chunks_and_gives_its_first_token(depth: int, chunk: int) -> None:
    simulation = PrefillSimulation(depth=depth, max_num_batched_tokens=chunk)
    answer = simulation.accept(make_work("a", LONG))
    assert answer.cached_tokens == 0
    assert len(answer.block_ids) == 13
    finish(simulation)
    done = simulation.done[AttemptKey("a", 1)]
    assert done.session == "router"
    assert [sample.stream_id for sample in done.first_samples] == [100]
    assert sum(time.num_tokens for time in done.chunk_times) == len(LONG)
    assert len(done.chunk_times) == -(-len(LONG) // chunk)
    assert all(time.applied_s - time.planned_s == depth for time in done.chunk_times[:-1])


def test_progress_names_only_applied_chunks_and_leaves_out_the_complete() -> None:
    simulation = PrefillSimulation(depth=1, max_num_batched_tokens=80)
    simulation.accept(make_work("a", LONG))
    assert simulation.step() is None
    progressed = []
    while simulation.scheduler.has_work:
        step = simulation.step()
        assert step is not None
        progressed.append([num_tokens for _, num_tokens in step.progressed])
    assert progressed == [[80], [160], []]
    finish(simulation)


def test_chunks_of_several_prompts_share_a_step() -> None:
    simulation = PrefillSimulation(max_num_batched_tokens=64)
    simulation.accept(make_work("long", LONG))
    simulation.accept(make_work("short", range(30)))
    simulation.accept(make_work("shorter", range(40, 60)))
    simulation.step()
    assert simulation.plans[0].num_new_tokens.tolist() == [20, 30, 14]
    assert {key.request_id for key in simulation.done} == {"short", "shorter"}
    finish(simulation)


def test_a_cached_prefix_is_shared_and_not_computed_again() -> None:
    simulation = PrefillSimulation()
    simulation.accept(make_work("first", LONG))
    simulation.run_to_the_end()
    num_steps = len(simulation.plans)
    answer = simulation.accept(make_work("second", [*LONG[:100], *range(500, 540)]))
    assert answer.cached_tokens == 96
    assert answer.block_ids[:6] == simulation.blocks[AttemptKey("first", 1)][:6]
    finish(simulation)
    assert sum(plan.num_tokens for plan in simulation.plans[num_steps:]) == 44


def test_the_last_token_of_a_fully_cached_prompt_is_computed() -> None:
    simulation = PrefillSimulation()
    simulation.accept(make_work("first", LONG[:64]))
    simulation.run_to_the_end()
    assert simulation.accept(make_work("second", LONG[:64])).cached_tokens == 48
    finish(simulation)


def test_unapplied_chunks_are_not_in_the_prefix_cache() -> None:
    simulation = PrefillSimulation(depth=1)
    simulation.accept(make_work("first", LONG[:64]))
    simulation.plan()
    assert simulation.accept(make_work("second", LONG[:64])).cached_tokens == 0
    simulation.apply()
    assert simulation.accept(make_work("third", LONG[:64])).cached_tokens == 48
    finish(simulation)


def test_tenants_do_not_share_blocks() -> None:
    simulation = PrefillSimulation()
    simulation.accept(make_work("first", LONG, tenant="one"))
    simulation.run_to_the_end()
    assert simulation.accept(make_work("second", LONG, tenant="two")).cached_tokens == 0
    finish(simulation)


def test_each_choice_is_sampled_from_the_same_position() -> None:
    simulation = PrefillSimulation(vocab_size=100_000)
    sampling = SamplingParams(max_tokens=20, seed=3, n=3, logprobs=2)
    simulation.accept(make_work("a", range(40), choices=(0, 1, 2), sampling=sampling))
    assert simulation.scheduler.load().credit_sequences == 5
    simulation.step()
    assert simulation.scheduler.load().credit_sequences == 8
    samples = simulation.done[AttemptKey("a", 1)].first_samples
    assert [sample.choice for sample in samples] == [0, 1, 2]
    assert len({sample.token_id for sample in samples}) == 3
    finish(simulation)


@pytest.mark.parametrize("depth", [0, 1])
def test_resumed_work_continues_at_the_same_index(depth: int) -> None:
    simulation = PrefillSimulation(depth=depth)
    sampling = SamplingParams(max_tokens=20, seed=3, n=2)
    output = simulation.runner.reference_output(LONG, sampling, 1, 7)
    work = make_work("a", LONG, attempt=2, output=output, choices=(1,), sampling=sampling)
    simulation.accept(work)
    finish(simulation)
    assert simulation.done[work.key].first_samples[0].index == 7


def test_first_tokens_that_end_a_choice_say_so() -> None:
    simulation = PrefillSimulation(max_model_len=41)
    first = simulation.runner.reference_output(range(10), SamplingParams(temperature=0.0), 0, 1)
    cases = {
        "stop": (range(10), SamplingParams(20, temperature=0.0, stop_token_ids=(first[0],))),
        "max_tokens": (range(10), SamplingParams(1, temperature=0.0)),
        "model length": (range(40), SamplingParams(20, temperature=0.0)),
        "none": (range(39), SamplingParams(20, temperature=0.0)),
    }
    for name, (prompt, sampling) in cases.items():
        simulation.accept(make_work(name, prompt, sampling=sampling))
    finish(simulation)
    reasons = {
        key.request_id: d.first_samples[0].finish_reason for key, d in simulation.done.items()
    }
    assert reasons == {
        "stop": FinishReason.STOP,
        "max_tokens": FinishReason.LENGTH,
        "model length": FinishReason.LENGTH,
        "none": None,
    }


def test_work_without_room_is_refused_with_the_numbers_and_keeps_nothing() -> None:
    simulation = PrefillSimulation(num_blocks=16, max_num_seqs=2, max_model_len=300)
    assert "320 tokens leave no room" in refusal(simulation, make_work("a", range(320)))
    too_large = refusal(simulation, make_work("a", range(280)))
    assert "280 tokens need 18 KV blocks, the pool has 16" in too_large
    assert "the prompt is empty" in refusal(simulation, make_work("a", []))
    assert "3 choices" in refusal(simulation, make_work("a", [1], choices=(0, 1, 2)))
    both = make_work("a", [1], output=[2], choices=(0, 1))
    assert "output so far belongs to one choice" in refusal(simulation, both)
    full = make_work("a", [1], output=[2], sampling=SamplingParams(max_tokens=1))
    assert "1 output tokens are there already, max_tokens is 1" in refusal(simulation, full)
    simulation.accept(make_work("first", LONG[:100]))
    assert "runs here already" in refusal(simulation, make_work("first", LONG[:100]))
    no_blocks = refusal(simulation, make_work("second", range(150)))
    assert "150 tokens need 10 KV blocks beside 0 cached ones, 9 of 16" in no_blocks
    simulation.accept(make_work("third", range(20)))
    assert "0 of 2 are free" in refusal(simulation, make_work("fourth", [1]))
    finish(simulation)


def test_refused_work_gives_its_cached_blocks_back() -> None:
    simulation = PrefillSimulation(num_blocks=16)
    simulation.accept(make_work("first", LONG[:64]))
    simulation.run_to_the_end()
    simulation.scheduler.release(AttemptKey("first", 1))
    simulation.accept(make_work("second", range(500, 660)))
    message = refusal(simulation, make_work("third", [*LONG[:64], *range(300, 400)]))
    assert "need 7 KV blocks beside 4 cached ones, 2 of 16" in message
    simulation.done.clear()
    finish(simulation)


@pytest.mark.parametrize("num_in_flight", [0, 1, 2])
def test_cancelled_prompt_frees_blocks_only_after_its_steps_are_applied(num_in_flight: int) -> None:
    simulation = PrefillSimulation(max_num_batched_tokens=32)
    work = make_work("a", LONG)
    simulation.accept(work)
    for _ in range(num_in_flight):
        simulation.plan()
    assert simulation.scheduler.cancel(work.key)
    assert not simulation.scheduler.cancel(work.key)
    for _ in range(num_in_flight):
        assert simulation.allocator.num_available == 64 - 13
        assert simulation.scheduler.load().credit_sequences == 7
        step = simulation.apply()
        assert step.progressed == step.completed == ()
    simulation.check_nothing_left()


def test_what_a_cancelled_prompt_computed_stays_in_the_prefix_cache() -> None:
    simulation = PrefillSimulation(max_num_batched_tokens=40)
    simulation.accept(make_work("a", LONG))
    simulation.plan()
    simulation.scheduler.cancel(AttemptKey("a", 1))
    simulation.apply()
    assert simulation.accept(make_work("b", LONG)).cached_tokens == 32
    finish(simulation)


def test_cancelled_choices_give_no_sample_and_the_others_go_on() -> None:
    simulation = PrefillSimulation(max_num_batched_tokens=32)
    choices = (0, 1, 2, 3)
    work = make_work(
        "a", range(40), choices=choices, sampling=SamplingParams(max_tokens=9, seed=1, n=4)
    )
    simulation.accept(work)
    assert not simulation.scheduler.cancel(work.key, [0])
    simulation.step()
    simulation.plan()
    assert simulation.plans[-1].sample_slots.size == 3
    assert not simulation.scheduler.cancel(work.key, [2])
    (done,) = simulation.apply().completed
    assert [sample.choice for sample in done.first_samples] == [1, 3]
    finish(simulation)


def test_cancelling_the_last_choice_cancels_the_prompt() -> None:
    simulation = PrefillSimulation()
    work = make_work("a", LONG, choices=(0, 1))
    simulation.accept(work)
    assert not simulation.scheduler.cancel(work.key, [1])
    assert simulation.scheduler.cancel(work.key, [0])
    simulation.check_nothing_left()


def test_a_complete_prompt_ignores_cancel_and_keeps_its_blocks_until_released() -> None:
    simulation = PrefillSimulation()
    work = make_work("a", LONG)
    simulation.accept(work)
    simulation.run_to_the_end()
    assert not simulation.scheduler.cancel(work.key)
    assert simulation.allocator.num_available == 64 - 13
    simulation.scheduler.release(work.key)
    simulation.check_nothing_left()
    with pytest.raises(IntegrityError, match="not a complete prompt"):
        simulation.scheduler.release(work.key)


def test_a_prompt_that_computes_cannot_be_released() -> None:
    simulation = PrefillSimulation()
    simulation.accept(make_work("a", LONG))
    with pytest.raises(IntegrityError, match="not a complete prompt"):
        simulation.scheduler.release(AttemptKey("a", 1))


@pytest.mark.parametrize("depth", [0, 1])
def test_age_bound_keeps_short_prompts_from_starving_a_long_one(depth: int) -> None:
    simulation = PrefillSimulation(
        num_blocks=200, max_num_seqs=32, max_num_batched_tokens=64, age_bound_s=10.0, depth=depth
    )
    long = make_work("long", range(640))
    simulation.accept(long)
    steps = 0
    while long.key not in simulation.done:
        # Each short prompt fills a step of its own, and there is always a new one.
        short = make_work(f"short-{steps}", range(1000 + steps * 64, 1064 + steps * 64))
        if isinstance(simulation.add(short), Accepted):
            assert steps < 40, "the long prompt starves"
        simulation.step()
        for key in [k for k in simulation.done if k != long.key]:
            if key in simulation.scheduler._prompts:
                simulation.scheduler.release(key)
        steps += 1
    assert 10 + 10 <= steps <= 10 + 10 + 2 + depth


def test_results_must_come_in_order_and_plans_must_wait_for_them() -> None:
    simulation = PrefillSimulation(max_num_batched_tokens=16)
    simulation.accept(make_work("a", LONG))
    simulation.plan()
    simulation.plan()
    with pytest.raises(IntegrityError, match="while 2 are not applied"):
        simulation.scheduler.plan(0.0)
    simulation.apply()
    late = StepResult(0, np.empty(0, dtype=np.int32))
    with pytest.raises(IntegrityError, match=r"result of step 0 while \[1\] are in flight"):
        simulation.scheduler.apply(late, 0.0)


def test_load_counts_what_is_still_to_be_computed() -> None:
    simulation = PrefillSimulation(max_num_batched_tokens=64)
    assert simulation.scheduler.load() == (64, 8, 0, 0)
    simulation.accept(make_work("a", LONG, choices=(0, 1)))
    assert simulation.scheduler.load() == (64 - 13, 6, 2, 200)
    simulation.step()
    assert simulation.scheduler.load() == (64 - 13, 6, 2, 136)
    finish(simulation)


@pytest.mark.parametrize("state", PromptState)
def test_prompt_states_move_only_as_the_table_says(state: PromptState) -> None:
    simulation = PrefillSimulation()
    for target in PromptState:
        work = make_work(f"{state}-{target}", [1, 2, 3])
        simulation.accept(work)
        prompt: Prompt[str] = simulation.scheduler._prompts[work.key]
        prompt.state = state
        if target in MOVES[state]:
            prompt.move_to(target)
            assert prompt.state is target
        else:
            with pytest.raises(IntegrityError, match="cannot become"):
                prompt.move_to(target)
