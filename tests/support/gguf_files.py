"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt
import transformers

F32 = gguf.GGMLQuantizationType.F32

Array = npt.NDArray[Any]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_keys(model: transformers.PreTrainedModel, architecture: str = "llama") -> dict[str, Any]:
    """Return the keys that every converter writes."""
    config: Any = model.config
    own = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    head_dim = getattr(config, "head_dim", None)
    if head_dim not in (None, config.hidden_size // config.num_attention_heads):
        own |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return {f"{architecture}.{name}": value for name, value in own.items()}


def gguf_tensors(
    model: transformers.PreTrainedModel, architecture: str = "llama"
) -> dict[str, Array]:
    """Return the tensors under llama.cpp's names, queries and keys in its order of rows."""
    config: Any = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, kind = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        else:
            prefix = ""
        array = parameter.numpy()
        if architecture == "llama" and NAMES[stem] in heads:
            array = interleaved(array, heads[NAMES[stem]])
        tensors[f"{prefix}{NAMES[stem]}.{kind}"] = np.ascontiguousarray(array)
    return tensors


def interleaved(array: Array, num_heads: int) -> Array:
    """Put the halves of each head's rows into turns, as llama.cpp's converter does."""
    halves = array.reshape(num_heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def write_gguf(
    path: Path,
    keys: Mapping[str, Any],
    tensors: Mapping[str, Array],
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType = F32,
) -> Path:
    """Write a file; `kind` is that of the matrices, which are quantised here."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and tensor.dtype != np.uint8:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor, raw_dtype=kind if tensor.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    architecture: str = "llama",
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array | None] | None = None,
    kind: gguf.GGMLQuantizationType = F32,
) -> Path:
    """Write a model's file, with other keys and tensors; None takes one away."""
    all_keys = gguf_keys(model, architecture) | dict(keys or {})
    all_tensors = gguf_tensors(model, architecture) | dict(tensors or {})
    return write_gguf(
        path,
        {key: value for key, value in all_keys.items() if value is not None},
        {name: tensor for name, tensor in all_tensors.items() if tensor is not None},
        architecture,
        kind,
    )
