import math
from pathlib import Path

import pytest

from paceline.errors import InvalidRequestError, ModelNotFoundError
from paceline.internal.v1 import worker_pb2
from paceline.router.message_size import MAX_WORK_TOKENS, OTHER_BYTES, TOKEN_ID_BYTES
from paceline.router.model import ServedModel
from paceline.router.settings import RouterSettings
from paceline.router.validate import (
    MAX_REQUEST_ID_CHARS,
    check_model,
    check_prompt_size,
    envelope_violations,
    prompt_violations,
    sampling_violations,
)
from paceline.sampling_params import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKENS,
    SamplingParams,
)
from paceline.wire import sampling_to_proto

MODEL = ServedModel("tiny", 100, 50, (2,), Path())


def say(violations: object) -> str:
    return "; ".join(f"{v.field}: {v.description}" for v in violations)  # type: ignore[attr-defined]


def test_unknown_model_is_named_with_the_served_one() -> None:
    check_model("", MODEL)
    check_model("tiny", MODEL)
    with pytest.raises(ModelNotFoundError, match=r"'gpt' is not served here.*'tiny'"):
        check_model("gpt", MODEL)


@pytest.mark.parametrize("timeout_s", [-1.0, math.nan, math.inf, 1e9])
def test_impossible_timeouts_are_refused(timeout_s: float) -> None:
    text = say(envelope_violations("", timeout_s, RouterSettings()))
    assert text.startswith("timeout_s: must be between 0 and 86400")


def test_request_id_must_be_short_and_printable() -> None:
    settings = RouterSettings()
    assert "has 129 characters" in say(envelope_violations("x" * 129, 0, settings))
    assert "cannot be printed" in say(envelope_violations("a\nb", 0, settings))
    assert not list(envelope_violations("x" * 128, 0, settings))


def test_every_wrong_parameter_is_named_at_once() -> None:
    sampling = SamplingParams(
        temperature=math.nan, top_p=2.0, n=1000, max_tokens=0, logit_bias=((70, 1.0),)
    )
    fields = [violation.field for violation in sampling_violations(sampling, MODEL)]
    assert fields == [
        "sampling.max_tokens",
        "sampling.temperature",
        "sampling.n",
        "sampling.top_p",
        "sampling.logit_bias",
    ]


def test_empty_prompt_is_refused() -> None:
    assert say(prompt_violations([], SamplingParams(), MODEL, "text")).startswith(
        "text: the prompt"
    )


def test_token_ids_out_of_range_are_counted_and_the_first_is_shown() -> None:
    text = say(prompt_violations([1, 50, 99], SamplingParams(), MODEL, "token_ids"))
    assert "from 0 to 49; 2 of the prompt's are larger, the first is 50 at position 1" in text


def test_prompt_longer_than_the_model_is_refused_with_both_numbers_and_the_setting() -> None:
    assert not list(prompt_violations([1] * 99, SamplingParams(), MODEL, "text"))
    check_prompt_size(99, MODEL, "text")
    with pytest.raises(InvalidRequestError, match=r"has 100 tokens, and .* is 100 for prompt"):
        check_prompt_size(100, MODEL, "text")


def test_max_tokens_beyond_the_models_length_is_refused_with_what_is_left() -> None:
    text = say(prompt_violations([1] * 90, SamplingParams(max_tokens=11), MODEL, "text"))
    assert (
        "are 101 together, and model.max_model_len is 100; lower max_tokens to at most 10" in text
    )
    assert not list(prompt_violations([1] * 90, SamplingParams(max_tokens=10), MODEL, "text"))


def test_request_that_could_outgrow_a_message_to_a_worker_is_refused() -> None:
    model = ServedModel("long", 2**30, 50, (2,), Path())
    most = MAX_WORK_TOKENS
    assert not list(prompt_violations([1], SamplingParams(max_tokens=most), model, "text"))
    text = say(prompt_violations([1], SamplingParams(max_tokens=most + 1), model, "text"))
    assert f"may be {most + 1} tokens" in text
    assert f"carry at most {most}" in text


def test_everything_beside_the_tokens_fits_into_what_a_message_leaves_for_it() -> None:
    sampling = SamplingParams(
        max_tokens=MAX_TOKENS,
        seed=2**64 - 1,
        n=MAX_CHOICES,
        logit_bias=tuple((2**31 - 1 - i, 99.9) for i in range(MAX_LOGIT_BIAS)),
        stop_token_ids=(2**31 - 1,) * MAX_STOP_TOKEN_IDS,
        stop=("\U0001f600" * MAX_STOP_CHARACTERS,) * MAX_STOP_STRINGS,
    )
    assert not list(sampling.violations(2**31))
    work = worker_pb2.Work(
        request_id="\U0001f600" * MAX_REQUEST_ID_CHARS,
        choices=range(MAX_CHOICES),
        stream_ids=[2**32 - 1] * MAX_CHOICES,
        prompt_token_ids=[2**31 - 1] * 1000,
        sampling=sampling_to_proto(sampling),
    )
    assert work.ByteSize() < OTHER_BYTES / 2 + 1000 * TOKEN_ID_BYTES
