"""Stop strings that are special tokens. Pure.

Special tokens have no text, so a search of the output's text never finds one. A stop string that is
the text of a special token therefore stops at the token itself, too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from paceline.errors import FieldViolation
from paceline.sampling_params import (
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)


def with_special_stops(
    sampling: SamplingParams, special_tokens: Mapping[str, int]
) -> SamplingParams:
    """Add the ids of stop strings that are special tokens to the stop token ids."""
    ids = [special_tokens[string] for string in sampling.stop if string in special_tokens]
    stop_token_ids = tuple(dict.fromkeys((*sampling.stop_token_ids, *ids)))
    return replace(sampling, stop_token_ids=stop_token_ids) if ids else sampling


def special_stop_violations(
    sampling: SamplingParams, special_tokens: Mapping[str, int]
) -> Iterator[FieldViolation]:
    """Yield stop strings that could never be complete, and too many that are special tokens."""
    if len(sampling.stop) > MAX_STOP_STRINGS:
        return  # refused in any case, before we search them all
    for number, string in enumerate(sampling.stop):
        if len(string) > MAX_STOP_CHARACTERS:
            continue  # also refused in any case
        inside = [token for token in special_tokens if token in string]
        if inside and string not in special_tokens:
            token = max(inside, key=len)
            yield FieldViolation(
                f"sampling.stop[{number}]",
                f"contains {token!r}, a special token. Special tokens have no text, so the output "
                f"can never match; send {token!r} by itself, or its id, {special_tokens[token]}, "
                "in sampling.stop_token_ids",
            )
    num_given = len(sampling.stop_token_ids)
    num_ids = len(with_special_stops(sampling, special_tokens).stop_token_ids)
    if num_given <= MAX_STOP_TOKEN_IDS < num_ids:
        yield FieldViolation(
            "sampling.stop",
            f"the special tokens in it and sampling.stop_token_ids are {num_ids} stop tokens "
            f"together, at most {MAX_STOP_TOKEN_IDS} are allowed",
        )
