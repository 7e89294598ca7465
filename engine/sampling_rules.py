"""What the samplers of all devices have in common: what they refuse, what parameters come to."""

from collections.abc import Sequence

import numpy as np

from paceline.engine.step_plan import SlotStart
from paceline.errors import ConfigError
from paceline.kernels.sampling import MAX_VOCAB_SIZE
from paceline.sampling_params import SamplingParams

SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""Dividing by less gives the same tokens: all but the best are at -inf long before."""


def check_vocab_size(vocab_size: int) -> None:
    """Raise ConfigError if sampling would not be exact."""
    if vocab_size > MAX_VOCAB_SIZE:
        raise ConfigError(
            f"the model has {vocab_size} tokens in its vocabulary; sampling is exact "
            f"for at most {MAX_VOCAB_SIZE}. Serve a model with a smaller vocabulary."
        )


def check_start(start: SlotStart, max_num_slots: int) -> None:
    """Raise ValueError for what no sampler can start."""
    if not 0 <= start.slot < max_num_slots:
        raise ValueError(f"slot {start.slot} is not one of the {max_num_slots} slots")
    if start.sampling.seed is None and not start.sampling.is_greedy:
        raise ValueError(f"slot {start.slot} samples at random and has no seed")


def banned_token_ids(sampling: SamplingParams, eos_token_ids: Sequence[int]) -> list[int]:
    """Return the tokens that may not be sampled at output indices below min_tokens."""
    if not sampling.min_tokens:
        return []
    return sorted({*eos_token_ids, *sampling.stop_token_ids})


def has_penalties(sampling: SamplingParams) -> bool:
    """Whether a token depends on those that occurred."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def not_finite(largest: float) -> str:
    """Say why a row without a largest finite logit has no token."""
    return (
        f"the model gave {largest} as the largest logit, so no token can be chosen. The weights "
        "are damaged, or the model overflows in this dtype: set model.dtype to bfloat16 or float32"
    )


def none_allowed(vocab_size: int) -> str:
    """Say why a row without an allowed token has none."""
    return (
        f"none of the {vocab_size} tokens is allowed: the mask of allowed tokens and min_tokens "
        "leave nothing to sample"
    )
