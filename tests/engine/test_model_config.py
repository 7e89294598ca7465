"""config.json: what is implemented is read, and everything else is refused by name."""

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from model_references import SHAPE
from tiny_tokenizer import EOS_ID, write_tokenizer

from paceline.engine.config_keys import HARMLESS
from paceline.engine.model_config import parse_model_config, read_model_config
from paceline.engine.rope import RopeType, inverse_frequencies
from paceline.errors import ConfigError, UnsupportedModelError

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER = "tokenizer_config.json"


DEFAULTS_OF_TRANSFORMERS_4: dict[str, Any] = {
    "_attn_implementation_autoset": True,
    "_name_or_path": "",
    "add_cross_attention": False,
    "attention_dropout": 0.0,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "hidden_act": "silu",
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "pretraining_tp": 1,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.51.3",
    "typical_p": 1.0,
    "use_bfloat16": False,
    "use_cache": True,
}


def make_config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    return SHAPE | {"architectures": [architecture], "rms_norm_eps": 1e-6} | changes


def parse(architecture: str = "LlamaForCausalLM", **changes: Any) -> Any:
    return parse_model_config(make_config(architecture, **changes), {}, "config.json")


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"],
)
def test_every_key_that_transformers_writes_is_understood(
    architecture: str, tmp_path: Path
) -> None:
    """Also when it writes all of them, defaults included."""
    wanted = getattr(transformers, architecture).config_class(**SHAPE)
    wanted.architectures = [architecture]
    (tmp_path / "config.json").write_text(wanted.to_json_string(use_diff=False))
    config = read_model_config(tmp_path)
    assert config.architecture == architecture
    assert (config.num_heads, config.num_kv_heads) == (4, 2)
    head_dim = getattr(wanted, "head_dim", None) or wanted.hidden_size // wanted.num_attention_heads
    assert config.head_dim == head_dim
    assert config.rope.theta == wanted.rope_parameters["rope_theta"]


def test_unsupported_architecture_is_refused_with_the_list_of_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        parse("FalconForCausalLM")
    for name in ("Falcon", "Llama", "Mistral", "Qwen2", "Qwen3"):
        assert f"{name}ForCausalLM" in str(refusal.value)


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("LlamaForCausalLM", "hidden_act", "gelu"),
        ("LlamaForCausalLM", "final_logit_softcapping", 30.0),
        ("LlamaForCausalLM", "attn_logit_softcapping", 50.0),
        ("LlamaForCausalLM", "quantization_config", {"quant_method": "gptq"}),
        ("LlamaForCausalLM", "auto_map", {"AutoModel": "modeling.Evil"}),
        ("LlamaForCausalLM", "sliding_window", 128),
        ("LlamaForCausalLM", "partial_rotary_factor", 0.5),
        ("LlamaForCausalLM", "rope_interleaved", True),
        ("LlamaForCausalLM", "use_sliding_window", True),
        ("LlamaForCausalLM", "per_layer_config", {"0": {"head_dim": 8}}),
        ("LlamaForCausalLM", "suppress_tokens", [3]),
        ("LlamaForCausalLM", "alibi", True),
        ("LlamaForCausalLM", "layer_types", ["sliding_attention"] * 3),
        ("MistralForCausalLM", "use_sliding_window", False),
        ("MistralForCausalLM", "layer_types", ["full_attention"] * 3),
        ("Qwen2ForCausalLM", "use_mrope", True),
        ("Qwen3ForCausalLM", "residual_multiplier", 0.5),
    ],
)
def test_key_that_would_change_output_is_refused_by_name(
    architecture: str, key: str, value: object
) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        parse(architecture, **{key: value})


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {"hidden_act": "swish"}),
        ("LlamaForCausalLM", {"pruned_heads": {}}),
        ("LlamaForCausalLM", {"quantization_config": {}}),
        ("LlamaForCausalLM", {"use_sliding_window": False}),
        ("LlamaForCausalLM", {"use_sliding_window": False, "sliding_window": 64}),
        ("LlamaForCausalLM", {"sliding_window": 512}),
        ("LlamaForCausalLM", {"sliding_window": None, "max_window_layers": 28}),
        ("LlamaForCausalLM", {"layer_types": ["full_attention"] * 3}),
        ("LlamaForCausalLM", {"head_dim": None, "rope_scaling": None, "num_experts": 0}),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "default"}}),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "default", "factor": 1.0}}),
        ("LlamaForCausalLM", {"residual_multiplier": 1.0, "logit_scale": 1}),
        ("LlamaForCausalLM", {"temperature": 0.6, "top_p": 0.9, "max_length": 4096}),
        ("LlamaForCausalLM", {"model_type": "llama"}),
        ("LlamaForCausalLM", {"some_new_key": {}}),
        ("MistralForCausalLM", {"attention_bias": True}),
        ("MistralForCausalLM", {"attention_bias": False, "mlp_bias": False}),
        ("MistralForCausalLM", {"use_sliding_window": True, "sliding_window": 4096}),
        ("MistralForCausalLM", {"use_sliding_window": False, "sliding_window": None}),
        ("MistralForCausalLM", {"layer_types": ["sliding_attention"] * 3}),
        ("Qwen2ForCausalLM", {"mlp_bias": True, "attention_bias": False}),
        ("Qwen2ForCausalLM", {"num_key_value_heads": None}),
    ],
)
def test_key_that_changes_nothing_is_accepted(architecture: str, changes: dict[str, Any]) -> None:
    """The model is the one without these keys, but for what they say themselves."""
    same = {key: value for key, value in changes.items() if key == "num_key_value_heads"}
    if architecture == "MistralForCausalLM" and "sliding_window" in changes:
        same["sliding_window"] = changes["sliding_window"]
    assert parse(architecture, **changes) == parse(architecture, **same)


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"],
)
def test_every_default_that_transformers_4_wrote_is_understood(architecture: str) -> None:
    assert parse(architecture, **DEFAULTS_OF_TRANSFORMERS_4) == parse(architecture)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_no_key_that_the_model_of_transformers_reads_is_passed_over(name: str) -> None:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    read = set(re.findall(r"\bconfig\.(\w+)", inspect.getsource(module)))
    # Dropout is for training; padding is not in a batch of ours.
    unlike = {"attention_dropout", "pad_token_id", "_attn_implementation"}
    assert {"hidden_size", "rms_norm_eps"} <= read
    assert read & HARMLESS == unlike & read


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq to 4 bits"),
        ({"quant_method": "fp8"}, "quantised by fp8,"),
        ({"load_in_4bit": True}, "by a method that it does not name"),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantised_model_is_refused_with_the_method(
    key: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        parse(**{key: config})


@pytest.mark.parametrize(
    "key", ["tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"]
)
@pytest.mark.parametrize("value", ["false", 0, 1, []])
def test_flag_that_is_neither_true_nor_false_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{key} = .* must be true or false"):
        parse(**{key: value})


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", ["1e-6", 0, -1, True, float("nan"), float("inf")])
def test_number_that_cannot_be_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{key} = .* number above 0"):
        parse(**{key: value})


def test_two_dtypes_that_differ_are_refused() -> None:
    assert parse(dtype="bfloat16", torch_dtype="torch.bfloat16").dtype == "bfloat16"
    with pytest.raises(ConfigError, match="dtype 'bfloat16' and torch_dtype 'float32'"):
        parse(dtype="bfloat16", torch_dtype="float32")


def test_model_type_of_another_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="model_type 'mistral'"):
        parse(model_type="mistral")


def test_generation_config_that_changes_every_answer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"generation_config\.json sets stop_strings"):
        parse_model_config(make_config(), {"stop_strings": ["x"]}, "config.json")
    parse_model_config(make_config(), {"temperature": 0.6, "stop_strings": None}, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"rope_scaling": {"rope_type": "linear", "factor": "two"}},
        {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"rope_scaling": {"rope_type": "linear", "factor": float("inf")}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": "false"}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
            }
        },
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        },
    ],
)
def test_scaling_of_rope_that_is_not_implemented_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"rope|rotary"):
        parse(**changes)


def test_old_and_new_form_of_rope_say_the_same() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = parse(rope_theta=5e5, rope_scaling=scaling)
    new = parse(rope_parameters=scaling | {"rope_theta": 5e5})
    assert old.rope == new.rope
    assert old.rope.type is RopeType.LLAMA3
    assert old.rope.theta == 5e5


def test_both_forms_of_rope_may_say_the_same() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    both = parse(rope_theta=5e5, rope_scaling=linear, rope_parameters=linear | {"rope_theta": 5e5})
    assert both.rope == parse(rope_theta=5e5, rope_scaling=linear).rope


def test_how_yarn_was_trained_changes_nothing() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    with_key = parse(rope_scaling=yarn | {"finetuned": True})
    assert with_key == parse(rope_scaling=yarn)


def test_frequency_factors_divide_the_frequencies_of_their_dimensions() -> None:
    factors = [1.0, 1.0, 1.0, 2.0, 2.0, 4.0, 8.0, 8.0]
    plain, divided = parse(), parse(rope_parameters={"frequency_factors": factors})
    ratio = inverse_frequencies(plain.rope, 16) / inverse_frequencies(divided.rope, 16)
    assert ratio.tolist() == factors


@pytest.mark.parametrize(
    ("factors", "message"),
    [([2.0] * 7, "7 frequency_factors"), ([1.0, 0.0], "above 0"), (2.0, "a list"), ("2", "a list")],
)
def test_wrong_frequency_factors_are_refused(factors: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(rope_parameters={"frequency_factors": factors})


def test_bias_of_the_attention_output_follows_the_others_unless_it_has_a_key() -> None:
    for bias in (False, True):
        assert parse(attention_bias=bias).o_bias is bias
        other = parse(attention_bias=bias, attention_out_bias=not bias)
        assert (other.qkv_bias, other.o_bias) == (bias, not bias)
    with pytest.raises(UnsupportedModelError, match="attention_out_bias"):
        parse("Qwen2ForCausalLM", attention_out_bias=True)


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("MistralForCausalLM", {"sliding_window": 9}, (9, 9, 9)),
        ("MistralForCausalLM", {"sliding_window": None}, (None, None, None)),
        ("MistralForCausalLM", {}, (4096, 4096, 4096)),
        ("Qwen2ForCausalLM", {"sliding_window": 9}, (None, None, None)),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 9),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            (9, None, None),
        ),
    ],
)
def test_windows_are_those_of_the_architecture(
    architecture: str, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert parse(architecture, **changes).windows == windows


def write_folder(folder: Path, config: object, generation: object, tokenizer: str | None) -> Path:
    """Write a folder with up to three end tokens; `tokenizer` is the text of one."""
    values = make_config(vocab_size=300) | {"eos_token_id": config}
    (folder / CONFIG).write_text(json.dumps(values))
    (folder / GENERATION).write_text(json.dumps({"eos_token_id": generation}))
    if tokenizer is not None:
        write_tokenizer(folder)
        (folder / TOKENIZER).write_text(json.dumps({"eos_token": tokenizer}))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "tokens"),
    [
        (None, None, None, {}),
        (3, None, None, {3: (CONFIG,)}),
        (None, [5, 6], None, {5: (GENERATION,), 6: (GENERATION,)}),
        (3, [5, 3], None, {3: (CONFIG, GENERATION), 5: (GENERATION,)}),
        (None, None, "<eos>", {EOS_ID: (TOKENIZER,)}),
        (3, 0, "<eos>", {3: (CONFIG,), 0: (GENERATION,), EOS_ID: (TOKENIZER,)}),
        (EOS_ID, EOS_ID, "<eos>", {EOS_ID: (CONFIG, GENERATION, TOKENIZER)}),
    ],
)
def test_end_tokens_are_those_of_all_files(
    config: object,
    generation: object,
    tokenizer: str | None,
    tokens: dict[int, tuple[str, ...]],
    tmp_path: Path,
) -> None:
    read = read_model_config(write_folder(tmp_path, config, generation, tokenizer))
    assert dict(read.end_tokens) == tokens
    assert read.eos_token_ids == tuple(tokens)


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "message"),
    [
        (300, None, None, r"/config\.json names the end-of-sequence token 300.*300 tokens"),
        ([1, -1], None, None, r"/config\.json names the end-of-sequence token -1"),
        (1, [300], None, r"/generation_config\.json names the end-of-sequence token 300"),
        (1, ["</s>"], None, r"/generation_config\.json names the end-of-sequence token '</s>'"),
        (True, None, None, r"/config\.json names the end-of-sequence token True"),
    ],
)
def test_end_token_that_cannot_be_is_refused_with_its_file(
    config: object, generation: object, tokenizer: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_model_config(write_folder(tmp_path, config, generation, tokenizer))


def test_end_token_of_the_tokenizer_must_be_in_the_models_vocabulary(tmp_path: Path) -> None:
    write_folder(tmp_path, None, None, "<eos>")
    (tmp_path / "config.json").write_text(json.dumps(make_config(vocab_size=EOS_ID)))
    with pytest.raises(ConfigError, match=rf"tokenizer_config\.json names .* {EOS_ID}, and"):
        read_model_config(tmp_path)


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size"])
def test_missing_shape_is_named(key: str) -> None:
    values = make_config()
    del values[key]
    with pytest.raises(ConfigError, match=key):
        parse_model_config(values, {}, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("sliding_window", value) for value in ("4096", -1, 0.5, float("nan"), [64])),
        *(("max_window_layers", value) for value in ("x", [2], -1)),
        *(("layer_types", value) for value in (5, True, [[]], [{}], [None])),
        *(("architectures", value) for value in ([[]], [{}], 5)),
        *(("num_hidden_layers", value) for value in (10**9, 2**70)),
        ("vocab_size", 2**31),
    ],
)
def test_value_of_another_kind_is_refused_by_its_key(key: str, value: object) -> None:
    values = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    with pytest.raises(ConfigError, match=key):
        parse("Qwen2ForCausalLM", **(values | {key: value}))


@pytest.mark.parametrize("value", [0, -1, 2.5, "many", True])
def test_impossible_shape_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        parse(num_hidden_layers=value)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 attention heads and 3 key-value heads"):
        parse(num_key_value_heads=3)


def test_config_that_is_missing_or_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 3, "a": [{"b": 1, "b": 1}]}')
    with pytest.raises(ConfigError, match="the key 'b' is there twice"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="no JSON object"):
        read_model_config(tmp_path)
