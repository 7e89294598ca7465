"""What is known of a model before it is loaded: read in milliseconds, without torch."""

from pathlib import Path
from typing import NamedTuple

from paceline.engine.gguf.check import check_gguf
from paceline.engine.model_config import read_model_config
from paceline.engine.model_source import locate_model
from paceline.engine.settings import ModelSettings
from paceline.engine.weight_files import find_weight_files
from paceline.errors import ConfigError


class ModelFacts(NamedTuple):
    """A model that can most likely be served."""

    path: Path
    """A folder or a .gguf file."""
    architecture: str
    max_position_embeddings: int
    dtype: str
    """Precision that the folder names; what a GGUF file is converted to."""


def read_model_facts(settings: ModelSettings) -> ModelFacts:
    """Find the model and read what it says of itself.

    Raises ConfigError or UnsupportedModelError, as loading it would.
    """
    path = locate_model(settings)
    if path.is_file():
        values = check_gguf(path)
        [architecture] = values["architectures"]
        return ModelFacts(path, architecture, values["max_position_embeddings"], "float32")
    config = read_model_config(path)
    if settings.load_format != "dummy":
        find_weight_files(path)
    return ModelFacts(path, config.architecture, config.max_position_embeddings, config.dtype)


def choose_model_len(settings: ModelSettings, limit: int, source: Path) -> int:
    """Return the tokens of prompt and output together; raises ConfigError beyond the limit."""
    if settings.max_model_len is not None and settings.max_model_len > limit:
        raise ConfigError(
            f"model.max_model_len is {settings.max_model_len}, and the model in {source} was made "
            f"for {limit} positions. Set max_model_len to at most {limit}."
        )
    return settings.max_model_len or limit


def choose_dtype(settings: ModelSettings, own_dtype: str, device: str) -> str:
    """Return the precision to compute in; raises ConfigError for one that the device cannot."""
    dtype = own_dtype if settings.dtype == "auto" else settings.dtype
    if dtype == "float16" and device == "cpu":
        whose = "The model's own dtype" if settings.dtype == "auto" else "model.dtype"
        raise ConfigError(
            f"{whose} is float16, and CPUs compute it slowly and with overflows. "
            "Set model.dtype to float32 or bfloat16."
        )
    return dtype
