"""Tiny random models of each architecture, and transformers' answer for a prompt."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel

from paceline.engine.model_source import ModelFolder, prepare_model
from paceline.engine.settings import ModelSettings

VOCAB_SIZE = 320
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=48),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=32),
}


def write_tiny_model(folder: Path, architecture: str = "llama") -> transformers.PreTrainedModel:
    """Write random weights, config and a byte-level tokenizer into a folder."""
    torch.manual_seed(sum(map(ord, architecture)))
    config = CONFIGS[architecture]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialisation: logits must differ by more than rounding.
            parameter.mul_(4.0) if parameter.ndim == 2 else parameter.add_(
                0.2 * torch.randn_like(parameter)
            )
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    """One token a byte: any text has tokens and any token has text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {
        letter: number + 3 for number, letter in enumerate(alphabet)
    }
    vocabulary |= {f"<unused{n}>": n for n in range(len(vocabulary), VOCAB_SIZE)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')


def prepare(folder: Path, cache: Path) -> tuple[dict[str, Any], ModelFolder]:
    """Give what a deployment needs of a model's folder."""
    settings = {"path": str(folder), "dtype": "float32"}
    return settings, prepare_model(ModelSettings(**settings), cache, lambda name, share: None)
