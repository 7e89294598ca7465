"""The decode scheduler, stepped by hand. Every emitted token is compared with the reference."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from decode_simulation import BLOCK_TOKENS, GREEDY, DecodeSimulation
from opcodes import num_opcodes

from paceline.decode_worker.outcomes import Admitted, Refused
from paceline.decode_worker.roster import Roster
from paceline.errors import IntegrityError
from paceline.groups import Groups
from paceline.request import AttemptKey, FailureReason
from paceline.sampling_params import SamplingParams

PROMPT = list(range(10, 20))
SEEDED = SamplingParams(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True)
LONG = SamplingParams(max_tokens=60, temperature=0.0, seed=1, ignore_eos=True)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 30])
@pytest.mark.parametrize("has_source", [True, False])
def test_output_is_the_reference_whoever_computed_the_prompt(
    depth: int, num_tokens: int, has_source: bool
) -> None:
    simulation = DecodeSimulation(depth=depth)
    prompt = [11 + i for i in range(num_tokens)]
    for choices in ((0,), (0, 1, 2)):
        dispatch = simulation.run(
            f"r{len(choices)}", prompt, has_source=has_source, choices=choices, sampling=SEEDED
        )
        simulation.run_to_end()
        simulation.assert_complete(dispatch)
    simulation.assert_nothing_left()


@pytest.mark.parametrize("depth", [0, 1])
def test_prompts_computed_here_run_beside_decode_rows_within_the_token_budget(depth: int) -> None:
    simulation = DecodeSimulation(depth=depth, max_num_batched_tokens=10)
    dispatches = [
        simulation.run(f"r{i}", PROMPT * (1 + i), has_source=i % 2 == 0, sampling=SEEDED)
        for i in range(4)
    ]
    simulation.run_to_end()
    for dispatch in dispatches:
        simulation.assert_complete(dispatch)
    simulation.assert_nothing_left()


def test_nothing_is_emitted_or_cached_before_the_confirmation() -> None:
    simulation = DecodeSimulation()
    work = simulation.make_work("r", PROMPT, choices=(0, 1), sampling=SEEDED)
    simulation.admit(work)
    simulation.import_all(work.key)
    for _ in range(5):
        simulation.step()
    dispatch = simulation.dispatches[work.key]
    assert dispatch.outputs == {0: [], 1: []}
    assert simulation.prefix_cache.num_cached == 0
    simulation.confirm(work.key)
    assert [len(output) for output in dispatch.outputs.values()] == [6, 6]
    assert simulation.prefix_cache.num_cached == len(PROMPT) // BLOCK_TOKENS
    simulation.run_to_end()
    simulation.assert_complete(dispatch)
    simulation.assert_nothing_left()


def test_a_choice_that_ends_before_the_confirmation_reports_all_of_it_afterwards() -> None:
    simulation = DecodeSimulation()
    sampling = SamplingParams(max_tokens=3, temperature=1.0, seed=7, ignore_eos=True)
    work = simulation.make_work("r", PROMPT, choices=(0, 1), sampling=sampling)
    simulation.admit(work)
    simulation.import_all(work.key)
    simulation.run_to_end()
    assert not simulation.dispatches[work.key].finished
    simulation.confirm(work.key)
    simulation.assert_complete(simulation.dispatches[work.key])
    simulation.assert_nothing_left()


def test_a_lost_lease_fails_what_ran_and_nothing_of_it_was_seen() -> None:
    simulation = DecodeSimulation()
    sampling = SamplingParams(max_tokens=3, temperature=1.0, seed=7, ignore_eos=True)
    work = simulation.make_work("r", PROMPT, choices=(0, 1), sampling=sampling)
    simulation.admit(work)
    simulation.import_all(work.key)
    simulation.run_to_end()
    simulation.lose(work.key)
    dispatch = simulation.dispatches[work.key]
    assert dispatch.failures == [FailureReason.LEASE_LOST] * 2
    assert dispatch.outputs == {0: [], 1: []}
    assert simulation.prefix_cache.num_cached == 0
    simulation.assert_nothing_left()


@pytest.mark.parametrize("how", ["lose", "cancel", "expire", "session", "newer attempt"])
def test_destination_blocks_stay_while_a_read_may_write(how: str) -> None:
    simulation = DecodeSimulation(promise_ttl_s=10.0)
    work = simulation.make_work("r", PROMPT)
    simulation.admit(work)
    num_held = simulation.allocator.num_blocks - simulation.allocator.num_available
    if how == "lose":
        simulation.lose(work.key)
    elif how == "cancel":
        simulation.cancel(work.key)
    elif how == "expire":
        simulation.now += 11.0
        simulation.scheduler.expire(simulation.now)
        simulation.take_output()
        failures = simulation.dispatches[work.key].failures
        assert failures == [FailureReason.PROMISE_EXPIRED]
    elif how == "session":
        simulation.end_session(1)
    else:
        newer = simulation.make_work("r", PROMPT, attempt=2)
        assert isinstance(simulation.admit(newer), Admitted)
        simulation.take_output()
        simulation.cancel(newer.key)
        simulation.end_import(newer.key)
    assert simulation.dispatches[work.key].is_abandoned
    assert simulation.allocator.num_blocks - simulation.allocator.num_available == num_held
    assert not simulation.scheduler.is_idle
    simulation.scheduler.check_integrity()
    simulation.end_import(work.key)
    simulation.assert_nothing_left()


def test_progress_renews_the_promise() -> None:
    simulation = DecodeSimulation(promise_ttl_s=10.0)
    work = simulation.make_work("r", PROMPT)
    simulation.admit(work)
    for _ in range(3):
        simulation.now += 9.0
        simulation.scheduler.import_progressed(work.key, simulation.now)
        simulation.scheduler.expire(simulation.now)
    simulation.take_output()
    assert not simulation.dispatches[work.key].failures


def test_blocks_of_a_cancelled_sequence_stay_until_the_step_in_flight_is_applied() -> None:
    simulation = DecodeSimulation(depth=1)
    dispatch = simulation.run("r", PROMPT, sampling=LONG)
    simulation.step()
    simulation.step()
    simulation.cancel(dispatch.work.key)
    simulation.scheduler.tidy()
    assert simulation.allocator.num_available < simulation.allocator.num_blocks
    simulation.run_to_end()
    simulation.assert_nothing_left()


@pytest.mark.parametrize("choices", [(0, 1), (0, 1, 2)])
@pytest.mark.parametrize("has_source", [True, False])
def test_one_choice_can_be_cancelled_and_the_others_go_on(
    has_source: bool, choices: tuple[int, ...]
) -> None:
    for num_steps, cancelled in product(range(5), choices):
        simulation = DecodeSimulation(depth=1, max_num_batched_tokens=6)
        dispatch = simulation.run(
            "r", PROMPT, has_source=has_source, choices=choices, sampling=SEEDED
        )
        for _ in range(num_steps):
            simulation.step()
        simulation.cancel(dispatch.work.key, (cancelled,))
        simulation.run_to_end()
        simulation.assert_complete(dispatch)
        assert set(dispatch.finished) == {*choices} - {cancelled}
        simulation.assert_nothing_left()


def test_forks_share_the_context_and_copy_only_the_partial_block() -> None:
    simulation = DecodeSimulation()
    simulation.run("r", PROMPT, choices=(0, 1, 2, 3), sampling=SEEDED)
    simulation.step()
    assert simulation.runner.num_blocks_copied == 3
    num_held = simulation.allocator.num_blocks - simulation.allocator.num_available
    assert num_held == len(PROMPT) // BLOCK_TOKENS + 4


@pytest.mark.parametrize("runs_late", [False, True])
def test_the_source_of_a_copy_is_kept_until_the_copy_has_run(runs_late: bool) -> None:
    """One choice copies the shared block in a step that is in flight; the other one, cancelled,
    leaves it with the step before. Neither holds the block any more, and the copy may not have run.
    """
    simulation = DecodeSimulation(num_blocks=16, depth=1, runs_late=runs_late)
    prompt = PROMPT[: BLOCK_TOKENS + 1]
    forked = simulation.run("r", prompt, has_source=False, choices=(0, 1), sampling=SEEDED)
    simulation.step()
    simulation.cancel(forked.work.key, (1,))
    simulation.step()
    assert simulation.runner.num_blocks_copied == (0 if runs_late else 1)
    source = forked.block_ids[-1]
    num_blocks = simulation.scheduler.load().credit_blocks - 1  # one is for growth
    work = simulation.make_work("s", list(range(num_blocks * BLOCK_TOKENS)), sampling=SEEDED)
    answer = simulation.admit(work)
    assert isinstance(answer, Admitted)
    assert source not in answer.block_ids
    simulation.step()
    assert simulation.runner.num_blocks_copied == 1
    simulation.scheduler.tidy()
    assert simulation.allocator.num_references(source) == 0
    simulation.import_all(work.key)
    simulation.confirm(work.key)
    simulation.run_to_end()
    for dispatch in simulation.dispatches.values():
        simulation.assert_complete(dispatch)
    simulation.assert_nothing_left()


def test_a_second_request_with_the_same_beginning_shares_its_blocks() -> None:
    simulation = DecodeSimulation()
    first = simulation.run("a", PROMPT, sampling=LONG)
    simulation.run_to_end()
    follow_up = PROMPT + first.outputs[0]
    for has_source in (True, False):
        second = simulation.run(f"b{has_source}", follow_up, has_source=has_source)
        # The last sampled token has no KV.
        assert second.num_cached_tokens == (len(follow_up) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        simulation.run_to_end()
        simulation.assert_complete(second)
    simulation.assert_nothing_left()


def test_the_youngest_is_preempted_and_the_oldest_never() -> None:
    simulation = DecodeSimulation(num_blocks=20, depth=1)
    dispatches = [simulation.run(f"r{i}", PROMPT, sampling=LONG) for i in range(3)]
    simulation.run_to_end()
    oldest, *younger = dispatches
    assert not oldest.failures
    simulation.assert_complete(oldest)
    assert [dispatch.failures for dispatch in younger] == [[FailureReason.PREEMPTED]] * 2
    assert len(younger[0].outputs[0]) > len(younger[1].outputs[0])
    again = simulation.make_work(
        "r1", PROMPT, attempt=2, output=younger[0].outputs[0], sampling=LONG
    )
    assert isinstance(simulation.admit(again, has_source=False), Admitted)
    simulation.run_to_end()
    simulation.assert_complete(simulation.dispatches[again.key])
    simulation.assert_nothing_left()


def test_a_promise_is_preempted_before_an_older_sequence() -> None:
    simulation = DecodeSimulation(num_blocks=20)
    running = simulation.run("old", PROMPT, sampling=LONG)
    promised = simulation.make_work("young", [*range(20, 40), 1, 2, 3])
    assert isinstance(simulation.admit(promised), Admitted)
    simulation.run_to_end()  # until the oldest waits for the reads to end
    assert not running.finished
    dispatch = simulation.dispatches[promised.key]
    assert dispatch.failures == [FailureReason.PREEMPTED]
    assert dispatch.is_abandoned
    simulation.end_import(promised.key)
    simulation.run_to_end()
    simulation.assert_complete(running)
    simulation.assert_nothing_left()


def test_stop_tokens_end_a_choice_and_the_wasted_row_is_dropped() -> None:
    for depth in (0, 1):
        simulation = DecodeSimulation(depth=depth, vocab_size=6)
        for seed in range(6):
            plain = SamplingParams(max_tokens=40, temperature=1.0, seed=seed)
            custom = SamplingParams(
                max_tokens=40, temperature=1.0, seed=seed, stop_token_ids=(1, 2), ignore_eos=True
            )
            for name, sampling in (("plain", plain), ("custom", custom)):
                dispatch = simulation.run(f"{name}{seed}", PROMPT, sampling=sampling)
                simulation.run_to_end()
                simulation.assert_complete(dispatch)
        simulation.assert_nothing_left()


def test_the_length_of_the_model_ends_a_choice() -> None:
    simulation = DecodeSimulation(max_model_len=20)
    dispatch = simulation.run("r", PROMPT, sampling=LONG)
    simulation.run_to_end()
    simulation.assert_complete(dispatch)
    assert len(dispatch.outputs[0]) == 10


def test_outputs_of_two_routers_are_kept_apart_and_log_probabilities_come_along() -> None:
    simulation = DecodeSimulation()
    sampling = SamplingParams(max_tokens=9, temperature=1.0, seed=3, logprobs=2)
    for i in range(6):
        work = simulation.make_work(f"r{i}", PROMPT, sampling=sampling if i % 3 else GREEDY)
        assert isinstance(simulation.admit(work, has_source=i > 3, session=i % 2), Admitted)
        if i > 3:
            simulation.import_all(work.key)
            simulation.step()
            simulation.confirm(work.key)
    simulation.run_to_end()
    for dispatch in simulation.dispatches.values():
        simulation.assert_complete(dispatch)


def test_an_older_attempt_is_refused_and_a_newer_one_ends_it() -> None:
    simulation = DecodeSimulation()
    simulation.admit(simulation.make_work("r", PROMPT, attempt=2), has_source=False)
    simulation.step()
    refused = simulation.admit(simulation.make_work("r", PROMPT, attempt=1))
    assert isinstance(refused, Refused)
    assert "older than 2" in refused.message
    again = simulation.admit(simulation.make_work("r", PROMPT, attempt=2))
    assert isinstance(again, Refused)
    simulation.admit(simulation.make_work("r", PROMPT, attempt=3), has_source=False)
    simulation.run_to_end()
    newest = simulation.dispatches[AttemptKey("r", 3)]
    simulation.assert_complete(newest)
    simulation.assert_nothing_left()


def test_work_that_does_not_fit_is_refused_with_the_numbers() -> None:
    simulation = DecodeSimulation(num_blocks=16, max_num_seqs=4, local_prefill_tokens=8)

    def refusal(prompt: list[int], *, has_source: bool = True, num_choices: int = 1) -> str:
        work = simulation.make_work("x", prompt, choices=tuple(range(num_choices)), sampling=SEEDED)
        answer = simulation.admit(work, has_source=has_source)
        assert isinstance(answer, Refused)
        assert answer.reason is FailureReason.REFUSED
        simulation.scheduler.check_integrity()
        return answer.message

    assert "the pool has 16" in refusal(PROMPT * 6)
    assert "decode.local_prefill_tokens is 8" in refusal(PROMPT, has_source=False)
    assert "4 may run" in refusal(PROMPT, num_choices=5)
    assert "max_model_len, is 128" in refusal(PROMPT * 13)
    assert "prompt is empty" in refusal([])
    simulation.run("a", PROMPT, choices=(0, 1, 2), sampling=SEEDED)
    assert "1 of 4 are free" in refusal(PROMPT, num_choices=2)
    assert "can be committed now" in refusal(list(range(30)))


def test_a_draining_worker_refuses_and_gives_no_credit() -> None:
    simulation = DecodeSimulation()
    dispatch = simulation.run("r", PROMPT)
    simulation.scheduler.drain()
    refused = simulation.admit(simulation.make_work("s", PROMPT))
    assert isinstance(refused, Refused)
    assert refused.reason is FailureReason.DRAINING
    load = simulation.scheduler.load()
    assert (load.credit_blocks, load.credit_sequences, load.draining) == (0, 0, True)
    simulation.run_to_end()
    simulation.assert_complete(dispatch)


def test_credit_leaves_out_promises_running_sequences_and_the_watermark() -> None:
    simulation = DecodeSimulation(num_blocks=40, watermark_blocks=3)
    assert simulation.scheduler.load().credit_blocks == 40
    simulation.run("r", PROMPT, choices=(0, 1), sampling=SEEDED)
    simulation.step()
    # 2 full blocks, 2 partial ones, 2 promised, one for each of 2 running, 3 of the watermark.
    assert simulation.scheduler.load().credit_blocks == 40 - 2 - 2 - 2 - 2 - 3
    assert simulation.scheduler.load().credit_sequences == 6


def test_a_result_out_of_order_is_a_bug() -> None:
    simulation = DecodeSimulation()
    simulation.run("r", PROMPT, sampling=LONG)
    plan = simulation.scheduler.plan(0.0)
    assert plan is not None
    result = simulation.runner.launch(plan).result()
    assert simulation.scheduler.plan(0.0) is not None
    with pytest.raises(IntegrityError, match="2 are not applied"):
        simulation.scheduler.plan(0.0)
    simulation.scheduler.apply(result, 0.0)
    with pytest.raises(IntegrityError, match="result of step 0"):
        simulation.scheduler.apply(result, 0.0)


def test_an_unfinished_choice_without_first_token_fails() -> None:
    simulation = DecodeSimulation()
    work = simulation.make_work("r", PROMPT, choices=(0, 1), sampling=SEEDED)
    simulation.admit(work)
    simulation.scheduler.imported(work.key, (), simulation.now)
    simulation.take_output()
    dispatch = simulation.dispatches[work.key]
    assert dispatch.failures == [FailureReason.LEASE_LOST] * 2
    simulation.assert_nothing_left()


def test_an_import_whose_context_is_cached_needs_no_reads() -> None:
    simulation = DecodeSimulation()
    prompt = list(range(8))
    simulation.run("a", prompt, sampling=LONG)
    simulation.run_to_end()
    second = simulation.run("b", prompt, sampling=LONG)
    assert second.num_cached_tokens == len(prompt)
    simulation.run_to_end()
    simulation.assert_complete(second)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    # With a source, the prefill worker samples the first token.
    ("has_source", "index"),
    [(True, 1), (True, 5), (False, 0), (False, 1), (False, 5)],
)
def test_a_sequence_without_a_next_token_fails_alone(
    depth: int, has_source: bool, index: int
) -> None:
    simulation = DecodeSimulation(depth=depth)
    simulation.runner.has_no_token = lambda tokens, at: tokens[0] == 13 and at == index
    bad = simulation.run("bad", [13] * 10, has_source=has_source, choices=(0, 1), sampling=SEEDED)
    good = simulation.run("good", PROMPT, has_source=has_source, sampling=SEEDED)
    simulation.run_to_end()
    assert bad.failures == [FailureReason.INTERNAL] * 2
    assert [len(output) for output in bad.outputs.values()] == [index] * 2
    simulation.assert_complete(good)
    context = np.array([13] * 10, np.int32)
    assert simulation.prefix_cache.num_matching_blocks(context, "") == 0
    simulation.assert_nothing_left()


def test_before_its_confirmation_a_sequence_without_a_token_counts_as_lost() -> None:
    """What was read may be garbage then, and the model is not to blame."""
    simulation = DecodeSimulation()
    simulation.runner.has_no_token = lambda tokens, at: at == 1
    work = simulation.make_work("r", PROMPT, sampling=SEEDED)
    simulation.admit(work)
    simulation.import_all(work.key)
    simulation.step()
    simulation.take_output()
    assert simulation.dispatches[work.key].failures == [FailureReason.LEASE_LOST]
    simulation.end_import(work.key)
    simulation.assert_nothing_left()


def test_a_session_cannot_replace_the_work_of_another() -> None:
    simulation = DecodeSimulation()
    dispatch = simulation.run("r", PROMPT, sampling=SEEDED)
    for attempt in (1, 2):
        work = simulation.make_work("r", PROMPT, attempt=attempt, sampling=SEEDED)
        answer = simulation.admit(work, session=2)
        assert isinstance(answer, Refused)
    assert answer.message == "another session has work here under the name r"
    simulation.run_to_end()
    simulation.assert_complete(dispatch)
    simulation.assert_nothing_left()


def forget_a_holder(roster: Roster) -> None:
    roster.holders.popitem()


def forget_an_import(roster: Roster) -> None:
    roster.imports.clear()


def forget_a_session(roster: Roster) -> None:
    roster._of_session = Groups()


def miscount_prompt_tokens(roster: Roster) -> None:
    roster.prompts.num_tokens += 1


def miscount_stop_ids(roster: Roster) -> None:
    roster.batch._num_rows_by_width.clear()


@pytest.mark.parametrize(
    "mistake",
    [
        forget_a_holder,
        forget_an_import,
        forget_a_session,
        miscount_prompt_tokens,
        miscount_stop_ids,
    ],
)
def test_a_wrong_count_or_index_is_found(mistake: Callable[[Roster], None]) -> None:
    simulation = DecodeSimulation()
    simulation.run("running", PROMPT, sampling=LONG)
    simulation.step()
    assert isinstance(simulation.admit(simulation.make_work("import", PROMPT)), Admitted)
    assert isinstance(
        simulation.admit(simulation.make_work("prompt", PROMPT), has_source=False), Admitted
    )
    simulation.scheduler.check_integrity()
    mistake(simulation.scheduler._roster)
    with pytest.raises(IntegrityError):
        simulation.scheduler.check_integrity()


def test_no_message_costs_more_beside_many_others() -> None:
    few, many = (costs(num_others) for num_others in (20, 400))
    for name, count in many.items():
        assert count < 1.5 * few[name], f"{name}: {count} and {few[name]} opcodes"


def costs(num_others: int) -> dict[str, int]:
    """Count what each call executes beside imports and prompts that wait."""
    simulation = DecodeSimulation(
        num_blocks=20 * num_others + 100,
        max_num_seqs=2 * num_others + 8,
        max_num_batched_tokens=2 * num_others + 16,
        promise_ttl_s=10.0,
    )
    scheduler = simulation.scheduler

    def admit(name: str, *, has_source: bool, session: int) -> AttemptKey:
        work = simulation.make_work(name, PROMPT, sampling=GREEDY)
        scheduler.admit(work, session, has_source=has_source, now=simulation.now)
        return work.key

    late = admit("late", has_source=True, session=9)
    for number in range(num_others):
        admit(f"import-{number}", has_source=True, session=number % 3)
        admit(f"prompt-{number}", has_source=False, session=number % 3)
    simulation.now = 8.0
    wanted = admit("wanted", has_source=True, session=9)
    counts = {
        "admit": num_opcodes(lambda: admit("new", has_source=False, session=9)),
        "load": num_opcodes(scheduler.load),
        "progress": num_opcodes(lambda: scheduler.import_progressed(wanted, 9.0)),
        "expire nothing": num_opcodes(lambda: scheduler.expire(9.0)),
        "cancel": num_opcodes(lambda: scheduler.cancel(late, now=9.0)),
        "end session": num_opcodes(lambda: scheduler.end_session(9, 9.0)),
    }
    scheduler.check_integrity()
    return counts
