"""The runner's logits are transformers' logits, however a sequence is cut into steps and blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_references import VOCAB_SIZE, logits_of, make_model, save_model, write_model
from runner_driver import Row, RunnerDriver

CLOSE = {"rtol": 1e-4, "atol": 2e-4}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied-biased": (
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-one-kv-head": (
        "LlamaForCausalLM",
        {"num_key_value_heads": 1, "num_attention_heads": 8, "head_dim": 8},
    ),
    "llama-no-groups": ("LlamaForCausalLM", {"num_key_value_heads": 4, "head_dim": 32}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 21}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-some-windows": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 24}),
    "qwen3-biased": ("Qwen3ForCausalLM", {"head_dim": 16, "attention_bias": True}),
}
SCALED_ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-own-factors": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
}


on_a_gpu = [
    pytest.mark.gpu,
    # Triton's interpreter would take an hour: tests/engine/gpu has short tests for it.
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=on_a_gpu)])
def kind(request: pytest.FixtureRequest) -> str:
    """The runner's device."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB_SIZE, count)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_every_position_equal_those_of_transformers(
    name: str, kind: str, tmp_path: Path
) -> None:
    architecture, changes = ARCHITECTURES[name]
    model = write_model(tmp_path, architecture, **changes)
    tokens = random_tokens(75)
    expected = logits_of(model, tokens)
    driver = RunnerDriver(tmp_path, kind=kind)
    driver.start(0)
    _, logits = driver.step(Row(0, tokens, sample="all"))
    torch.testing.assert_close(logits, expected, **CLOSE)
    # The same by chunks and single tokens.
    driver.start(1)
    parts = [
        driver.step(Row(1, tokens[a:b], sample="all"))[1]
        for a, b in ((0, 5), (5, 37), (37, 38), (38, 39), (39, 48), (48, 75))
    ]
    torch.testing.assert_close(torch.cat(parts), expected, **CLOSE)


@pytest.mark.parametrize("name", SCALED_ROPE)
def test_scaled_rotary_embeddings_equal_those_of_transformers(
    name: str, kind: str, tmp_path: Path
) -> None:
    rope = SCALED_ROPE[name] | {"rope_theta": 1000.0}
    model = write_model(tmp_path, "LlamaForCausalLM", rope_parameters=rope)
    tokens = random_tokens(200)
    driver = RunnerDriver(tmp_path, kind=kind)
    driver.start(0)
    _, logits = driver.step(Row(0, tokens, sample="all"))
    torch.testing.assert_close(logits, logits_of(model, tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block_tokens", [16, 32])
@pytest.mark.parametrize("chunk", [1, 7, 16, 33, 64])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-some-windows"])
def test_chunk_and_block_size_do_not_change_logits(
    name: str, chunk: int, block_tokens: int, kind: str, tmp_path: Path
) -> None:
    architecture, changes = ARCHITECTURES[name]
    model = write_model(tmp_path, architecture, **changes)
    tokens = random_tokens(97, seed=chunk)
    driver = RunnerDriver(tmp_path, kind=kind, block_tokens=block_tokens)
    driver.start(0)
    parts = [
        driver.step(Row(0, tokens[at : at + chunk], sample="all"))[1]
        for at in range(0, len(tokens), chunk)
    ]
    torch.testing.assert_close(torch.cat(parts), logits_of(model, tokens), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3"])
def test_prompts_of_all_lengths_and_decode_share_steps(
    name: str, kind: str, tmp_path: Path
) -> None:
    architecture, changes = ARCHITECTURES[name]
    model = write_model(tmp_path, architecture, **changes)
    driver = RunnerDriver(tmp_path, kind=kind)
    sequences = {slot: random_tokens(3 + 29 * slot, seed=slot) for slot in range(8)}
    for slot in sequences:
        driver.start(slot)
    chunk = 40
    while any(len(tokens) < 3 + 29 * slot + 6 for slot, tokens in sequences.items()):
        rows = []
        for slot, tokens in sequences.items():
            done = driver.lengths[slot]
            if done >= 3 + 29 * slot + 5:
                continue
            decoding = done == len(tokens) - 1 and done >= 3 + 29 * slot
            ready = done + chunk >= len(tokens)
            part = None if decoding else tokens[done : done + chunk]
            rows.append(Row(slot, part, sample="last" if decoding or ready else "none"))
        result, logits = driver.step(*rows)
        sampled = [row for row in rows if row.sample == "last"]
        for row, token, row_logits in zip(sampled, result.token_ids, logits, strict=True):
            expected = logits_of(model, sequences[row.slot])[-1]
            torch.testing.assert_close(row_logits, expected, **CLOSE)
            sequences[row.slot].append(int(token))


def test_rows_of_very_different_lengths_decode_together(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, "LlamaForCausalLM")
    driver = RunnerDriver(tmp_path, kind=kind)
    sequences = {slot: random_tokens(n, slot) for slot, n in enumerate((1, 400, 17, 64, 250))}
    for slot, tokens in sequences.items():
        driver.start(slot)
        if tokens[:-1]:
            driver.step(Row(slot, tokens[:-1], sample="none"))
    _, logits = driver.step(*(Row(slot, tokens[-1:]) for slot, tokens in sequences.items()))
    expected = torch.stack([logits_of(model, tokens)[-1] for tokens in sequences.values()])
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_cached_prefix_blocks_serve_another_sequence(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, "Qwen2ForCausalLM")
    prefix, tail = random_tokens(48), random_tokens(30, seed=1)
    driver = RunnerDriver(tmp_path, kind=kind)
    driver.start(0)
    driver.step(Row(0, prefix + random_tokens(9, seed=2), sample="none"))
    driver.start(1, blocks=driver.tables[0][:3], num_tokens=48)
    _, logits = driver.step(Row(1, tail, sample="all"))
    torch.testing.assert_close(logits, logits_of(model, prefix + tail)[48:], **CLOSE)


def test_a_foreign_block_or_a_position_off_changes_the_logits(kind: str, tmp_path: Path) -> None:
    """The check above would notice a wrong block table.

    Swapping two whole blocks of one prefix would show nothing: keys carry their positions.
    """
    model = write_model(tmp_path, "Qwen2ForCausalLM")
    prefix, tail = random_tokens(48), random_tokens(30, seed=1)
    expected = logits_of(model, prefix + tail)[48:]
    driver = RunnerDriver(tmp_path, kind=kind)
    for slot, tokens in ((0, prefix), (1, random_tokens(48, seed=2))):
        driver.start(slot)
        driver.step(Row(slot, tokens, sample="none"))
    first, _, third = driver.tables[0]
    driver.start(2, blocks=[first, driver.tables[1][1], third], num_tokens=48)
    _, foreign = driver.step(Row(2, tail, sample="all"))
    driver.start(3, blocks=driver.tables[0], num_tokens=47)
    driver.copy_block(3, 2)
    _, off = driver.step(Row(3, tail, sample="all"))
    for logits in (foreign, off):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(logits, expected, **CLOSE)


def test_forks_share_blocks_until_one_writes(kind: str, tmp_path: Path) -> None:
    """Two choices sample from one position, then go separate ways over a copied last block."""
    model = write_model(tmp_path, "LlamaForCausalLM")
    prompt = random_tokens(21)
    driver = RunnerDriver(tmp_path, kind=kind)
    driver.start(0)
    driver.start(1)
    result, _ = driver.step(Row(0, prompt, sample_slots=[0, 1]))
    assert result.token_ids[0] == result.token_ids[1]
    for block in driver.tables[0]:
        driver._append_block(1, block)
    driver.lengths[1] = len(prompt)
    driver.copy_block(1, 1)
    ours, theirs = [int(result.token_ids[0])], [5]
    _, logits = driver.step(Row(0, None), Row(1, theirs))
    expected = [logits_of(model, prompt + ours)[-1], logits_of(model, prompt + theirs)[-1]]
    torch.testing.assert_close(logits, torch.stack(expected), **CLOSE)
    assert driver.tables[0][0] == driver.tables[1][0]
    assert driver.tables[0][1] != driver.tables[1][1]


def test_slot_can_be_used_again_by_a_shorter_sequence(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, "LlamaForCausalLM")
    driver = RunnerDriver(tmp_path, kind=kind)
    driver.start(0)
    driver.step(Row(0, random_tokens(90), sample="none"))
    driver.start(0)
    tokens = random_tokens(20, seed=3)
    _, logits = driver.step(Row(0, tokens, sample="all"))
    torch.testing.assert_close(logits, logits_of(model, tokens), **CLOSE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_deviates_no_more_than_transformers_own(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    if (kind, dtype) == ("cpu", "float16"):
        pytest.skip("CPUs refuse float16")
    model = make_model("LlamaForCausalLM")
    tokens = random_tokens(90)
    save_model(model, tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
    exact = type(model).from_pretrained(tmp_path, dtype=half.dtype).to(torch.float32).eval()
    expected = logits_of(exact, tokens)
    driver = RunnerDriver(tmp_path, kind=kind, dtype=dtype)
    driver.start(0)
    parts = [driver.step(Row(0, tokens[:60], sample="all"))[1]]
    parts += [driver.step(Row(0, [token]))[1] for token in tokens[60:]]
    ours = (torch.cat(parts) - expected).abs()
    theirs = (logits_of(half, tokens) - expected).abs()
    assert ours.mean() <= 1.5 * theirs.mean()
    assert ours.max() <= 2.0 * theirs.max()


def test_a_failed_step_raises_when_its_result_is_asked_for(kind: str, tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    driver = RunnerDriver(tmp_path, kind=kind)
    driver.start(0)
    with pytest.raises(IndexError):
        driver.step(Row(0, [VOCAB_SIZE + 5]))
    driver.runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        driver.step(Row(0, [1]))
