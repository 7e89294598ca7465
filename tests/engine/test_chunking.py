from hypothesis import given
from hypothesis import strategies as st

from paceline.engine.chunking import PrefillProgress, plan_chunks


def make_prompt(num_tokens: int, num_planned: int = 0, arrived_s: float = 0.0) -> PrefillProgress:
    return PrefillProgress(num_tokens, num_planned, arrived_s)


def test_several_prompts_share_the_budget_of_a_step() -> None:
    short, long = make_prompt(20), make_prompt(500)
    chunks = plan_chunks([long, short], 64, now=0.0, age_bound_s=1.0)
    assert [(chunk.prompt, chunk.num_tokens) for chunk in chunks] == [(short, 20), (long, 44)]


def test_what_remains_counts_and_not_the_whole_length() -> None:
    nearly_done, fresh = make_prompt(500, num_planned=490), make_prompt(100)
    chunks = plan_chunks([fresh, nearly_done], 16, now=0.0, age_bound_s=1.0)
    assert [(chunk.prompt, chunk.num_tokens) for chunk in chunks] == [(nearly_done, 10), (fresh, 6)]


def test_equally_short_prompts_go_by_arrival() -> None:
    late, early = make_prompt(50, arrived_s=0.2), make_prompt(50, arrived_s=0.1)
    chunks = plan_chunks([late, early], 50, now=0.3, age_bound_s=1.0)
    assert [chunk.prompt for chunk in chunks] == [early]


def test_prompts_over_the_age_bound_go_first_oldest_first() -> None:
    short = make_prompt(10, arrived_s=9.5)
    old = make_prompt(300, arrived_s=2.0)
    oldest = make_prompt(400, arrived_s=1.0)
    chunks = plan_chunks([short, old, oldest], 1000, now=10.0, age_bound_s=5.0)
    assert [chunk.prompt for chunk in chunks] == [oldest, old, short]


def test_age_bound_of_zero_is_first_come_first_served() -> None:
    prompts = [make_prompt(500 - 100 * i, arrived_s=float(i)) for i in range(4)]
    chunks = plan_chunks(reversed(prompts), 10_000, now=10.0, age_bound_s=0.0)
    assert [chunk.prompt for chunk in chunks] == prompts


def test_planned_prompts_and_empty_budgets_give_no_chunk() -> None:
    assert plan_chunks([make_prompt(10, num_planned=10)], 64, now=0.0, age_bound_s=1.0) == []
    assert plan_chunks([make_prompt(10)], 0, now=0.0, age_bound_s=1.0) == []


@given(
    sizes=st.lists(st.tuples(st.integers(1, 600), st.floats(0, 10)), max_size=20),
    budget=st.integers(1, 512),
    age_bound_s=st.floats(0, 10),
)
def test_chunks_use_the_whole_budget_and_only_the_last_ends_early(
    sizes: list[tuple[int, float]], budget: int, age_bound_s: float
) -> None:
    prompts = [make_prompt(size, arrived_s=arrived_s) for size, arrived_s in sizes]
    chunks = plan_chunks(prompts, budget, now=10.0, age_bound_s=age_bound_s)
    assert sum(c.num_tokens for c in chunks) == min(budget, sum(p.num_tokens for p in prompts))
    assert all(c.num_tokens == c.prompt.num_unplanned for c in chunks[:-1])
    assert all(c.num_tokens >= 1 for c in chunks)
    assert len({id(c.prompt) for c in chunks}) == len(chunks)
