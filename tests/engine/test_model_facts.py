"""What is known of a model before it is loaded."""

import json
from pathlib import Path

import pytest

from paceline.engine.model_facts import choose_dtype, choose_model_len, read_model_facts
from paceline.engine.settings import ModelSettings
from paceline.errors import ConfigError, PacelineError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}


def write_folder(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "model.safetensors").touch()
    return folder


def settings(path: Path, **changes: object) -> ModelSettings:
    return ModelSettings(path=str(path), **changes)  # type: ignore[arg-type]


def test_a_folder_tells_its_architecture_length_and_dtype(tmp_path: Path) -> None:
    facts = read_model_facts(settings(write_folder(tmp_path)))
    assert facts == (tmp_path, "LlamaForCausalLM", 512, "bfloat16")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"surprise": 1}, "surprise"),
        ({"hidden_size": None}, "no hidden_size"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(PacelineError, match=words):
        read_model_facts(settings(write_folder(tmp_path, **changes)))


def test_weights_must_be_there_unless_they_are_random(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no \.safetensors file"):
        read_model_facts(settings(tmp_path))
    assert read_model_facts(settings(tmp_path, load_format="dummy")).dtype == "bfloat16"


def test_a_length_beyond_the_models_is_refused_with_both_numbers(tmp_path: Path) -> None:
    assert choose_model_len(settings(tmp_path), 512, tmp_path) == 512
    assert choose_model_len(settings(tmp_path, max_model_len=64), 512, tmp_path) == 64
    with pytest.raises(ConfigError, match=r"is 513, .* at most 512"):
        choose_model_len(settings(tmp_path, max_model_len=513), 512, tmp_path)


def test_float16_is_for_gpus(tmp_path: Path) -> None:
    assert choose_dtype(settings(tmp_path), "float16", "cuda") == "float16"
    assert choose_dtype(settings(tmp_path, dtype="float32"), "float16", "cpu") == "float32"
    with pytest.raises(ConfigError, match="The model's own dtype is float16"):
        choose_dtype(settings(tmp_path), "float16", "cpu")
    with pytest.raises(ConfigError, match=r"model\.dtype is float16"):
        choose_dtype(settings(tmp_path, dtype="float16"), "float32", "cpu")
