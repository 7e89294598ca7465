import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opcodes import num_opcodes

from paceline.engine.chunking import Chunk, PrefillProgress, PromptQueue
from paceline.errors import IntegrityError


def make_prompt(num_tokens: int, num_planned: int = 0, arrived_s: float = 0.0) -> PrefillProgress:
    return PrefillProgress(num_tokens, num_planned, arrived_s)


def queue_of(*prompts: PrefillProgress, age_bound_s: float = 1.0) -> PromptQueue[PrefillProgress]:
    queue: PromptQueue[PrefillProgress] = PromptQueue(age_bound_s)
    for prompt in prompts:
        queue.add(prompt)
    return queue


def test_several_prompts_share_the_budget_of_a_step() -> None:
    short, long = make_prompt(20), make_prompt(500)
    chunks = queue_of(long, short).plan(64, now=0.0)
    assert chunks == [Chunk(short, 0, 20), Chunk(long, 0, 44)]
    assert (short.num_planned, long.num_planned) == (20, 44)


def test_what_remains_counts_and_not_the_whole_length() -> None:
    nearly_done, fresh = make_prompt(500, num_planned=490), make_prompt(100)
    chunks = queue_of(fresh, nearly_done).plan(16, now=0.0)
    assert chunks == [Chunk(nearly_done, 490, 10), Chunk(fresh, 0, 6)]


def test_equally_short_prompts_go_by_arrival() -> None:
    late, early = make_prompt(50, arrived_s=0.2), make_prompt(50, arrived_s=0.1)
    chunks = queue_of(late, early).plan(50, now=0.3)
    assert [chunk.prompt for chunk in chunks] == [early]


def test_prompts_over_the_age_bound_go_first_oldest_first() -> None:
    short = make_prompt(10, arrived_s=9.5)
    old = make_prompt(300, arrived_s=2.0)
    oldest = make_prompt(400, arrived_s=1.0)
    chunks = queue_of(short, old, oldest, age_bound_s=5.0).plan(1000, now=10.0)
    assert [chunk.prompt for chunk in chunks] == [oldest, old, short]


def test_age_bound_of_zero_is_first_come_first_served() -> None:
    prompts = [make_prompt(500 - 100 * i, arrived_s=float(i)) for i in range(4)]
    chunks = queue_of(*reversed(prompts), age_bound_s=0.0).plan(10_000, now=10.0)
    assert [chunk.prompt for chunk in chunks] == prompts


def test_planned_prompts_leave_and_empty_budgets_give_no_chunk() -> None:
    queue = queue_of(make_prompt(10))
    assert queue.plan(0, now=0.0) == []
    assert len(queue.plan(64, now=0.0)) == 1
    assert (len(queue), queue.num_tokens) == (0, 0)
    assert queue.plan(64, now=0.0) == []


def test_a_prompt_is_added_once_and_with_tokens_to_plan() -> None:
    prompt = make_prompt(10)
    queue = queue_of(prompt)
    for wrong in (prompt, make_prompt(10, num_planned=10)):
        with pytest.raises(IntegrityError, match="unplanned tokens was added"):
            queue.add(wrong)


def expected_chunks(
    prompts: list[PrefillProgress], token_budget: int, now: float, age_bound_s: float
) -> list[Chunk[PrefillProgress]]:
    """Sort all prompts."""

    def urgency(prompt: PrefillProgress) -> tuple[bool, float, float]:
        if prompt.arrived_s < now - age_bound_s:
            return (False, prompt.arrived_s, 0.0)
        return (True, prompt.num_unplanned, prompt.arrived_s)

    chunks = []
    for prompt in sorted(prompts, key=urgency):
        num_tokens = min(prompt.num_unplanned, token_budget)
        if num_tokens:
            chunks.append(Chunk(prompt, prompt.num_planned, num_tokens))
            token_budget -= num_tokens
    return chunks


arrivals = st.tuples(st.integers(1, 600), st.integers(0, 8))
changes = st.lists(
    st.one_of(
        st.tuples(st.just("add"), arrivals),
        st.tuples(st.just("discard"), st.integers(0, 100)),
        st.tuples(st.just("plan"), st.integers(0, 512)),
    ),
    max_size=60,
)


@settings(max_examples=50)
@given(changes=changes, age_bound_s=st.integers(0, 10), is_slow=st.booleans())
def test_chunks_are_those_of_all_prompts_sorted(
    changes: list[tuple[str, object]], age_bound_s: float, is_slow: bool
) -> None:
    queue: PromptQueue[PrefillProgress] = PromptQueue(age_bound_s)
    prompts: list[PrefillProgress] = []
    now = 8.0
    for change, argument in changes:
        match change, argument:
            case "add", (int(num_tokens), int(arrived_s)):
                prompts.append(make_prompt(num_tokens, arrived_s=arrived_s))
                queue.add(prompts[-1])
            case "discard", int(number) if prompts:
                queue.discard(prompts.pop(number % len(prompts)))
            case "plan", int(budget):
                now += is_slow
                expected = expected_chunks(prompts, budget, now, age_bound_s)
                assert queue.plan(budget, now) == expected
                prompts = [prompt for prompt in prompts if prompt.num_unplanned]
        queue.check_integrity(prompts)


def test_a_step_costs_what_it_plans_however_many_prompts_wait() -> None:
    few, many = (costs(num_waiting) for num_waiting in (30, 3000))
    for name, count in many.items():
        assert count < 2 * few[name], f"{name}: {count} and {few[name]} opcodes"


def costs(num_waiting: int) -> dict[str, int]:
    """Count what each call executes beside waiting prompts, half of them overdue."""
    waiting = [make_prompt(700 + n % 7, arrived_s=float(n % 20)) for n in range(num_waiting)]
    queue = queue_of(*waiting, age_bound_s=10.0)
    added = make_prompt(300, arrived_s=20.0)
    return {
        "add": num_opcodes(lambda: queue.add(added)),
        "plan": num_opcodes(lambda: queue.plan(2000, 20.0)),
        "plan again": num_opcodes(lambda: queue.plan(2000, 20.0)),
        "count": num_opcodes(lambda: queue.num_tokens),
        "discard": num_opcodes(lambda: queue.discard(added)),
    }
