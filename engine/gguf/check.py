"""Look at a GGUF file without converting it."""

from pathlib import Path
from typing import Any

from paceline.engine.gguf.config import describe_model
from paceline.engine.gguf.reader import read_gguf
from paceline.engine.gguf.tokenizer import end_token_ids


def check_gguf(path: Path) -> dict[str, Any]:
    """Check what a file says of its model and its tokenizer; return the model's config.json.

    Takes less than a second for a file of any size, and imports no torch. The tensors' values and
    names are checked by the conversion. Raises UnsupportedModelError and ConfigError.
    """
    file = read_gguf(path)
    config = describe_model(file)
    end_token_ids(file.metadata)
    return config
