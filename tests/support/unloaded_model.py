"""A model's folder with all that is looked at before anything is loaded."""

import json
from pathlib import Path

from tiny_tokenizer import write_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}


def write_unloaded_model(folder: Path, **changes: object) -> Path:
    """Write the folder; its weights are an empty file."""
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "model.safetensors").touch()
    return folder
