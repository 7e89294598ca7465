"""What a prefix cache may save of a load, and when it saved more."""

import pytest

from paceline.bench.load import Vocabulary, fixed_lengths
from paceline.bench.prefix_sharing import cache_warning, num_shared_tokens
from paceline.bench.record import Limits, LoadSummary, RequestRecord, summarize


def test_prefixes_that_earlier_prompts_begin_with_are_counted_in_whole_blocks() -> None:
    prompt = list(range(40))
    assert num_shared_tokens([prompt]) == 0
    assert num_shared_tokens([prompt, prompt]) == 32
    assert num_shared_tokens([prompt, prompt[:20], [1, *prompt]]) == 16
    changed = [*prompt[:16], 99, *prompt[17:]]
    assert num_shared_tokens([prompt, changed]) == 16


def test_a_block_counts_only_behind_the_same_blocks() -> None:
    first, second = list(range(16)), list(range(100, 116))
    assert num_shared_tokens([first + second, second + first]) == 0


def test_made_up_prompts_share_nothing() -> None:
    planned = fixed_lengths(100, 64, 1, Vocabulary(1000, frozenset()), seed=0)
    assert num_shared_tokens(request.prompt for request in planned) == 0


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
