"""Loading an engine: sizes and limits from settings, and what does not fit refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_references import logits_of, write_model

from paceline.engine import load as load_module
from paceline.engine.load import LoadedEngine, load_engine
from paceline.engine.model_source import prepare_model
from paceline.engine.settings import EngineSettings, ModelSettings
from paceline.engine.step_plan import SlotStart, StepPlan
from paceline.errors import CapacityError, ConfigError
from paceline.sampling_params import SamplingParams


def load(
    folder: Path, steps: list[tuple[str, float]] | None = None, **changes: Any
) -> LoadedEngine:
    names = ModelSettings.model_fields
    model = ModelSettings(
        path=str(folder), **{key: value for key, value in changes.items() if key in names}
    )
    sizes: dict[str, Any] = {
        "num_kv_blocks": 20,
        "kv_cache_bytes": 1 << 20,
        "max_num_seqs": 4,
        "num_threads": 1,
    }
    sizes |= {key: value for key, value in changes.items() if key not in names}
    allocate = sizes.pop("allocate", lambda count: torch.zeros(count, dtype=torch.uint8))
    return load_engine(
        model,
        prepare_model(model, folder / "cache", lambda name, share: None),
        EngineSettings(**sizes),
        block_tokens=16,
        allocate=allocate,
        on_step=lambda *step: steps.append(step) if steps is not None else None,
    )


def array(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_loaded_engine_runs_a_step_with_the_real_sampler(tmp_path: Path) -> None:
    model = write_model(tmp_path, "LlamaForCausalLM")
    steps: list[tuple[str, float]] = []
    engine = load(tmp_path, steps, max_model_len=64)
    assert (engine.num_blocks, engine.max_model_len) == (20, 64)
    assert [name for name, _ in steps] == ["load weights", "allocate the KV pool"]
    prompt = array(5, 6, 7)
    plan = StepPlan(
        step_id=1,
        slots=array(2),
        starts=array(0),
        num_new_tokens=array(3),
        from_last_sample=np.array([False]),
        tokens=prompt,
        sample_positions=array(2),
        sample_slots=array(2),
        sample_indices=array(0),
        slot_starts=[SlotStart(2, SamplingParams(temperature=0.0, logprobs=1), 0, prompt, array())],
        table_slots=array(2),
        table_columns=array(0),
        table_blocks=array(11),
    )
    handle = engine.runner.launch(plan)
    assert handle.done()
    result = handle.result()
    logits = logits_of(model, [5, 6, 7])[-1]
    assert result.token_ids.tolist() == [int(logits.argmax())]
    assert result.logprobs[0].logprob == pytest.approx(
        float(logits.log_softmax(-1).max()), abs=1e-4
    )


def test_pool_is_sized_by_bytes_when_blocks_are_not_given(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    engine = load(tmp_path, num_kv_blocks=None)
    assert engine.num_blocks == (1 << 20) // engine.layout.block_bytes


def test_more_memory_than_there_is_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")

    def allocate(num_bytes: int) -> torch.Tensor:
        raise AssertionError(f"{num_bytes} bytes were asked for")

    with pytest.raises(CapacityError, match="Lower num_kv_blocks to at most"):
        load(tmp_path, num_kv_blocks=1 << 40, allocate=allocate)


def test_longer_sequences_than_the_model_knows_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    with pytest.raises(ConfigError, match="max_model_len to at most 512"):
        load(tmp_path, max_model_len=513)


def test_half_precision_is_refused_unless_another_is_chosen(tmp_path: Path) -> None:
    model = write_model(tmp_path, "LlamaForCausalLM")
    model.to(torch.float16).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="float16"):
        load(tmp_path)
    assert load(tmp_path, dtype="bfloat16").pool.kv.dtype is torch.bfloat16


def test_random_weights_need_no_files_and_revisions_tell_precisions_apart(tmp_path: Path) -> None:
    write_model(tmp_path, "Qwen3ForCausalLM")
    (tmp_path / "model.safetensors").unlink()
    engine = load(tmp_path, load_format="dummy", dtype="float32")
    other = load(tmp_path, load_format="dummy", dtype="bfloat16")
    assert engine.model_revision != other.model_revision


def test_revisions_tell_end_tokens_apart(tmp_path: Path) -> None:
    """Workers that end at other tokens would continue each other's requests differently."""
    write_model(tmp_path, "LlamaForCausalLM")
    first = load(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7]}')
    assert load(tmp_path).model_revision != first.model_revision


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused_with_the_reason(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    with pytest.raises(ConfigError, match=r"device is cuda, and torch .* Or set device to cpu"):
        load(tmp_path, device="cuda")


def test_a_folder_that_changes_while_it_is_loaded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    load_weights = load_module.load_weights

    def change_first(*arguments: Any, **options: Any) -> Any:
        write_model(tmp_path, "LlamaForCausalLM", seed=1)
        return load_weights(*arguments, **options)

    monkeypatch.setattr(load_module, "load_weights", change_first)
    with pytest.raises(ConfigError, match="changed while the model was being loaded"):
        load(tmp_path)
