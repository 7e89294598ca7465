"""Special tokens that can overlap are found, whatever their length."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.engine.gguf.overlaps import check_overlaps, end_begins
from paceline.errors import UnsupportedModelError


@given(st.text("ab", min_size=1, max_size=12), st.text("ab", min_size=1, max_size=12))
def test_the_ends_that_begin_another_token_are_those_found_by_trying_each(
    text: str, other: str
) -> None:
    tried = any(other.startswith(text[cut:]) for cut in range(1, len(text)))
    assert end_begins(text, other) is tried


@pytest.mark.parametrize(
    ("texts", "overlap"),
    [
        (["<a>", "<b>"], False),
        (["<x<", "<y>"], True),
        (["<x<", "<"], False),  # the longer one is found first by both
        (["<<", "<<<"], False),  # runs of one character
        (["<<", "<<a"], True),
        (["<x<"], False),  # what overlaps itself is found from the left by both
        (["aé", "éb"], True),
        (["abé", "éb"], False),  # fewer bytes
    ],
)
def test_tokens_that_llama_cpp_may_find_differently_are_refused(
    texts: list[str], overlap: bool
) -> None:
    if not overlap:
        check_overlaps(texts)
        return
    with pytest.raises(UnsupportedModelError, match="can overlap in a text"):
        check_overlaps(texts)


def test_long_tokens_are_checked_in_linear_time_and_not_repeated_in_the_message() -> None:
    texts = ["<" * 50_000 + end for end in "xy"]
    started_s = time.process_time()
    check_overlaps(["a" * 100_000 + "b", "c" * 100_000 + "d", *texts])
    with pytest.raises(UnsupportedModelError) as refusal:
        check_overlaps(["a" * 10_000 + "<", *texts])
    assert time.process_time() - started_s < 2
    assert len(str(refusal.value)) < 500
