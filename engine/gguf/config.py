"""The config.json of a GGUF file's model."""

import math
from collections.abc import Mapping
from typing import Any

from paceline.engine.gguf.keys import check_keys
from paceline.engine.gguf.metadata import Metadata
from paceline.engine.gguf.reader import GgufFile, StoredTensor
from paceline.engine.gguf.rope import rope_parameters
from paceline.errors import ConfigError

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
TOKENS = "tokenizer.ggml.tokens"


def describe_model(file: GgufFile) -> dict[str, Any]:
    """Return the config.json of a file's model, all but the dtype.

    Takes less than a second for a file of any size.

    Raises UnsupportedModelError for keys and shapes that are not implemented, ConfigError for
    values that are missing or contradict each other.
    """
    metadata = Metadata.of(file)
    check_keys(metadata)
    tensors = file.tensors
    hidden_size = metadata.count("embedding_length")
    num_heads = metadata.count("attention.head_count")
    head_dim = _head_dim(metadata, hidden_size, num_heads)
    _check_attention(metadata, head_dim)
    values = {
        "architectures": [CLASSES[metadata.architecture]],
        "model_type": metadata.architecture,
        "vocab_size": _vocab_size(metadata, tensors),
        "hidden_size": hidden_size,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": _num_layers(metadata, tensors),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.count("context_length"),
        "rope_parameters": rope_parameters(metadata, tensors, head_dim),
        "tie_word_embeddings": HEAD not in tensors,
    }
    return values | _biases(metadata.architecture, tensors)


def _num_layers(metadata: Metadata, tensors: Mapping[str, StoredTensor]) -> int:
    num_layers = metadata.count("block_count")
    if num_layers > len(tensors):  # before anyone lists the tensors of billions of layers
        raise metadata.wrong(
            metadata.key("block_count"), num_layers, f"below the {len(tensors)} of its tensors"
        )
    return num_layers


def _head_dim(metadata: Metadata, hidden_size: int, num_heads: int) -> int:
    key_length = metadata.key("attention.key_length")
    if key_length not in metadata.values and hidden_size % num_heads:
        raise metadata.wrong(
            metadata.key("attention.head_count"),
            num_heads,
            f"a divisor of the {hidden_size} of embedding_length, because there is no {key_length}",
        )
    head_dim = metadata.count("attention.key_length", hidden_size // num_heads)
    value_length = metadata.count("attention.value_length", head_dim)
    if value_length != head_dim:
        raise metadata.refused(
            metadata.key("attention.value_length"),
            f"keys have {head_dim} dimensions a head, and values of another size are not "
            "implemented",
        )
    return head_dim


def _check_attention(metadata: Metadata, head_dim: int) -> None:
    """Refuse what would change how the heads attend."""
    usual = head_dim**-0.5
    if not math.isclose(metadata.real("attention.scale", usual), usual, rel_tol=1e-5):
        raise metadata.refused(
            metadata.key("attention.scale"),
            f"only 1 / sqrt({head_dim}), the usual one, is implemented",
        )
    window = metadata.count("attention.sliding_window", 0, minimum=0)
    if 0 < window < metadata.count("context_length"):
        raise metadata.refused(
            metadata.key("attention.sliding_window"),
            f"a window shorter than the context of {metadata.count('context_length')} tokens is "
            "implemented for safetensors folders only",
        )


def _vocab_size(metadata: Metadata, tensors: Mapping[str, StoredTensor]) -> int:
    """Return the number of the embedding's rows, which the token list must match."""
    if EMBEDDING not in tensors:
        raise ConfigError(
            f"{metadata.path} has no tensor {EMBEDDING}, without which there is no model. Download "
            "the file again, or convert the model again."
        )
    num_rows = tensors[EMBEDDING].shape[0]
    tokens = metadata.texts(TOKENS)
    said = {
        metadata.key("vocab_size"): metadata.count("vocab_size", num_rows),
        f"the length of {TOKENS}": num_rows if tokens is None else len(tokens),
    }
    for what, number in said.items():
        if number != num_rows:
            raise ConfigError(
                f"{metadata.path} has {num_rows} rows in {EMBEDDING}, and {what} is {number}: each "
                "token needs one row. Convert the model again."
            )
    return num_rows


def _biases(architecture: str, tensors: Mapping[str, StoredTensor]) -> dict[str, bool]:
    """Say which products have a bias. A bias that only some layers have is missed later.

    What an architecture never has is not said: the file's tensor is then unexpected.
    """

    def has(*names: str) -> bool:
        return any(tensor.endswith(tuple(f".{name}.bias" for name in names)) for tensor in tensors)

    if architecture == "qwen2":
        return {}  # always has those of queries, keys and values
    biases = {
        "attention_bias": has("attn_q", "attn_k", "attn_v"),
        "attention_out_bias": has("attn_output"),
    }
    if architecture == "llama":
        biases["mlp_bias"] = has("ffn_gate", "ffn_up", "ffn_down")
    return biases
