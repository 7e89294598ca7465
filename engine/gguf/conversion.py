"""Turn a GGUF file into a model's folder.

    python -m paceline.engine.gguf.conversion FILE DTYPE FOLDER

Runs as a process of its own, so that its memory is free again when it ends. It writes lines of JSON
to its output: {"progress": 0.5}, and {"error": …, "message": …} before it fails. The weights are
written in the engine's layout (merged products), ready to be mapped.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paceline.engine.gguf.config import describe_model
from paceline.engine.gguf.reader import GgufFile, read_gguf
from paceline.engine.gguf.safetensors_stream import write_safetensors
from paceline.engine.gguf.tensors import expand, find_sources
from paceline.engine.gguf.tokenizer import end_token_ids, write_tokenizer
from paceline.engine.kv_pool import TORCH_DTYPES
from paceline.engine.model_config import parse_model_config
from paceline.engine.weights import tensor_specs
from paceline.errors import PacelineError

TOKENIZER_SHARE = 0.1
"""Of the time, roughly."""


def convert(source: Path, dtype: str, folder: Path) -> Iterator[float]:
    """Write config, tokenizer and weights of `source` into `folder`; yield the share that is done.

    Raises UnsupportedModelError for what is not implemented, ConfigError for a damaged file.
    """
    file = read_gguf(source)
    ends = list(end_token_ids(file.metadata))
    model = convert_model(file, dtype, folder)
    next(model)  # checks the whole file before the tokenizer takes its time
    _write_json(folder / "generation_config.json", {"eos_token_id": ends})
    write_tokenizer(file.metadata, folder)
    yield TOKENIZER_SHARE
    for share in model:
        yield TOKENIZER_SHARE + (1 - TOKENIZER_SHARE) * share


def convert_model(file: GgufFile, dtype: str, folder: Path) -> Iterator[float]:
    """Write config.json and the weights; yield first when everything has been checked."""
    values = describe_model(file) | {"dtype": dtype}
    config = parse_model_config(values, {}, str(file.path))
    sources = find_sources(file, config)
    yield 0.0
    _write_json(folder / "config.json", values)
    yield from write_safetensors(
        folder / "model.safetensors",
        {spec.name: spec.shape for spec in tensor_specs(config)},
        TORCH_DTYPES[dtype],
        (
            block
            for parts in sources.values()
            for source in parts
            for block in expand(file, source, TORCH_DTYPES[dtype])
        ),
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _say(**message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Convert, saying progress and errors as lines of JSON."""
    source, dtype, folder = arguments
    try:
        for share in convert(Path(source), dtype, Path(folder)):
            _say(progress=share)
    except PacelineError as error:
        _say(error=type(error).__name__, message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
