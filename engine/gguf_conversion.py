"""Turn a GGUF file into a model's folder.

    python -m paceline.engine.gguf_conversion FILE DTYPE FOLDER

Runs as a process of its own, so that transformers' memory, progress bars and environment stay out
of paceline's. It writes lines of JSON to its output: {"progress": 0.5}, and {"error": …,
"message": …} before it fails. The weights are written in the engine's layout (merged products),
ready to be mapped.
"""

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from paceline.engine.kv_pool import TORCH_DTYPES
from paceline.engine.model_config import (
    MODEL_TYPES,
    ModelConfig,
    parse_model_config,
)
from paceline.engine.weights import tensor_specs
from paceline.errors import ConfigError, PacelineError, UnsupportedModelError

# Keys that transformers adds to a configuration read from GGUF, and that say nothing of the model.
_DROPPED = {"quantization_config", "_model_name_or_path", "_name_or_path", "name_or_path"}
_TOKENIZER_KEYS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "add_bos_token",
    "add_eos_token",
    "model_max_length",
)


def convert(source: Path, dtype: str, folder: Path) -> Iterator[float]:
    """Write config, tokenizer and weights of `source` into `folder`; yield the share that is done.

    Raises UnsupportedModelError for what transformers would ignore in silence, such as rope
    scaling.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    check_metadata(source)
    yield 0.1
    where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(source.parent, **where)
    values = {
        key: value
        for key, value in json.loads(config.to_json_string(use_diff=False)).items()
        if key not in _DROPPED
    }
    if config.model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"{source} holds a model of type {config.model_type!r}, which is not implemented. "
            f"Choose a model of one of the types {', '.join(MODEL_TYPES)}."
        )
    values |= {"architectures": [MODEL_TYPES[config.model_type]], "dtype": dtype}
    parsed = parse_model_config(values, {}, str(source))
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    yield 0.25
    _write_tokenizer(AutoTokenizer.from_pretrained(source.parent, **where), folder)
    yield 0.45
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=TORCH_DTYPES[dtype], config=config, **where
    )
    model.generation_config.save_pretrained(folder)
    tensors = dict(model.state_dict())
    yield 0.9
    save_file(_merged(parsed, tensors, TORCH_DTYPES[dtype]), folder / "model.safetensors")
    del model, tensors
    gc.collect()
    yield 1.0


def check_metadata(source: Path) -> None:
    """Refuse what transformers drops when it reads a GGUF file.

    Raises UnsupportedModelError naming it, ConfigError if the file is no GGUF.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"{source} cannot be read as GGUF: {error}. It may be cut short: download it again."
        ) from error
    dropped = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    for key, field in reader.fields.items():
        if ".rope.scaling." in key and field.contents() not in ("none", 1.0):
            dropped.append(key)
    if dropped:
        raise UnsupportedModelError(
            f"{source} has {', '.join(sorted(dropped))}: scaled rotary embeddings are lost when "
            "transformers reads a GGUF file, and the model's output would be wrong. Set model.path "
            "to the model's safetensors folder."
        )


def _merged(
    config: ModelConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    merged = {}
    for spec in tensor_specs(config):
        parts = [tensors[part.name].to(dtype) for part in spec.parts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        merged[spec.name] = whole.contiguous().clone() if len(parts) == 1 else whole
    return merged


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write tokenizer.json, and all else the router needs in tokenizer_config.json."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        key: str(value) if key.endswith("token") and not isinstance(value, bool) else value
        for key in _TOKENIZER_KEYS
        if (value := getattr(tokenizer, key, None)) is not None
    }
    if tokenizer.chat_template:
        values["chat_template"] = tokenizer.chat_template
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


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
