"""Write a GGUF file's tokenizer as transformers reads it."""

import json
from pathlib import Path
from typing import Any

_KEYS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "add_bos_token",
    "add_eos_token",
    "model_max_length",
)


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write tokenizer.json, and all else the router needs in tokenizer_config.json."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, local_files_only=True
    )
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        key: str(value) if key.endswith("token") and not isinstance(value, bool) else value
        for key in _KEYS
        if (value := getattr(tokenizer, key, None)) is not None
    }
    if tokenizer.chat_template:
        values["chat_template"] = tokenizer.chat_template
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
