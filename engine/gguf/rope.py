"""The rotary embedding of a GGUF file, as rope_parameters of a config.json.

llama.cpp defines the arithmetic: frequencies are divided by the tensor rope_freqs.weight, which the
converters of Llama 3.x write, and then scaled linearly or by YaRN.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from paceline.engine.gguf.metadata import Metadata
from paceline.engine.gguf.reader import StoredTensor
from paceline.errors import ConfigError, UnsupportedModelError

FREQUENCY_FACTORS = "rope_freqs.weight"
DEFAULT_THETA = 10000.0
YARN_BETA_FAST = 32.0
YARN_BETA_SLOW = 1.0

_FACTOR, _OLD_FACTOR, _TYPE = "rope.scaling.factor", "rope.scale_linear", "rope.scaling.type"
_ATTENTION_FACTOR = "rope.scaling.attn_factor"


def rope_parameters(
    metadata: Metadata, tensors: Mapping[str, StoredTensor], head_dim: int
) -> dict[str, Any]:
    """Read type, base and scaling of the rotary embedding.

    Raises UnsupportedModelError for what is not implemented, ConfigError for values that contradict
    each other.
    """
    _check_rotates_whole_heads(metadata, head_dim)
    theta = metadata.real("rope.freq_base", DEFAULT_THETA)
    if theta <= 0:
        raise metadata.wrong(metadata.key("rope.freq_base"), theta, "above 0")
    parameters: dict[str, Any] = {"rope_theta": theta, **_scaling(metadata)}
    if FREQUENCY_FACTORS in tensors:
        parameters["frequency_factors"] = _frequency_factors(
            metadata, tensors[FREQUENCY_FACTORS], head_dim
        )
    return parameters


def _check_rotates_whole_heads(metadata: Metadata, head_dim: int) -> None:
    num_rotated = metadata.count("rope.dimension_count", head_dim)
    if num_rotated != head_dim:
        raise metadata.refused(
            metadata.key("rope.dimension_count"),
            f"heads have {head_dim} dimensions, and rotating a part of them is not implemented",
        )


def _scaling(metadata: Metadata) -> dict[str, Any]:
    kind, factor = metadata.text(_TYPE, "linear"), _factor(metadata)
    attention_factor = metadata.real(_ATTENTION_FACTOR, 1.0)
    if kind == "yarn":
        # Above 1, YaRN also sharpens attention (arXiv 2309.00071, section 3.4).
        sharpened = 1.0 + 0.1 * math.log(max(factor, 1.0))
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": metadata.count(
                "rope.scaling.original_context_length", metadata.count("context_length")
            ),
            "beta_fast": metadata.real("rope.scaling.yarn_beta_fast", YARN_BETA_FAST),
            "beta_slow": metadata.real("rope.scaling.yarn_beta_slow", YARN_BETA_SLOW),
            "attention_factor": sharpened * attention_factor,
        }
    if attention_factor != 1.0:
        raise metadata.refused(
            metadata.key(_ATTENTION_FACTOR), f"it is implemented for yarn only, not for {kind}"
        )
    if kind not in ("linear", "none"):
        raise metadata.refused(metadata.key(_TYPE), "implemented are none, linear and yarn")
    if factor == 1.0:
        return {"rope_type": "default"}
    if kind == "none":
        raise metadata.wrong(metadata.key(_FACTOR), factor, "1 where rope.scaling.type is none")
    return {"rope_type": "linear", "factor": factor}


def _factor(metadata: Metadata) -> float:
    """Return the factor by which positions are stretched; a key that says 0 says nothing."""
    factor = metadata.real(_FACTOR, 0.0)
    older = metadata.real(_OLD_FACTOR, 0.0)
    if factor and older and factor != older:
        raise ConfigError(
            f"{metadata.path} says {metadata.key(_FACTOR)} = {factor} and "
            f"{metadata.key(_OLD_FACTOR)} = {older}, and which holds is unclear. Convert the model "
            "again."
        )
    value = factor or older or 1.0
    if value < 0:
        raise metadata.wrong(metadata.key(_FACTOR if factor else _OLD_FACTOR), value, "above 0")
    return value


def _frequency_factors(metadata: Metadata, tensor: StoredTensor, head_dim: int) -> list[float]:
    if metadata.architecture != "llama":
        raise UnsupportedModelError(
            f"{metadata.path} has the tensor {tensor.name}, which is implemented for the "
            f"architecture llama only, not for {metadata.architecture}. Choose another model."
        )
    if tensor.type_id != GGMLQuantizationType.F32 or tensor.shape != (head_dim // 2,):
        raise ConfigError(
            f"{metadata.path} has the tensor {tensor.name} in the ggml type {tensor.type_id} and "
            f"the shape {list(tensor.shape)}, and it must be F32 [{head_dim // 2}]. Convert the "
            "model again."
        )
    factors: list[float] = np.array(tensor.data).view("<f4").tolist()
    wrong = [factor for factor in factors if not (math.isfinite(factor) and factor > 0)]
    if wrong:
        raise ConfigError(
            f"{metadata.path} has {wrong[0]} in {tensor.name}, and all must be finite and above 0. "
            "Download the file again."
        )
    return factors
