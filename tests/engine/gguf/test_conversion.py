"""A converted file gives the logits of the transformers model whose weights it holds."""

import math
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from gguf_files import Array, gguf_tensors, interleaved, write_model_gguf
from model_references import VOCAB_SIZE, logits_of, make_model
from runner_driver import Row, RunnerDriver
from safetensors.torch import load_file

from paceline.engine.gguf.conversion import convert_model
from paceline.engine.gguf.reader import read_gguf
from paceline.engine.model_config import read_model_config
from paceline.engine.rope import RopeConfig, inverse_frequencies
from paceline.errors import ConfigError, PacelineError, UnsupportedModelError

Kind = gguf.GGMLQuantizationType
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_tokens(count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(0, VOCAB_SIZE, count)]


def convert(path: Path, dtype: str = "float32") -> Path:
    folder = path.parent / "converted"
    folder.mkdir()
    shares = list(convert_model(read_gguf(path), dtype, folder))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    return folder


def assert_same_logits(folder: Path, model: Any, num_tokens: int = 60) -> None:
    tokens = random_tokens(num_tokens)
    driver = RunnerDriver(folder)
    driver.start(0)
    _, logits = driver.step(Row(0, tokens, sample="all"))
    torch.testing.assert_close(logits, logits_of(model, tokens), **CLOSE)


MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", {}, {}),
    "llama-tied": ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}, {}),
    "llama-all-biases": (
        "llama",
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True},
        {},
    ),
    "llama-wide-heads": ("llama", "LlamaForCausalLM", {"head_dim": 32}, {}),
    "llama-no-groups": (
        "llama",
        "LlamaForCausalLM",
        {"num_key_value_heads": 4},
        {"llama.attention.head_count_kv": None},
    ),
    "llama-counts-by-layer": (
        "llama",
        "LlamaForCausalLM",
        {},
        {"llama.attention.head_count_kv": [2, 2, 2]},
    ),
    "mistral": ("llama", "MistralForCausalLM", {"sliding_window": None}, {}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", {}, {}),
    "qwen3-narrow-heads": ("qwen3", "Qwen3ForCausalLM", {"head_dim": 32}, {}),
    "qwen3-biased": ("qwen3", "Qwen3ForCausalLM", {"head_dim": 16, "attention_bias": True}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    architecture, model_class, shape, keys = MODELS[name]
    model = make_model(model_class, **shape)
    path = write_model_gguf(tmp_path / "model.gguf", model, architecture, keys=keys)
    assert_same_logits(convert(path), model)


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({"rope_type": "default"}, {"type": "none", "factor": 1.0}),
    "linear": (LINEAR, {"type": "linear", "factor": 4.0}),
    "linear-without-a-type": (LINEAR, {"factor": 4.0}),
    "yarn": (YARN, {"type": "yarn", "factor": 4.0, "original_context_length": 64}),
    "yarn-of-the-whole-context": (
        YARN | {"original_max_position_embeddings": 512},
        {"type": "yarn", "factor": 4.0},
    ),
    "yarn-own-factors": (
        YARN
        | {
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 0.8 * (1 + 0.1 * math.log(4.0)),
        },
        {
            "type": "yarn",
            "factor": 4.0,
            "original_context_length": 64,
            "yarn_beta_fast": 16.0,
            "yarn_beta_slow": 2.0,
            "attn_factor": 0.8,
        },
    ),
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_scaled_rotary_embeddings_equal_those_of_transformers(
    name: str, architecture: str, tmp_path: Path
) -> None:
    rope, scaling = ROPES[name]
    model_class = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[architecture]
    model = make_model(model_class, rope_parameters=rope | {"rope_theta": 1000.0})
    keys = {f"{architecture}.rope.scaling.{key}": value for key, value in scaling.items()}
    path = write_model_gguf(tmp_path / "model.gguf", model, architecture, keys=keys)
    assert_same_logits(convert(path), model, num_tokens=150)


def test_the_old_key_of_linear_scaling_is_used(tmp_path: Path) -> None:
    model = make_model("LlamaForCausalLM", rope_parameters=LINEAR | {"rope_theta": 1000.0})
    keys = {"llama.rope.scale_linear": 4.0}
    assert_same_logits(convert(write_model_gguf(tmp_path / "model.gguf", model, keys=keys)), model)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def llama3_factors(head_dim: int) -> Array:
    """Write rope_freqs.weight as the converter of Llama 3.x does."""
    factors = []
    for frequency in 1.0 / LLAMA3["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * math.pi / frequency
        turns = LLAMA3["original_max_position_embeddings"] / wavelength
        if turns > LLAMA3["high_freq_factor"]:
            factors.append(1.0)
        elif turns < LLAMA3["low_freq_factor"]:
            factors.append(LLAMA3["factor"])
        else:
            smooth = (turns - LLAMA3["low_freq_factor"]) / (
                LLAMA3["high_freq_factor"] - LLAMA3["low_freq_factor"]
            )
            factors.append(1.0 / ((1.0 - smooth) / LLAMA3["factor"] + smooth))
    return np.array(factors, np.float32)


def test_frequency_factors_give_the_logits_of_llama_3(tmp_path: Path) -> None:
    model = make_model("LlamaForCausalLM", rope_parameters=LLAMA3, head_dim=32)
    factors = llama3_factors(32)
    assert any(1.0 < factor < 8.0 for factor in factors), "the test needs a blended dimension"
    path = write_model_gguf(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": factors})
    assert_same_logits(convert(path), model, num_tokens=150)


def test_frequency_factors_come_before_linear_scaling(tmp_path: Path) -> None:
    model = make_model("LlamaForCausalLM")
    factors = np.linspace(1.0, 3.0, 8, dtype=np.float32)
    path = write_model_gguf(
        tmp_path / "model.gguf",
        model,
        keys={"llama.rope.scaling.factor": 2.0},
        tensors={"rope_freqs.weight": factors},
    )
    rope = read_model_config(convert(path)).rope
    plain = inverse_frequencies(RopeConfig(theta=rope.theta), 16)
    expected = plain / torch.from_numpy(factors) / 2.0
    torch.testing.assert_close(inverse_frequencies(rope, 16), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (np.ones(7, np.float32), "must be F32"),
        (np.ones(8, np.float16), "must be F32"),
        (np.array([1, 1, 0, 1, 1, 1, 1, 1], np.float32), "above 0"),
        (np.array([1, 1, np.nan, 1, 1, 1, 1, 1], np.float32), "above 0"),
    ],
)
def test_wrong_frequency_factors_are_refused(change: Array, message: str, tmp_path: Path) -> None:
    path = write_model_gguf(
        tmp_path / "model.gguf",
        make_model("LlamaForCausalLM"),
        tensors={"rope_freqs.weight": change},
    )
    with pytest.raises(ConfigError, match=message):
        convert(path)


def test_frequency_factors_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = write_model_gguf(
        tmp_path / "model.gguf",
        make_model("Qwen2ForCausalLM"),
        "qwen2",
        tensors={"rope_freqs.weight": np.ones(8, np.float32)},
    )
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        convert(path)


@pytest.mark.parametrize("biased", [("attn_q", "attn_k", "attn_v"), ("attn_output",)])
def test_some_biases_of_attention_are_served_without_the_others(
    biased: tuple[str, ...], tmp_path: Path
) -> None:
    """Transformers has them all or none: there the others are 0."""
    model = make_model("LlamaForCausalLM", attention_bias=True)
    tensors: dict[str, Array | None] = {
        name: None
        for name in gguf_tensors(model)
        if name.endswith("bias") and name.split(".")[2] not in biased
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_output = ".o_proj." in name
            if name.endswith("bias") and is_output != ("attn_output" in biased):
                parameter.zero_()
    path = write_model_gguf(tmp_path / "model.gguf", model, tensors=tensors)
    assert_same_logits(convert(path), model)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1])
def test_quantised_matrices_have_the_values_that_gguf_gives_them(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    """Every width is a multiple of 32, the block of these types."""
    model = make_model("LlamaForCausalLM", intermediate_size=96)
    path = write_model_gguf(tmp_path / "model.gguf", model, kind=kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                quantised = gguf.quants.quantize(parameter.numpy(), kind)
                values = gguf.quants.dequantize(quantised, kind)
                parameter.copy_(torch.from_numpy(values))
                assert values.shape == parameter.shape, name
    assert_same_logits(convert(path), model)


def k_quant(kind: gguf.GGMLQuantizationType, num_rows: int, width: int) -> Array:
    """Draw random blocks, with a scale that keeps their values small."""
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(num_rows)
    blocks = draw.integers(0, 256, (num_rows * width // block_elements, block_bytes), np.uint8)
    for offset in {Kind.Q4_K: (0, 2), Kind.Q6_K: (208,)}[kind]:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    return blocks.reshape(num_rows, -1)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K])
def test_k_quants_are_served(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    model = make_model(
        "LlamaForCausalLM", hidden_size=256, intermediate_size=256, num_hidden_layers=1
    )
    heads = {"attn_q": 4, "attn_k": 2}
    tensors: dict[str, Array | None] = {}
    for name, tensor in gguf_tensors(model).items():
        if tensor.ndim == 2:
            tensors[name] = k_quant(kind, *tensor.shape)
    path = write_model_gguf(tmp_path / "model.gguf", model, tensors=tensors, kind=kind)
    weights = load_file(convert(path) / "model.safetensors")

    def values(name: str) -> torch.Tensor:
        array = gguf.quants.dequantize(tensors[f"blk.0.{name}.weight"], kind)
        return torch.from_numpy(array)

    torch.testing.assert_close(weights["model.layers.0.mlp.down_proj.weight"], values("ffn_down"))
    merged = weights["model.layers.0.self_attn.qkv_proj.weight"].split([256, 128, 128])
    for ours, name in zip(merged, ("attn_q", "attn_k", "attn_v"), strict=True):
        again = interleaved(ours.numpy(), heads[name]) if name in heads else ours.numpy()
        torch.testing.assert_close(torch.from_numpy(again), values(name))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once_to_the_precision_that_was_asked_for(
    dtype: str, tmp_path: Path
) -> None:
    model = make_model("LlamaForCausalLM")
    folder = convert(write_model_gguf(tmp_path / "model.gguf", model), dtype)
    assert read_model_config(folder).dtype == dtype
    weights = load_file(folder / "model.safetensors")
    expected = model.state_dict()["model.embed_tokens.weight"].to(getattr(torch, dtype))
    assert torch.equal(weights["model.embed_tokens.weight"], expected)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, "float16", r"the value 100000 in output_norm\.weight.* model\.dtype to bfloat16"),
        (math.nan, "float32", r"output_norm\.weight that are infinite or not numbers"),
        (math.inf, "bfloat16", r"output_norm\.weight that are infinite or not numbers"),
    ],
)
def test_a_value_that_the_precision_cannot_hold_is_refused(
    value: float, dtype: str, message: str, tmp_path: Path
) -> None:
    norm = np.ones(64, np.float32)
    norm[3] = value
    path = write_model_gguf(
        tmp_path / "model.gguf",
        make_model("LlamaForCausalLM"),
        tensors={"output_norm.weight": norm},
    )
    with pytest.raises(ConfigError, match=message):
        convert(path, dtype)


def one_layer() -> Any:
    return make_model("Qwen3ForCausalLM", num_hidden_layers=1, head_dim=16)


NAMES_OF_ONE_LAYER = list(gguf_tensors(one_layer(), "qwen3"))


@pytest.mark.parametrize("name", NAMES_OF_ONE_LAYER)
def test_a_file_without_one_of_its_tensors_is_refused(name: str, tmp_path: Path) -> None:
    """All but output.weight, without which the embedding is the output's matrix, too."""
    path = write_model_gguf(tmp_path / "model.gguf", one_layer(), "qwen3", tensors={name: None})
    if name == "output.weight":
        assert read_model_config(convert(path)).tie_word_embeddings
        return
    with pytest.raises(PacelineError, match=name.replace(".", r"\.")):
        convert(path)
    assert not (tmp_path / "converted" / "config.json").exists()


@pytest.mark.parametrize("name", NAMES_OF_ONE_LAYER)
def test_a_tensor_of_another_shape_is_refused(name: str, tmp_path: Path) -> None:
    tensor = gguf_tensors(one_layer(), "qwen3")[name]
    path = write_model_gguf(
        tmp_path / "model.gguf",
        one_layer(),
        "qwen3",
        keys={"qwen3.vocab_size": VOCAB_SIZE},
        tensors={name: np.concatenate([tensor, tensor[:1]])},
    )
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        convert(path)


@pytest.mark.parametrize(
    "name",
    [
        "output.bias",
        "blk.0.attn_q.bias",
        "blk.0.attn_output.scale",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.ffn_up.bias",
        "blk.1.attn_norm.weight",
        "rope_factors_long.weight",
    ],
)
def test_a_tensor_that_the_model_does_not_have_is_refused(name: str, tmp_path: Path) -> None:
    path = write_model_gguf(
        tmp_path / "model.gguf", one_layer(), "qwen3", tensors={name: np.ones(64, np.float32)}
    )
    # A bias of queries only: those of keys and values are missing.
    wanted = r"blk\.0\.attn_k\.bias" if name == "blk.0.attn_q.bias" else name.replace(".", r"\.")
    with pytest.raises(ConfigError, match=wanted):
        convert(path)


def test_a_bias_that_one_layer_lacks_is_missed(tmp_path: Path) -> None:
    model = make_model("LlamaForCausalLM", mlp_bias=True)
    path = write_model_gguf(tmp_path / "model.gguf", model, tensors={"blk.1.ffn_down.bias": None})
    with pytest.raises(ConfigError, match=r"1 missing: blk\.1\.ffn_down\.bias"):
        convert(path)


def test_qwen2_without_its_biases_is_refused(tmp_path: Path) -> None:
    model = make_model("Qwen2ForCausalLM")
    biases: dict[str, Array | None] = {
        name: None for name in gguf_tensors(model, "qwen2") if name.endswith("bias")
    }
    path = write_model_gguf(tmp_path / "model.gguf", model, "qwen2", tensors=biases)
    with pytest.raises(ConfigError, match=r"9 missing: blk\.0\.attn_k\.bias"):
        convert(path)


def test_a_mixture_of_experts_that_calls_itself_llama_is_refused(tmp_path: Path) -> None:
    path = write_model_gguf(
        tmp_path / "model.gguf",
        make_model("LlamaForCausalLM"),
        keys={"llama.expert_count": 4, "llama.expert_used_count": 2},
    )
    with pytest.raises(UnsupportedModelError, match=r"llama\.expert_count = 4"):
        convert(path)


@pytest.mark.parametrize("count", [40, [14], [14, 14], "14"], ids=str)
def test_a_file_that_says_another_number_of_tensors_is_refused(count: Any, tmp_path: Path) -> None:
    keys = {"qwen3.attention.key_length": 16, "split.tensors.count": count}
    path = write_model_gguf(tmp_path / "model.gguf", one_layer(), "qwen3", keys=keys)
    with pytest.raises(ConfigError, match=r"has 14 tensors, and split\.tensors\.count says"):
        convert(path)


def test_a_type_that_gguf_cannot_expand_is_refused_by_name(tmp_path: Path) -> None:
    path = write_model_gguf(
        tmp_path / "model.gguf",
        make_model("LlamaForCausalLM"),
        tensors={"output_norm.weight": np.ones(64, np.int16)},
    )
    with pytest.raises(UnsupportedModelError, match=r"output_norm\.weight in the ggml type I16"):
        convert(path)
