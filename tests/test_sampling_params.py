"""Every parameter out of its range is named, with the range; nothing is clamped."""

import dataclasses
import math
from typing import Any

import pytest

from paceline.sampling_params import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKENS,
    SamplingParams,
)

VOCAB_SIZE = 1000

# Field: values just inside, values outside.
RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "max_tokens": ([None, 1, MAX_TOKENS], [0, -1, MAX_TOKENS + 1, 10**30]),
    "temperature": ([0.0, 1e-300, 100.0], [-1e-9, 100.1, math.inf, -math.inf, math.nan]),
    "top_k": ([0, 1, VOCAB_SIZE], [-1, VOCAB_SIZE + 1, 10**30]),
    "top_p": ([1e-300, 1.0], [0.0, -0.1, 1.0001, math.inf, math.nan]),
    "min_p": ([0.0, 1.0], [-0.1, 1.1, math.inf, math.nan]),
    "seed": ([None, 0, 2**64 - 1], [-1, 2**64]),
    "n": ([1, MAX_CHOICES], [0, -1, MAX_CHOICES + 1, 10**30]),
    "repetition_penalty": ([0.01, 100.0], [0.0, 1e-40, -1.0, 100.1, math.inf, math.nan]),
    "presence_penalty": ([-2.0, 2.0], [-2.1, 2.1, math.inf, -math.inf, math.nan]),
    "frequency_penalty": ([-2.0, 2.0], [-2.1, 2.1, math.inf, -math.inf, math.nan]),
    "logprobs": ([None, 0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1]),
    "min_tokens": ([0, MAX_TOKENS], [-1, MAX_TOKENS + 1]),
    "stop_token_ids": (
        [(), (0, VOCAB_SIZE - 1), (1,) * MAX_STOP_TOKEN_IDS],
        [(-1,), (VOCAB_SIZE,), (2**32,), (1,) * (MAX_STOP_TOKEN_IDS + 1)],
    ),
    "stop": ([(), ("a",) * MAX_STOP_STRINGS], [("",), ("a",) * (MAX_STOP_STRINGS + 1)]),
    "logit_bias": (
        [(), ((0, -100.0), (VOCAB_SIZE - 1, 100.0)), ((1, 0.0),) * MAX_LOGIT_BIAS],
        [
            ((-1, 0.0),),
            ((VOCAB_SIZE, 0.0),),
            ((1, 100.1),),
            ((1, -math.inf),),
            ((1, math.nan),),
            ((1, 0.0),) * (MAX_LOGIT_BIAS + 1),
        ],
    ),
}


def named(sampling: SamplingParams) -> set[str]:
    return {violation.field.partition("[")[0] for violation in sampling.violations(VOCAB_SIZE)}


@pytest.mark.parametrize(
    ("field", "value"), [(field, v) for field, (good, _) in RANGES.items() for v in good]
)
def test_values_inside_their_range_are_no_violation(field: str, value: Any) -> None:
    assert named(SamplingParams(**{field: value})) == set()


@pytest.mark.parametrize(
    ("field", "value"), [(field, v) for field, (_, bad) in RANGES.items() for v in bad]
)
def test_value_outside_its_range_is_the_one_violation(field: str, value: Any) -> None:
    assert named(SamplingParams(**{field: value})) == {field}


def test_every_field_with_a_range_is_tested() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields - set(RANGES) == {"ignore_eos"}


def test_message_has_the_range_and_the_value() -> None:
    (violation,) = SamplingParams(temperature=-3.0).violations(VOCAB_SIZE)
    assert violation.description == "must be between 0.0 and 100.0, got -3.0"


def test_a_wrong_bias_names_its_token() -> None:
    (violation,) = SamplingParams(logit_bias=((7, 200.0),)).violations(VOCAB_SIZE)
    assert violation.field == "logit_bias[7]"


def test_min_tokens_over_max_tokens_is_a_violation() -> None:
    (violation,) = SamplingParams(min_tokens=5, max_tokens=4).violations(VOCAB_SIZE)
    assert violation.field == "min_tokens"
    assert not named(SamplingParams(min_tokens=4, max_tokens=4))


def test_all_violations_are_named_at_once() -> None:
    assert named(SamplingParams(temperature=-1.0, top_k=-1, n=0)) == {"temperature", "top_k", "n"}


def test_only_temperature_zero_is_greedy() -> None:
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams(temperature=1e-9).is_greedy


def test_a_stop_string_without_end_is_a_violation() -> None:
    (violation,) = SamplingParams(stop=("x" * 1025,)).violations(100)
    assert violation == ("stop[0]", "has 1025 characters, at most 1024 are allowed")
