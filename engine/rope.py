"""Frequencies of rotary position embeddings, with the ways to stretch them that we implement."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from paceline.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch  # late, because routers read a model's configuration and do without torch


class RopeType(Enum):
    """How frequencies differ from the original ones. The values are those of config.json."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of a model. Fields that a type does not use keep their defaults."""

    theta: float
    type: RopeType = RopeType.DEFAULT
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Multiplies cos and sin."""
    frequency_factors: tuple[float, ...] = ()
    """Divide the original frequencies, one each, before they are scaled; empty: by 1."""


_KEYS = {
    RopeType.DEFAULT: {"frequency_factors"},
    RopeType.LINEAR: {"factor", "frequency_factors"},
    RopeType.LLAMA3: {
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    },
    RopeType.YARN: {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "frequency_factors",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def read_rope(values: Mapping[str, object], theta: float, max_position: int) -> RopeConfig:
    """Read `rope_parameters` (or the older `rope_scaling`) of a config.json.

    Raises UnsupportedModelError for a type or a key that is not implemented, naming it.
    """
    given = {key: value for key, value in values.items() if value is not None}
    rope_type = _type(given)
    if _number(given, "partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"The model sets partial_rotary_factor to {given['partial_rotary_factor']}: rotating a "
            "part of each head is not implemented. Choose another model."
        )
    theta = _number(given, "rope_theta", theta)
    given = _own_keys(given, rope_type)
    _check_keys(given, rope_type)
    factor = _number(given, "factor", 1.0)
    low, high = _number(given, "low_freq_factor", 1.0), _number(given, "high_freq_factor", 4.0)
    if low >= high:
        raise UnsupportedModelError(
            f"The model's rope parameters have a low_freq_factor of {low} and a high_freq_factor "
            f"of {high}; the second must be larger. Correct its config.json."
        )
    return RopeConfig(
        theta=theta,
        type=rope_type,
        factor=factor,
        original_max_position=int(
            _number(given, "original_max_position_embeddings", float(max_position))
        ),
        low_freq_factor=low,
        high_freq_factor=high,
        beta_fast=_number(given, "beta_fast", 32.0),
        beta_slow=_number(given, "beta_slow", 1.0),
        truncate=bool(given.get("truncate", True)),
        attention_factor=_yarn_attention(given, factor) if rope_type is RopeType.YARN else 1.0,
        frequency_factors=_frequency_factors(given),
    )


def _type(given: Mapping[str, object]) -> RopeType:
    older_name = given.get("type")
    name = given.get("rope_type", older_name or "default")
    if older_name not in (None, name):
        raise UnsupportedModelError(
            f"The model's rope parameters say rope_type {name!r} and type {older_name!r}. "
            "Correct its config.json."
        )
    try:
        return RopeType(name)
    except ValueError:
        known = ", ".join(member.value for member in RopeType)
        raise UnsupportedModelError(
            f"The model's rope_type is {name!r}, and the types implemented are {known}. "
            "Choose a model with one of these."
        ) from None


def _own_keys(given: Mapping[str, object], rope_type: RopeType) -> dict[str, object]:
    """Return the keys by which a type computes: without those of any type, or that say nothing."""
    # finetuned: how the model was trained, not how it computes.
    others = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
    if rope_type in (RopeType.DEFAULT, RopeType.LINEAR):
        others.add("original_max_position_embeddings")
    if rope_type is RopeType.DEFAULT and given.get("factor") == 1.0:
        others.add("factor")
    return {key: value for key, value in given.items() if key not in others}


def _check_keys(given: Mapping[str, object], rope_type: RopeType) -> None:
    """Refuse keys that the type does not know, and a type whose keys are not all there."""
    unknown = sorted(set(given) - _KEYS[rope_type])
    if unknown:
        raise UnsupportedModelError(
            f"The model's rope parameters have {', '.join(unknown)}, which rope_type "
            f"{rope_type.value!r} does not know here; ignoring them could change its output. "
            "Choose another model."
        )
    missing = sorted(
        {"factor", "low_freq_factor", "high_freq_factor"} & _KEYS[rope_type] - set(given)
    )
    if missing:
        raise UnsupportedModelError(
            f"The model's rope_type is {rope_type.value!r}, and its parameters lack "
            f"{', '.join(missing)}. Correct its config.json."
        )
    if not isinstance(given.get("truncate", True), bool):
        raise UnsupportedModelError(
            f"The model's rope parameter truncate is {given['truncate']!r}, neither true nor "
            "false. Correct its config.json."
        )


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> "torch.Tensor":
    """Return the angle per position of each pair of dimensions, float32 [head_dim / 2]."""
    import torch

    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.frequency_factors:
        plain = plain / torch.tensor(rope.frequency_factors, dtype=torch.float32)
    match rope.type:
        case RopeType.DEFAULT:
            return plain
        case RopeType.LINEAR:
            return plain / rope.factor
        case RopeType.LLAMA3:
            return _llama3(plain, rope)
        case RopeType.YARN:
            return _yarn(plain, rope, head_dim)


def _llama3(plain: "torch.Tensor", rope: RopeConfig) -> "torch.Tensor":
    """Stretch waves longer than the trained context, keep short ones, blend those between."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = share.clamp(0.0, 1.0)
    return share * plain + (1 - share) * plain / rope.factor


def _yarn(plain: "torch.Tensor", rope: RopeConfig, head_dim: int) -> "torch.Tensor":
    """YaRN (arXiv 2309.00071): a ramp over dimensions from kept to stretched frequencies."""
    import torch

    def dimension_of(turns: float) -> float:
        span = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _yarn_attention(given: Mapping[str, object], factor: float) -> float:
    if "attention_factor" in given:
        return _number(given, "attention_factor", 1.0)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(_number(given, "mscale", 1.0)) / scale(_number(given, "mscale_all_dim", 1.0))
    return scale(1.0)


def _frequency_factors(given: Mapping[str, object]) -> tuple[float, ...]:
    """Read a key of our own, which the conversion of GGUF files writes."""
    values = given.get("frequency_factors", [])
    if not isinstance(values, list) or not all(
        isinstance(v, int | float) and v > 0 for v in values
    ):
        raise UnsupportedModelError(
            "The model's rope parameter frequency_factors must be a list of numbers above 0. "
            "Correct its config.json."
        )
    return tuple(float(value) for value in values)


def _number(given: Mapping[str, object], key: str, default: float) -> float:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UnsupportedModelError(
            f"The model's rope parameter {key} is {value!r}, not a number above 0. Correct its "
            "config.json."
        )
    return float(value)
