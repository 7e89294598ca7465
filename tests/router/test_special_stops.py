import re

from paceline.router.special_stops import special_stop_violations, with_special_stops
from paceline.sampling_params import (
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

SPECIAL = {"<eos>": 7, "<|end|>": 8, "<|end|>!": 9}


def say(sampling: SamplingParams) -> str:
    return "\n".join(
        f"{found.field}: {found.description}"
        for found in special_stop_violations(sampling, SPECIAL)
    )


def test_stop_string_that_is_a_special_token_stops_at_the_token_and_stays_a_string() -> None:
    sampling = SamplingParams(stop=("###", "<eos>", "<|end|>!"), stop_token_ids=(9, 3))
    resolved = with_special_stops(sampling, SPECIAL)
    assert resolved.stop_token_ids == (9, 3, 7)
    assert resolved.stop == sampling.stop
    assert not say(sampling)


def test_other_stop_strings_change_nothing() -> None:
    sampling = SamplingParams(stop=("###", "eos>"), stop_token_ids=(3, 3))
    assert with_special_stops(sampling, SPECIAL) is sampling
    assert not say(sampling)


def test_stop_string_around_a_special_token_is_refused_with_the_tokens_id() -> None:
    found = say(SamplingParams(stop=("ok", "\n<|end|>", "<|end|>!!")))
    assert re.search(
        r"sampling\.stop\[1\]: contains '<\|end\|>', .* id, 8, in .*stop_token_ids", found
    )
    assert re.search(r"sampling\.stop\[2\]: contains '<\|end\|>!', .* id, 9", found)
    assert "stop[0]" not in found


def test_special_tokens_count_among_the_stop_token_ids() -> None:
    full = tuple(range(100, 100 + MAX_STOP_TOKEN_IDS))
    assert "65 stop tokens together, at most 64" in say(
        SamplingParams(stop=("<eos>",), stop_token_ids=full)
    )
    assert not say(SamplingParams(stop=("<eos>",), stop_token_ids=(*full[1:], 7)))


def test_strings_that_are_refused_for_their_size_are_not_searched() -> None:
    assert not say(SamplingParams(stop=("a<eos>",) * (MAX_STOP_STRINGS + 1)))
    assert not say(SamplingParams(stop=("a<eos>" + "x" * MAX_STOP_CHARACTERS,)))
