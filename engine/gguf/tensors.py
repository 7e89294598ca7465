"""The tensors of a GGUF file, as the engine's: names, shapes, order of rows, values."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import gguf.quants
import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from paceline.engine.gguf.metadata import short
from paceline.engine.gguf.reader import GgufFile, StoredTensor
from paceline.engine.gguf.rope import FREQUENCY_FACTORS
from paceline.engine.model_config import ModelConfig
from paceline.engine.weights import Part, TensorSpec, tensor_specs
from paceline.errors import ConfigError, UnsupportedModelError

BLOCK_ELEMENTS = 1 << 24
"""Elements that are expanded at once: 64 MB of float32, and a few times that in between."""
NUM_NAMES_SHOWN = 5
ROTATED = (".q_proj.", ".k_proj.")

_WHOLE_MODEL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_IN_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Source(NamedTuple):
    """Where a part of one of the engine's tensors comes from."""

    tensor: StoredTensor
    row_order: npt.NDArray[np.intp] | None
    """Rows of the stored tensor in the engine's order; None: as they are."""


def find_sources(file: GgufFile, config: ModelConfig) -> dict[str, list[Source]]:
    """Find every part of every engine tensor, by TensorSpec name.

    Raises ConfigError naming the tensors that are missing, unexpected or of another shape, and
    UnsupportedModelError for a ggml type that cannot be expanded. Nothing is expanded yet.
    """
    specs = list(tensor_specs(config))
    _check_names(file, [part for spec in specs for part in spec.parts])
    for tensor in {tensor.type_id: tensor for tensor in file.tensors.values()}.values():
        _check_type(file, tensor)
    return {spec.name: _sources_of(file, spec, config) for spec in specs}


def expand(file: GgufFile, source: Source, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield the values of a part, in blocks of whole rows that lie one behind the other.

    Raises ConfigError if a value is not finite, or is not in `dtype`.
    """
    tensor, order = source
    length = tensor.shape[-1]
    num_rows = math.prod(tensor.shape) // length
    rows = tensor.data.reshape(num_rows, -1)
    if len(tensor.shape) == 1:
        values = _values(file, tensor, rows, dtype).view(-1)
        yield values if order is None else values[torch.from_numpy(order)]
        return
    step = max(1, BLOCK_ELEMENTS // length)
    for first in range(0, num_rows, step):
        chosen = slice(first, first + step) if order is None else order[first : first + step]
        yield _values(file, tensor, rows[chosen], dtype)


def gguf_name(part: str) -> str:
    """Return what llama.cpp calls a tensor of a folder in Hugging Face's format."""
    stem, kind = part.rsplit(".", 1)
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if layer is None:
        return f"{_WHOLE_MODEL[stem]}.{kind}"
    return f"blk.{layer[1]}.{_IN_A_LAYER[layer[2]]}.{kind}"


def _sources_of(file: GgufFile, spec: TensorSpec, config: ModelConfig) -> list[Source]:
    return [
        Source(file.tensors[gguf_name(part.name)], _row_order(file.architecture, part, config))
        for part in spec.parts
    ]


def _row_order(architecture: str, part: Part, config: ModelConfig) -> npt.NDArray[np.intp] | None:
    """Undo the order of rows that llama.cpp wants for queries and keys of the Llama architecture.

    It rotates neighbouring dimensions of a head with each other, and the engine rotates the first
    half with the second:

        stored   0 h 1 h+1 2 h+2 …      of each head, h = head_dim / 2
        engine   0 1 2 … h h+1 h+2 …
    """
    if architecture != "llama" or not any(name in part.name for name in ROTATED):
        return None
    places = np.arange(part.shape[0]).reshape(-1, config.head_dim // 2, 2)
    return places.swapaxes(1, 2).reshape(-1)


def _values(
    file: GgufFile, tensor: StoredTensor, rows: npt.NDArray[np.uint8], dtype: torch.dtype
) -> torch.Tensor:
    # A copy, since the file may hold the values unaligned.
    expanded = gguf.quants.dequantize(np.array(rows), GGMLQuantizationType(tensor.type_id))
    exact = torch.from_numpy(expanded)
    values = exact.to(dtype)
    if not all(map(math.isfinite, torch.stack(torch.aminmax(values)).tolist())):
        largest = exact.abs().max().item()
        if math.isfinite(largest):
            raise ConfigError(
                f"{file.path} has the value {largest:g} in {tensor.name}, and the largest "
                f"value of {dtype} is {torch.finfo(dtype).max:g}. Set model.dtype to bfloat16 or "
                "float32."
            )
        raise ConfigError(
            f"{file.path} has values in {tensor.name} that are infinite or not numbers. Download "
            "the file again."
        )
    return values


def _check_names(file: GgufFile, parts: Sequence[Part]) -> None:
    said = file.metadata.get("split.tensors.count", len(file.tensors))
    if not isinstance(said, int) or said != len(file.tensors):
        raise ConfigError(
            f"{file.path} has {len(file.tensors)} tensors, and split.tensors.count says "
            f"{short(said)}. "
            "Download the file again, or merge its parts again."
        )
    expected = {gguf_name(part.name): part.shape for part in parts}
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    found.pop(FREQUENCY_FACTORS, None)  # part of the rotary embedding's parameters
    wrong = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:NUM_NAMES_SHOWN])}"
        f"{', …' if len(names) > NUM_NAMES_SHOWN else ''}"
        for what, names in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("unexpected", sorted(found.keys() - expected.keys())),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise ConfigError(
            f"The tensors in {file.path} are not those of a {file.architecture} model with its "
            f"keys: {'; '.join(problems)}. Download the file again, or choose another model."
        )


def _check_type(file: GgufFile, tensor: StoredTensor) -> None:
    kind = GGMLQuantizationType(tensor.type_id)
    _, block_bytes = GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        raise UnsupportedModelError(
            f"{file.path} has the tensor {tensor.name} in the ggml type {kind.name}, which the "
            "package gguf cannot expand. Choose another quantisation, such as Q8_0 or Q4_K_M."
        ) from None
