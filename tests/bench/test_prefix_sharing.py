"""What a prefix cache may save of a load, and when it saved more."""

from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.bench.load import Vocabulary, fixed_lengths
from paceline.bench.prefix_sharing import cache_warning, num_shared_tokens
from paceline.bench.record import Limits, LoadSummary, RequestRecord, summarize


def test_tokens_with_which_an_earlier_prompt_begins_are_counted() -> None:
    prompt = list(range(40))
    assert num_shared_tokens([prompt]) == 0
    assert num_shared_tokens([prompt, prompt]) == 40
    assert num_shared_tokens([prompt, prompt[:20], [99, *prompt]]) == 20
    assert num_shared_tokens([prompt, [*prompt[:16], 99, *prompt[17:]]]) == 16
    assert num_shared_tokens([prompt[20:], prompt]) == 0


@given(st.lists(st.lists(st.integers(0, 1), max_size=6), max_size=8))
def test_the_earlier_prompt_that_shares_most_counts(prompts: list[list[int]]) -> None:
    def most(prompt: list[int], earlier: list[list[int]]) -> int:
        shared = (
            takewhile(lambda pair: pair[0] == pair[1], zip(prompt, other, strict=False))
            for other in earlier
        )
        return max((sum(1 for _ in pairs) for pairs in shared), default=0)

    expected = sum(most(prompt, prompts[:place]) for place, prompt in enumerate(prompts))
    assert num_shared_tokens(prompts) == expected


def test_what_a_cache_of_small_blocks_saves_is_expected() -> None:
    """With kv.block_tokens 4, more than the multiple of 16 is cached."""
    prompts = [[*range(30), 100 + number] for number in range(10)]
    num_cached = 9 * 28
    assert num_cached <= num_shared_tokens(prompts)
    assert cache_warning(summary_of(num_cached, num_shared_tokens(prompts))) is None


def test_made_up_prompts_share_next_to_nothing() -> None:
    planned = fixed_lengths(100, 64, 1, Vocabulary(1000, frozenset()), seed=0)
    assert num_shared_tokens(request.prompt for request in planned) < 0.002 * 100 * 64


def summary_of(num_cached: int, num_shared: int) -> LoadSummary:
    record = RequestRecord("r", 1000, 1, 0.0, token_times_s=[1.0], cached_tokens=num_cached)
    return summarize([record], Limits(), num_shared_tokens=num_shared)


@pytest.mark.parametrize(("num_cached", "num_shared"), [(0, 0), (20, 0), (500, 480), (0, 900)])
def test_what_the_load_repeats_itself_is_no_reason_to_warn(
    num_cached: int, num_shared: int
) -> None:
    assert cache_warning(summary_of(num_cached, num_shared)) is None


def test_prompts_that_the_deployment_knew_before_are_named() -> None:
    warning = cache_warning(summary_of(960, 0))
    assert warning is not None
    assert warning.startswith("96.0% of prompt tokens were cached")
    assert "Leave out --seed" in warning
