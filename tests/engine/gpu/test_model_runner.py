"""The GPU's runner in short steps, which Triton's interpreter manages: logits and tokens are those
of the reference, whatever is padded, mixed, forked, logged or started anew.

tests/engine/test_model_runner.py compares much more of it, on a GPU alone.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from model_references import VOCAB_SIZE, logits_of, write_model
from runner_driver import Row, RunnerDriver
from triton_device import device

from paceline.engine.gpu import step_kernels
from paceline.engine.gpu.graphs import PromptShape
from paceline.engine.gpu.model_runner import GpuModelRunner
from paceline.engine.gpu.step_layers import Computed
from paceline.engine.step_plan import StepPlan
from paceline.kernels.rope_kv_write_triton import rope_kv_write_triton
from paceline.kernels.silu_mul_triton import silu_mul_triton

CLOSE = {"rtol": 1e-4, "atol": 2e-4}
SMALL = {"num_hidden_layers": 2, "intermediate_size": 64}


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB_SIZE, count)]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen3ForCausalLM", {"head_dim": 24}),
        ("MistralForCausalLM", {"sliding_window": 7}),
    ],
)
@pytest.mark.parametrize("pads_prompts", [False, True])
def test_chunks_and_decode_steps_give_the_reference_s_logits(
    architecture: str, changes: dict[str, object], pads_prompts: bool, tmp_path: Path
) -> None:
    model = write_model(tmp_path, architecture, **SMALL, **changes)
    driver = RunnerDriver(tmp_path, kind="gpu", num_slots=3, pads_prompts=pads_prompts)
    tokens, other = random_tokens(11), random_tokens(5, seed=1)
    driver.start(0)
    driver.start(2)
    # A chunk, then one beside another prompt's; then three decode rows padded to four.
    driver.step(Row(0, tokens[:6], sample="none"))
    _, logits = driver.step(Row(0, tokens[6:]), Row(2, other))
    expected = [logits_of(model, tokens)[-1], logits_of(model, other)[-1]]
    torch.testing.assert_close(logits, torch.stack(expected), **CLOSE)
    outputs = [[int(row.argmax())] for row in logits]
    for _ in range(2):
        result, logits = driver.step(Row(0, None), Row(2, None))
        expected = [
            logits_of(model, prompt + output)[-1]
            for prompt, output in zip((tokens, other), outputs, strict=True)
        ]
        torch.testing.assert_close(logits, torch.stack(expected), **CLOSE)
        for output, token in zip(outputs, result.token_ids, strict=True):
            output.append(int(token))


def test_captured_steps_give_the_tokens_of_launched_ones(tmp_path: Path) -> None:
    """Without CUDA a captured step is launched too, but at its padded size in the same way."""
    write_model(tmp_path, "LlamaForCausalLM", **SMALL)
    outputs = []
    for captured in (False, True):
        driver = RunnerDriver(tmp_path, kind="gpu", num_slots=3)
        assert isinstance(driver.runner, GpuModelRunner)
        if captured:
            driver.runner.capture_graphs()
        driver.start(0)
        driver.start(1)
        result, _ = driver.step(Row(0, random_tokens(5)), Row(1, random_tokens(3, seed=2)))
        got = [result.token_ids.tolist()]
        got += [driver.step(Row(0, None), Row(1, None))[0].token_ids.tolist() for _ in range(3)]
        outputs.append(got)
    assert outputs[0] == outputs[1]


def recorded(
    replay: Callable[[PromptShape], Computed], shapes: list[PromptShape]
) -> Callable[[PromptShape], Computed]:
    def replay_recorded(shape: PromptShape) -> Computed:
        shapes.append(shape)
        return replay(shape)

    return replay_recorded


@pytest.mark.parametrize("seed", range(3))
def test_padded_steps_with_prompts_give_the_tokens_of_launched_ones(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks and decode rows in any mixture; with and without one kernel a row for all of them."""
    changes = {"sliding_window": 9} if seed == 1 else {}
    write_model(tmp_path, "MistralForCausalLM", **SMALL, **changes)
    outputs = []
    shapes: list[PromptShape] = []
    for captured in (False, True):
        draw = np.random.default_rng(seed)
        driver = RunnerDriver(tmp_path, kind="gpu", num_slots=6, pads_prompts=captured)
        runner = driver.runner
        assert isinstance(runner, GpuModelRunner)
        if captured:
            runner.capture_graphs()
            prompts = runner._layers._prompts
            monkeypatch.setattr(prompts, "replay", recorded(prompts.replay, shapes))
        got: list[list[int]] = []
        decoding: list[int] = []
        for _ in range(5):
            rows = [Row(slot, None) for slot in decoding if draw.random() < 0.7]
            for slot in draw.permutation(6)[:3].tolist():
                if slot not in decoding:
                    if slot not in driver.lengths:
                        driver.start(slot)
                    is_last = draw.random() < 0.6
                    tokens = draw.integers(
                        0, VOCAB_SIZE, int(draw.integers(1, 9 * (seed + 1)))
                    ).tolist()
                    rows.append(Row(slot, tokens, sample="last" if is_last else "none"))
                    decoding += [slot] if is_last else []
            got.append(driver.step(*rows)[0].token_ids.tolist() if rows else [])
        outputs.append(got)
    assert outputs[0] == outputs[1]
    assert len(shapes) >= 3


@pytest.mark.parametrize("pads_prompts", [False, True])
def test_a_row_between_decode_rows_and_a_fork_attend_to_their_own_blocks(
    pads_prompts: bool, tmp_path: Path
) -> None:
    model = write_model(tmp_path, "LlamaForCausalLM", **SMALL)
    driver = RunnerDriver(tmp_path, kind="gpu", num_slots=4, pads_prompts=pads_prompts)
    prompt, chunk = random_tokens(5), random_tokens(4, seed=3)
    for slot in range(3):
        driver.start(slot)
    result, _ = driver.step(Row(0, prompt, sample_slots=[0, 1]))
    token = int(result.token_ids[0])
    driver._append_block(1, driver.tables[0][0])
    driver.lengths[1] = len(prompt)
    driver.copy_block(1, 0)
    _, logits = driver.step(Row(0, None), Row(2, chunk), Row(1, [7]))
    expected = [logits_of(model, tokens)[-1] for tokens in ([*prompt, token], chunk, [*prompt, 7])]
    torch.testing.assert_close(logits, torch.stack(expected), **CLOSE)


def test_decode_rows_need_no_kernel_to_rotate_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path, "Qwen3ForCausalLM", **SMALL)
    driver = RunnerDriver(tmp_path, kind="gpu", num_slots=3, pads_prompts=False)
    prompts = [random_tokens(5), random_tokens(9, seed=1), random_tokens(4, seed=2)]
    for slot in range(3):
        driver.start(slot)
    result, _ = driver.step(Row(0, prompts[0]), Row(1, prompts[1]))
    grown = [
        [*prompt, int(token)] for prompt, token in zip(prompts, result.token_ids, strict=False)
    ]
    rotated: list[int] = []

    def rotate(qkv: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        rotated.append(len(qkv))
        return rope_kv_write_triton(qkv, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(step_kernels, "rope_kv_write_triton", rotate)
    result, logits = driver.step(Row(0, None), Row(1, None), Row(2, prompts[2]))
    assert rotated == [4, 4]  # a layer each: the chunk's tokens alone
    expected = [logits_of(model, tokens)[-1] for tokens in (*grown, prompts[2])]
    torch.testing.assert_close(logits, torch.stack(expected), **CLOSE)
    _, logits = driver.step(*(Row(slot, None) for slot in range(3)))
    assert rotated == [4, 4]
    grown.append(prompts[2])
    expected = [
        logits_of(model, [*tokens, int(token)])[-1]
        for tokens, token in zip(grown, result.token_ids, strict=True)
    ]
    torch.testing.assert_close(logits, torch.stack(expected), **CLOSE)


def test_the_head_s_product_has_few_sizes_in_steps_that_are_launched_as_they_are(
    tmp_path: Path,
) -> None:
    write_model(tmp_path, "LlamaForCausalLM", **SMALL)
    driver = RunnerDriver(tmp_path, kind="gpu", num_slots=6, pads_prompts=False)
    for slot in range(3):
        driver.start(slot)
    result, _ = driver.step(*(Row(slot, random_tokens(2 + slot)) for slot in range(3)))
    assert len(result.token_ids) == 3
    assert len(driver.model.logits[-1]) == 4
    driver.step(Row(0, [1, 2], sample="none"))
    assert len(driver.model.logits[-1]) == 0


def test_steps_that_are_launched_as_they_are_give_the_reference_s_logits_in_few_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path, "LlamaForCausalLM", **SMALL)
    driver = RunnerDriver(tmp_path, kind="gpu", num_slots=3, pads_prompts=False)
    heights: list[int] = []

    def recorded(x: torch.Tensor) -> torch.Tensor:
        heights.append(len(x))
        return silu_mul_triton(x)

    monkeypatch.setattr(step_kernels, "silu_mul_triton", recorded)
    tokens, other = random_tokens(70), random_tokens(5, seed=1)
    driver.start(0)
    driver.start(1)
    _, logits = driver.step(Row(0, tokens), Row(1, other))
    expected = [logits_of(model, tokens)[-1], logits_of(model, other)[-1]]
    torch.testing.assert_close(logits, torch.stack(expected), **CLOSE)
    assert heights == [128]  # of the last layer, only samples


def test_what_no_kernel_may_see_is_refused_and_the_runner_goes_on(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM", **SMALL)
    driver = RunnerDriver(tmp_path, kind="gpu", num_slots=2)
    driver.start(0)
    with pytest.raises(IndexError, match=f"the vocabulary has {VOCAB_SIZE}"):
        driver.step(Row(0, [VOCAB_SIZE]))
    driver.start(0)
    with pytest.raises(ValueError, match="601 new tokens; the runner was made for"):
        driver.step(Row(0, [1] * 601))
    driver.start(0)
    result, _ = driver.step(Row(0, [1, 2]))
    assert len(result.token_ids) == 1
    driver.runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        driver.step(Row(0, None))


def test_a_sequence_longer_than_the_model_is_refused_though_its_last_block_has_room(
    tmp_path: Path,
) -> None:
    """Kernels leave such a row as it is, and its token would be of memory that nobody wrote."""
    write_model(tmp_path, "LlamaForCausalLM", **{**SMALL, "max_position_embeddings": 100})
    driver = RunnerDriver(tmp_path, kind="gpu", num_slots=2)
    driver.start(0)
    driver.step(Row(0, [1] * 99))
    driver.step(Row(0, [1]))
    with pytest.raises(ValueError, match="101 tokens; the runner was made for 100"):
        driver.step(Row(0, [1]))


def test_tokens_never_written_are_never_read(tmp_path: Path) -> None:
    """With a pool and tables full of garbage, a short sequence's logits are finite and right."""
    model = write_model(tmp_path, "LlamaForCausalLM", **SMALL)
    driver = RunnerDriver(tmp_path, kind="gpu", num_slots=2)
    driver.pool.kv.fill_(float("nan"))
    assert isinstance(driver.runner, GpuModelRunner)
    driver.runner._slots.tables.fill_(10**6)
    driver.runner._layers._row_tables.fill_(10**6)
    driver.start(1)
    _, logits = driver.step(Row(1, [5, 6, 7]))
    torch.testing.assert_close(logits[0], logits_of(model, [5, 6, 7])[-1], **CLOSE)
    assert device() in str(driver.pool.kv.device)


def test_a_table_entry_set_twice_is_refused(tmp_path: Path) -> None:
    """Two threads of the device would write it, in an open order."""
    write_model(tmp_path, "LlamaForCausalLM", **SMALL)
    driver = RunnerDriver(tmp_path, kind="gpu", num_slots=2)
    entry = np.zeros(2, np.int32)
    plan = StepPlan(
        step_id=1,
        slots=entry[:1],
        starts=entry[:1],
        num_new_tokens=entry[:1] + 1,
        from_last_sample=np.array([False]),
        tokens=entry[:1],
        sample_positions=entry[:0],
        sample_slots=entry[:0],
        sample_indices=entry[:0],
        table_slots=entry,
        table_columns=entry,
        table_blocks=np.arange(2, dtype=np.int32),
    )
    with pytest.raises(ValueError, match="sets an entry of a block table twice"):
        driver.runner.launch(plan).result()
