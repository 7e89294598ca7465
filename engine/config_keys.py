"""The keys of config.json that are not part of the model's shape: harmless, or harmless sometimes.

A key that is neither here nor read by model_config is refused by name.
"""

import math
from collections.abc import Mapping
from typing import Any

from paceline.errors import ConfigError, UnsupportedModelError
from paceline.model_files.tokenizer_keys import says_nothing

# Sampling, which each request decides; transformers reads them from config.json no more.
_OF_REQUESTS = frozenset(
    {
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "length_penalty",
        "max_length",
        "max_sequence_length",
        "_flash_attn_2_enabled",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "min_p",
        "no_repeat_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "target_lookbehind",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
# Keys that describe training, the file, the tokenizer or the library, and change no output.
HARMLESS = _OF_REQUESTS | frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_experts_implementation",
        "_model_name_or_path",
        "_name_or_path",
        "activation_dropout",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_implementation",
        "attn_pdrop",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "decoder_start_token_id",
        "dropout",
        "embd_pdrop",
        "finetuning_task",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "mlp_dropout",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "use_flash_attention",
    }
)
# Keys that change output unless they have one of these values.
ONLY: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "embedding_multiplier": (1.0,),
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "num_experts": (0,),
    "num_nextn_predict_layers": (0,),
    "partial_rotary_factor": (1.0,),
    "qk_layernorm": (False,),
    "residual_multiplier": (1.0,),
    "rope_interleaved": (False,),
    "use_bias": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
}
# Keys of generation_config.json, and once of config.json, that no request can ask for.
_NOT_GENERATED = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "constraints",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "watermarking_config",
)
_QUANTISATIONS = ("quantization_config", "compression_config")


MAX_NUMBER = 2**31 - 1
"""What the engine's indices hold."""


class ConfigKeys:
    """The keys of a config.json; remembers which were read."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = {key: value for key, value in values.items() if value is not None}
        self._nulls = {key for key, value in values.items() if value is None}
        self._read: set[str] = set()
        self.source = source

    def get(self, key: str, default: Any) -> Any:
        self._read.add(key)
        return self._values.get(key, default)

    def number(
        self,
        key: str,
        default: int | None = None,
        *,
        minimum: int = 1,
        maximum: int = MAX_NUMBER,
    ) -> int:
        value = self.get(key, default)
        if value is None:
            raise ConfigError(
                f"{self.source} has no {key}, without which the model's shape is unknown. "
                "Set model.path to a folder with a complete config.json."
            )
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not minimum <= value <= maximum:
            raise ConfigError(
                f"{self.source} says {key} = {value!r}, and it must be a whole number from "
                f"{minimum} to {maximum}. Correct the file."
            )
        return int(value)

    def texts(self, key: str) -> list[str]:
        """Return a list of texts; a single one counts as a list, an absent key as an empty one."""
        value = self.get(key, [])
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(
                f"{self.source} says {key} = {value!r}, and it must be a list of texts. Correct "
                "the file."
            )
        return texts

    def real(self, key: str, default: float) -> float:
        value = self.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise ConfigError(
                f"{self.source} says {key} = {value!r}, and it must be a number above 0. "
                "Correct the file."
            )
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(
                f"{self.source} says {key} = {value!r}, and it must be true or false. Correct the "
                "file."
            )
        return value

    def has(self, key: str) -> bool:
        return key in self._values

    def is_null(self, key: str) -> bool:
        """Whether the key is there and null, which can mean something else than its absence."""
        return key in self._nulls

    def check_values(self) -> None:
        """Refuse keys whose values change output in a way that is not implemented."""
        for key in _QUANTISATIONS:
            _refuse_quantised(key, self.get(key, {}), self.source)
        for key, allowed in ONLY.items():
            value = self.get(key, allowed[0])
            if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
                raise UnsupportedModelError(
                    f"{self.source} sets {key} to {value!r}, and only {allowed[0]!r} is "
                    "implemented. Choose another model."
                )
        check_generation(self._values, self.source)
        self._read.update(_NOT_GENERATED)

    def unread(self) -> list[str]:
        """Return the keys that say something and were not read."""
        said = {key for key, value in self._values.items() if value not in ("", [], {})}
        return sorted(said - self._read - HARMLESS)


def check_generation(values: Mapping[str, Any], source: str) -> None:
    """Refuse what would change every request's tokens and cannot be asked for."""
    wrong = [key for key in _NOT_GENERATED if not says_nothing(values.get(key))]
    if wrong:
        raise UnsupportedModelError(
            f"{source} sets {wrong[0]} to {values[wrong[0]]!r}, which is not implemented. Remove "
            "the key to serve the model without it."
        )


def _refuse_quantised(key: str, value: object, source: str) -> None:
    if says_nothing(value):
        return
    method = value.get("quant_method") if isinstance(value, dict) else None
    bits = value.get("bits") if isinstance(value, dict) else None
    name = f"by {method}" if method else "by a method that it does not name"
    raise UnsupportedModelError(
        f"{source} has a {key}: the weights are quantised {name}"
        f"{f' to {bits} bits' if bits else ''}, which is not implemented. Choose the model's "
        "unquantised folder."
    )
