"""Loads are the same for the same seed, and follow their distribution or trace."""

import itertools
from pathlib import Path
from statistics import mean

import pytest

from paceline.bench.cli import DEFAULT_TRACE
from paceline.bench.load import Vocabulary, fixed_lengths, poisson_arrivals, read_trace
from paceline.errors import ConfigError

VOCABULARY = Vocabulary(100, frozenset({0, 1}))


def read(path: Path, **changes: object) -> list:  # type: ignore[type-arg]
    options = {
        "speed": 1.0,
        "num_requests": None,
        "max_input_tokens": 10_000,
        "max_output_tokens": 10_000,
        "seed": 0,
    }
    return read_trace(path, VOCABULARY, **(options | changes))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_load() -> None:
    once = poisson_arrivals(fixed_lengths(20, 30, 5, VOCABULARY, seed=3), 2.0, seed=4)
    again = poisson_arrivals(fixed_lengths(20, 30, 5, VOCABULARY, seed=3), 2.0, seed=4)
    assert once == again
    assert once != poisson_arrivals(fixed_lengths(20, 30, 5, VOCABULARY, seed=3), 2.0, seed=5)


def test_prompts_avoid_reserved_tokens_and_differ() -> None:
    planned = fixed_lengths(50, 40, 5, VOCABULARY, seed=0)
    assert all(len(request.prompt) == 40 for request in planned)
    assert not {0, 1} & {token for request in planned for token in request.prompt}
    assert len({request.prompt for request in planned}) == 50


def test_poisson_gaps_have_the_mean_of_the_rate() -> None:
    planned = poisson_arrivals(fixed_lengths(4000, 1, 1, VOCABULARY, seed=0), 8.0, seed=1)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(planned)]
    assert mean(gaps) == pytest.approx(1 / 8, rel=0.06)
    assert mean(gap**2 for gap in gaps) == pytest.approx(2 / 64, rel=0.15)


def test_a_trace_is_replayed_at_its_times_and_lengths(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"timestamp": 1000, "input_length": 7, "output_length": 3}\n'
        '{"timestamp": 3000, "input_length": 50, "output_length": 90}\n'
    )
    first, second = read(trace, speed=2.0, max_input_tokens=20, max_output_tokens=40)
    assert (first.at_s, len(first.prompt), first.max_tokens) == (0.0, 7, 3)
    assert (second.at_s, len(second.prompt), second.max_tokens) == (1.0, 20, 40)


def test_equal_hash_ids_give_equal_blocks(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"timestamp": 0, "input_length": 1030, "output_length": 1, "hash_ids": [5, 6, 7]}\n'
        '{"timestamp": 0, "input_length": 1030, "output_length": 1, "hash_ids": [5, 8, 9]}\n'
    )
    first, second = read(trace)
    assert len(first.prompt) == len(second.prompt) == 1030
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:1024] != second.prompt[512:1024]
    assert read(trace)[0].prompt == first.prompt
    assert read(trace, seed=1)[0].prompt[:512] != first.prompt[:512]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"timestamp": 0, "input_length": 7, "output_length": 3}\n{"input_length": 1}\n'
    )
    with pytest.raises(ConfigError, match=r"trace\.jsonl:2: .*timestamp"):
        read(trace)


@pytest.mark.parametrize(
    "line",
    [
        b'{"timestamp": NaN, "input_length": 7, "output_length": 3}',
        b'{"timestamp": Infinity, "input_length": 7, "output_length": 3}',
        b'{"timestamp": 0, "input_length": Infinity, "output_length": 3}',
        b'{"timestamp": 0, "input_length": 7, "output_length": 3, "hash_ids": null}',
        b'{"timestamp": 0, "input_length": 7, "output_length": 3, "hash_ids": 5}',
        b'{"timestamp": "\xff"}',
        b"[1]",
    ],
)
def test_a_value_that_no_request_can_have_is_named(line: bytes, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes(line)
    with pytest.raises(ConfigError, match=r"trace\.jsonl:1: "):
        read(trace)


def test_the_committed_trace_can_be_read() -> None:
    planned = read(DEFAULT_TRACE, max_input_tokens=2000)
    assert len(planned) == 200
    assert planned[0].at_s == 0.0
    assert max(len(request.prompt) for request in planned) == 2000
