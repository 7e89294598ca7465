"""What a file says of its model: shapes that fit each other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model_gguf
from model_references import VOCAB_SIZE, make_model

from paceline.engine.gguf.config import describe_model
from paceline.engine.gguf.reader import read_gguf
from paceline.errors import ConfigError

SCALING = "llama.rope.scaling"


def describe(path: Path, **keys: Any) -> Any:
    model = make_model("LlamaForCausalLM", num_hidden_layers=1)
    return describe_model(read_gguf(write_model_gguf(path / "model.gguf", model, keys=keys)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama.attention.value_length": 8}, "value_length = 8: keys have 16 dimensions"),
        ({"llama.rope.dimension_count": 8}, "dimension_count = 8: heads have 16 dimensions"),
        ({"llama.attention.scale": 0.5}, r"scale = 0\.5: only 1 / sqrt\(16\)"),
        ({"llama.attention.sliding_window": 32}, "a window shorter than the context of 512"),
        ({"llama.attention.head_count_kv": [1, 2]}, r"head_count_kv = \[1, 2\]: values that diff"),
        ({"llama.attention.head_count": 0}, "head_count = 0, and it must be a whole number"),
        ({"llama.attention.head_count": 128}, "a divisor of the 64 of embedding_length"),
        ({"llama.context_length": "long"}, "context_length = 'long'"),
        ({"llama.block_count": 2**32 - 1}, "block_count = 4294967295, and it must be below the 12"),
        ({"llama.block_count": True}, "block_count = True"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "a finite number"),
        ({"llama.vocab_size": 98}, r"97 rows .* llama\.vocab_size is 98"),
        ({"tokenizer.ggml.tokens": ["a"] * 96}, "97 rows .* is 96"),
        ({"tokenizer.ggml.tokens": ["a"] * 98}, "97 rows .* is 98"),
        ({"tokenizer.ggml.tokens": 97}, "must be a list of texts"),
        ({"llama.rope.freq_base": 0.0}, "freq_base = 0.0, and it must be above 0"),
        ({f"{SCALING}.type": 1}, "type = 1, and it must be a text"),
        ({f"{SCALING}.type": "longrope"}, "'longrope': implemented are none, linear and yarn"),
        ({f"{SCALING}.type": "none", f"{SCALING}.factor": 4.0}, "1 where .* is none"),
        ({f"{SCALING}.factor": -2.0}, "must be above 0"),
        ({f"{SCALING}.factor": 2.0, "llama.rope.scale_linear": 4.0}, "which holds is unclear"),
        ({f"{SCALING}.attn_factor": 0.5}, r"attn_factor = 0\.5: it is implemented for yarn only"),
    ],
)
def test_values_that_cannot_be_or_are_not_implemented_are_named(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        describe(tmp_path, **keys)


def test_keys_that_say_what_holds_without_them_change_nothing(tmp_path: Path) -> None:
    said = {
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.attention.scale": 0.25,
        "llama.attention.sliding_window": 512,
        "llama.attention.head_count_kv": [2],
        "llama.vocab_size": VOCAB_SIZE,
        "llama.rope.freq_base": 10000.0,
        f"{SCALING}.type": "linear",
        f"{SCALING}.factor": 0.0,
        f"{SCALING}.original_context_length": 64,
        f"{SCALING}.finetuned": True,
        "llama.expert_count": 0,
    }
    assert describe(tmp_path, **said) == describe(tmp_path)


def test_a_file_without_an_embedding_is_refused(tmp_path: Path) -> None:
    model = make_model("LlamaForCausalLM", num_hidden_layers=1)
    path = write_model_gguf(tmp_path / "model.gguf", model, tensors={"token_embd.weight": None})
    with pytest.raises(ConfigError, match=r"no tensor token_embd\.weight"):
        describe_model(read_gguf(path))


def test_a_long_list_of_counts_is_cut_in_the_message(tmp_path: Path) -> None:
    counts = np.arange(1, 1000).tolist()
    with pytest.raises(ConfigError) as refusal:
        describe(tmp_path, **{"llama.feed_forward_length": counts})
    assert len(str(refusal.value)) < 400
