"""Small random models written by transformers itself, and the logits it computes with them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

VOCAB_SIZE = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def make_model(architecture: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """Build a model whose weights are large enough that a wrong position shows in the logits."""
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**(SHAPE | changes))
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if name.endswith("bias") else 0.15
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, spread)
    return model


def save_model(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def write_model(folder: Path, architecture: str, **changes: Any) -> transformers.PreTrainedModel:
    """Write a tiny model into `folder` and return it."""
    model = make_model(architecture, **changes)
    save_model(model, folder)
    return model


def logits_of(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Logits after each token, float32 [tokens, vocabulary], computed in one go."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].to(torch.float32)


def smollm2_by_transformers(folder: Path) -> transformers.PreTrainedModel:
    """Load a converted folder into transformers' own model: merged products are taken apart."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    head = config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        merged = tensors.pop(f"{prefix}.self_attn.qkv_proj.weight").split([q, kv, kv])
        for name, part in zip(("q_proj", "k_proj", "v_proj"), merged, strict=True):
            tensors[f"{prefix}.self_attn.{name}.weight"] = part
        for name, part in zip(
            ("gate_proj", "up_proj"),
            tensors.pop(f"{prefix}.mlp.gate_up_proj.weight").chunk(2),
            strict=True,
        ):
            tensors[f"{prefix}.mlp.{name}.weight"] = part
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    # Not a parameter, so not in the file: computed anew, away from the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()
