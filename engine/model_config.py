"""What a model's config.json says, reduced to what the engine implements.

Every key either is used, is known to change no output, or is refused by name: a model that would be
computed wrongly is never served.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.engine.config_keys import ConfigKeys, check_generation
from paceline.engine.rope import RopeConfig, read_rope
from paceline.errors import ConfigError, UnsupportedModelError
from paceline.model_files.end_tokens import EndSource, EndToken, merge_end_tokens, tokenizer_end
from paceline.model_files.json_object import read_json_object, read_json_object_if_there

GENERATION_CONFIG = "generation_config.json"
MAX_LAYERS = 10_000
"""Far beyond any model; more would take memory before the missing tensors are noticed."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the architecture itself decides, without a key in config.json."""

    qkv_bias: bool | None
    """None: the key attention_bias decides."""
    o_bias: bool | None
    qk_norm: bool
    window_by_layer: bool
    """use_sliding_window, max_window_layers and layer_types choose the layers with a window."""
    window: int | None
    """Window of all layers when the key sliding_window is absent."""
    mlp_bias: bool | None
    head_dim: int | None
    """When the key is absent; None: hidden_size / num_attention_heads."""


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(None, None, False, False, None, None, None),
    "MistralForCausalLM": Architecture(False, False, False, False, 4096, False, None),
    "Qwen2ForCausalLM": Architecture(True, False, False, True, None, False, None),
    "Qwen3ForCausalLM": Architecture(None, None, True, True, None, False, 128),
}
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    says_tie_word_embeddings: bool
    """Whether config.json has the key; without it the head is a tensor of its own."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    """Of each layer: tokens that attention sees, the token itself included; None: all."""
    dtype: str
    """Precision that the folder names; float32 if it names none."""
    end_tokens: tuple[EndToken, ...]
    """Tokens that end a sequence, of config.json, generation_config.json and the tokenizer."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.end_tokens)


def read_model_config(folder: Path) -> ModelConfig:
    """Read config.json, generation_config.json and the tokenizer's end token of a model's folder.

    Raises UnsupportedModelError naming the architecture or key that is not implemented, ConfigError
    if a file is missing or wrong.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(
            f"There is no {path.name} in {folder}: not a model's folder in Hugging Face's form. "
            "Set model.path to a folder that has one, to a .gguf file, or to package:NAME."
        )
    values = read_json_object(path)
    generation = read_json_object_if_there(folder / GENERATION_CONFIG)
    return parse_model_config(values, generation, str(path), tokenizer_end(folder))


def parse_model_config(
    values: Mapping[str, Any],
    generation: Mapping[str, Any],
    source: str,
    tokenizer: EndSource | None = None,
) -> ModelConfig:
    """Turn the keys of config.json into a ModelConfig; `source` names them in errors.

    tokenizer: the tokenizer's end token.
    """
    keys = ConfigKeys(values, source)
    name, architecture = _architecture(keys)
    keys.check_values()
    check_generation(generation, str(Path(source).with_name(GENERATION_CONFIG)))
    hidden_size = keys.number("hidden_size")
    num_heads = keys.number("num_attention_heads")
    num_layers = keys.number("num_hidden_layers", maximum=MAX_LAYERS)
    max_position = keys.number("max_position_embeddings")
    is_as_many = name == "LlamaForCausalLM" or keys.is_null("num_key_value_heads")
    num_kv_heads = keys.number("num_key_value_heads", num_heads if is_as_many else None)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{source} has {num_heads} attention heads and {num_kv_heads} key-value heads: the "
            "second must divide the first. Correct the file."
        )
    qkv_bias = _bias(keys, "attention_bias", architecture.qkv_bias)
    vocab_size = keys.number("vocab_size")
    config = ModelConfig(
        architecture=name,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=keys.number("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=keys.number("head_dim", architecture.head_dim or hidden_size // num_heads),
        rms_norm_eps=keys.real("rms_norm_eps", 1e-6),
        rope=_rope(keys, max_position),
        max_position_embeddings=max_position,
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        says_tie_word_embeddings=keys.has("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        o_bias=_out_bias(keys, architecture, qkv_bias),
        mlp_bias=_bias(keys, "mlp_bias", architecture.mlp_bias),
        qk_norm=architecture.qk_norm,
        windows=_windows(keys, architecture, num_layers, max_position),
        dtype=_dtype(keys),
        end_tokens=_end_tokens(keys, generation, tokenizer, vocab_size),
    )
    unread = keys.unread()
    if unread:
        raise UnsupportedModelError(
            f"{source} has {', '.join(unread)}, which this version does not implement for {name}: "
            "ignoring it could change the model's output. Choose another model, or remove the key "
            "if it is known to change nothing."
        )
    if config.head_dim % 2:
        raise UnsupportedModelError(
            f"{source} has a head_dim of {config.head_dim}; rotary embeddings need an even one. "
            "Choose another model."
        )
    num_factors = len(config.rope.frequency_factors)
    if num_factors not in (0, config.head_dim // 2):
        raise ConfigError(
            f"{source} has {num_factors} frequency_factors, and heads of {config.head_dim} "
            f"dimensions need {config.head_dim // 2}. Correct the file."
        )
    return config


def _architecture(keys: ConfigKeys) -> tuple[str, Architecture]:
    model_type = str(keys.get("model_type", ""))
    by_type = MODEL_TYPES.get(model_type, "")
    names = keys.texts("architectures") or [by_type]
    for name in names:
        if name in ARCHITECTURES:
            if model_type and by_type != name:
                raise UnsupportedModelError(
                    f"{keys.source} names the architecture {name} and the model_type "
                    f"{model_type!r}, which are two different models. Correct the file, or choose "
                    "another model."
                )
            return name, ARCHITECTURES[name]
    found = ", ".join(names)
    raise UnsupportedModelError(
        f"{keys.source} names the architecture {found or '(none)'}, which is not implemented. "
        f"Choose a model with one of: {', '.join(ARCHITECTURES)}."
    )


def _bias(keys: ConfigKeys, key: str, fixed: bool | None) -> bool:
    """Read a key, unless the architecture itself decides, as in transformers.

    Then the key changes nothing: biases in the files would be tensors that are not expected.
    """
    value = keys.flag(key, False)
    return value if fixed is None else fixed


def _out_bias(keys: ConfigKeys, architecture: Architecture, qkv_bias: bool) -> bool:
    """Read a key of our own, which the conversion of GGUF files writes."""
    if architecture.o_bias is not None:
        return architecture.o_bias
    return keys.flag("attention_out_bias", qkv_bias)


def _rope(keys: ConfigKeys, max_position: int) -> RopeConfig:
    """The newer rope_parameters holds all; the older form is rope_theta beside rope_scaling."""
    theta = keys.real("rope_theta", 10000.0)
    newer, older = keys.get("rope_parameters", {}), keys.get("rope_scaling", {})
    for name, value in (("rope_parameters", newer), ("rope_scaling", older)):
        if not isinstance(value, dict) or any(isinstance(part, dict) for part in value.values()):
            raise UnsupportedModelError(
                f"{keys.source} has {name} = {value!r}: parameters by kind of layer are not "
                "implemented. Choose another model."
            )
    rope = read_rope(newer or older, theta, max_position)
    if newer and older and read_rope(older, rope.theta, max_position) != rope:
        raise UnsupportedModelError(
            f"{keys.source} has rope_parameters and rope_scaling that differ, and which holds is "
            "unclear. Remove the one that the model was not trained with."
        )
    if keys.has("rope_theta") and rope.theta != theta:
        raise UnsupportedModelError(
            f"{keys.source} says rope_theta = {theta} and, within the rope parameters, "
            f"{rope.theta}: which holds is unclear. Remove the wrong one."
        )
    return rope


def _windows(
    keys: ConfigKeys, architecture: Architecture, num_layers: int, max_position: int
) -> tuple[int | None, ...]:
    if architecture.window_by_layer:
        return _windows_by_layer(keys, num_layers)
    window = None
    if architecture.window is not None and not keys.is_null("sliding_window"):
        window = keys.number("sliding_window", architecture.window)
    uses = keys.flag("use_sliding_window", window is not None)
    if uses != (window is not None):
        raise UnsupportedModelError(
            f"{keys.source} says use_sliding_window = {uses}, and this architecture "
            f"{'always' if window else 'never'} has a window. Set sliding_window to null, or "
            "choose another model."
        )
    keys.get("max_window_layers", None)  # read by the architectures with windows by layer
    if not uses:
        _read_unused_window(keys, max_position)
    kind = "full_attention" if window is None else "sliding_attention"
    if keys.get("layer_types", None) not in (None, [], [kind] * num_layers):
        raise UnsupportedModelError(
            f"{keys.source} has layer_types other than {kind} for all {num_layers} layers, which "
            "is not implemented for this architecture. Choose another model."
        )
    return (window,) * num_layers


def _read_unused_window(keys: ConfigKeys, max_position: int) -> None:
    """Accept a window that is switched off, or no shorter than any sequence."""
    if keys.has("use_sliding_window") or keys.is_null("sliding_window"):
        keys.get("sliding_window", None)
    elif keys.has("sliding_window") and keys.number("sliding_window") < max_position:
        raise UnsupportedModelError(
            f"{keys.source} sets sliding_window, which this architecture does not have: ignoring "
            "it could change the model's output. Set use_sliding_window to false if the model was "
            "trained without a window, or choose another model."
        )


def _windows_by_layer(keys: ConfigKeys, num_layers: int) -> tuple[int | None, ...]:
    used = keys.flag("use_sliding_window", False)
    # Read always: without a window it changes nothing.
    window = None if keys.is_null("sliding_window") else keys.number("sliding_window", 4096)
    window_or_none = window if used else None
    first = keys.number("max_window_layers", 28, minimum=0)
    kinds = keys.texts("layer_types") or [
        "sliding_attention" if window_or_none is not None and layer >= first else "full_attention"
        for layer in range(num_layers)
    ]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != num_layers:
        raise UnsupportedModelError(
            f"{keys.source} has layer_types for {len(kinds)} of {num_layers} layers, of kinds "
            f"{', '.join(sorted(set(kinds)))}; one is needed for each layer, either full_attention "
            "or sliding_attention. Choose another model."
        )
    return tuple(window_or_none if kind == "sliding_attention" else None for kind in kinds)


def _dtype(keys: ConfigKeys) -> str:
    older = keys.get("torch_dtype", "float32")
    name = str(keys.get("dtype", older)).removeprefix("torch.")
    if keys.has("torch_dtype") and name != str(older).removeprefix("torch."):
        raise ConfigError(
            f"{keys.source} says dtype {name!r} and torch_dtype {older!r}, and which holds is "
            "unclear. Remove the wrong one."
        )
    if name not in DTYPES:
        raise UnsupportedModelError(
            f"{keys.source} says dtype {name!r}; implemented are {', '.join(DTYPES)}. "
            "Choose another model."
        )
    return name


def _end_tokens(
    keys: ConfigKeys, generation: Mapping[str, Any], tokenizer: EndSource | None, vocab_size: int
) -> tuple[EndToken, ...]:
    path = Path(keys.source)
    sources = [
        EndSource(path, keys.get("eos_token_id", None)),
        EndSource(path.with_name(GENERATION_CONFIG), generation.get("eos_token_id")),
    ]
    return merge_end_tokens([*sources, tokenizer] if tokenizer else sources, vocab_size)
