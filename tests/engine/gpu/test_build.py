"""A runner is built from a measured step, and computes with what it was built from."""

import gc
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from model_references import write_model
from runner_driver import RunnerDriver
from triton_device import device

from paceline.engine.gpu import build
from paceline.engine.gpu.build import GRAPH_BYTES, OTHER_CHUNKS, GpuBuild, build_runner
from paceline.engine.gpu.graphs import graph_sizes, padded_tokens
from paceline.engine.gpu.model_runner import GpuModelRunner
from paceline.engine.gpu.prefill_plan import LONGEST_CHUNKS
from paceline.engine.gpu.step_inputs import RowShape
from paceline.engine.gpu.step_kernels import MAX_SKINNY_ROWS
from paceline.engine.gpu.step_layers import Computed, StepLayers
from paceline.engine.model_config import read_model_config
from paceline.engine.models.llama import LlamaModel
from paceline.engine.parallel import ParallelContext
from paceline.engine.settings import EngineSettings
from paceline.engine.step_kernels import StepModel
from paceline.engine.warm_up import warm_up
from paceline.engine.weights import dummy_weights, load_weights
from paceline.kernels.rms_norm_triton import choose_tile as choose_rms_tile
from paceline.kernels.rope_kv_write_triton import choose_tile as choose_rope_tile
from paceline.kernels.silu_mul_triton import choose_tile as choose_silu_tile
from paceline.kernels.skinny_tiles import choose_tiles as choose_skinny_tiles
from paceline.kv_layout import attention_layout

DEVICE = torch.device(device())


def test_a_runner_is_built_in_the_steps_of_the_checklist(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM", num_hidden_layers=1)
    config = read_model_config(tmp_path)
    weights = load_weights(
        tmp_path, config, torch.float32, ParallelContext(), lambda done, total: None
    )
    layout = attention_layout(
        num_layers=1, num_kv_heads=2, head_dim=16, block_tokens=16, dtype="float32"
    )
    settings = EngineSettings(num_kv_blocks=9, max_num_seqs=2, max_num_batched_tokens=16)
    on_device = {name: tensor.to(device()) for name, tensor in weights.items()}
    model = LlamaModel(config, on_device)
    built = GpuBuild(
        config, model, model.shortened(2), 4, layout, settings, 64, torch.device(device())
    )
    steps: list[str] = []

    def timed(name: str) -> AbstractContextManager[None]:
        steps.append(name)
        return nullcontext()

    shares: list[float] = []
    runner, pool, plan = build_runner(
        built,
        captures=True,
        decodes=True,
        timed=timed,
        on_progress=lambda name, share: shares.append(share),
    )
    assert [step.split()[0] for step in steps] == ["compile", "measure", "allocate", "capture"]
    assert "9 blocks" in steps[2]
    assert "9 CUDA graphs" in steps[3]
    assert shares == [number / 9 for number in range(1, 10)]
    assert pool.num_blocks == 9
    assert plan.graphs > 0
    warm_up(runner, 16)
    runner.close()


def test_memory_is_kept_for_every_graph_though_a_step_has_fewer_tokens_than_sequences(
    tmp_path: Path,
) -> None:
    write_model(tmp_path, "LlamaForCausalLM", num_hidden_layers=1, intermediate_size=32)
    config = read_model_config(tmp_path)
    weights = load_weights(
        tmp_path, config, torch.float32, ParallelContext(), lambda done, total: None
    )
    on_device = {name: tensor.to(device()) for name, tensor in weights.items()}
    layout = attention_layout(
        num_layers=1, num_kv_heads=2, head_dim=16, block_tokens=16, dtype="float32"
    )
    settings = EngineSettings(num_kv_blocks=9, max_num_seqs=32, max_num_batched_tokens=16)
    model = LlamaModel(config, on_device)
    built = GpuBuild(
        config, model, model.shortened(2), 4, layout, settings, 32, torch.device(device())
    )
    runner, _, plan = build_runner(
        built,
        captures=True,
        decodes=False,
        timed=lambda name: nullcontext(),
        on_progress=lambda name, share: None,
    )
    assert runner.num_graphs(decodes=False) == 2  # of 16 and of 32 tokens
    assert plan.graphs >= runner.num_graphs(decodes=False) * GRAPH_BYTES
    runner.close()


def make_build(folder: Path, settings: EngineSettings, max_model_len: int) -> GpuBuild:
    write_model(folder, "LlamaForCausalLM", num_hidden_layers=1)
    config = read_model_config(folder)
    layout = attention_layout(
        num_layers=1, num_kv_heads=2, head_dim=16, block_tokens=16, dtype="float32"
    )
    weights = dummy_weights(
        config, torch.float32, ParallelContext(), lambda done, total: None, device=DEVICE
    )
    model = LlamaModel(config, weights)
    return GpuBuild(config, model, model.shortened(1), 4, layout, settings, max_model_len, DEVICE)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepModel, RowShape]]:
    """The models and shapes of steps, none of which is computed."""
    seen: list[tuple[StepModel, RowShape]] = []

    def run(layers: StepLayers, shape: RowShape, *args: object, **kwargs: object) -> Computed:
        seen.append((layers._model, shape))
        arrays = layers._rows.arrays(shape)
        return Computed(torch.empty(0), arrays.sample_slots, arrays.sample_indices)

    monkeypatch.setattr(StepLayers, "_run", run)
    monkeypatch.setattr(GpuModelRunner, "_sample", lambda *args: None)
    return seen


@pytest.mark.parametrize("max_tokens", [100, 1000, 4096])
def test_start_up_runs_every_size_of_a_product_in_steps_without_a_graph(
    max_tokens: int, tmp_path: Path, launched: list[tuple[StepModel, RowShape]]
) -> None:
    settings = EngineSettings(num_kv_blocks=9, max_num_seqs=16, max_num_batched_tokens=max_tokens)
    built = make_build(tmp_path, settings, max_model_len=300)
    build._run_every_size(built, built.make_sampler())
    assert all(model is built.short_model for model, _ in launched)
    # 896 too, which is no prompt's shape, but is launched with specialized tiles.
    sizes = {padded_tokens(n, max_tokens) for n in range(MAX_SKINNY_ROWS + 1, max_tokens + 1)}
    assert sizes <= {shape.num_tokens for _, shape in launched}
    assert set(graph_sizes(16)) <= {shape.num_samples for _, shape in launched}


@pytest.mark.parametrize("max_num_seqs", [1, 3])
def test_start_up_runs_the_largest_step_that_so_few_short_sequences_make(
    max_num_seqs: int, tmp_path: Path, launched: list[tuple[StepModel, RowShape]]
) -> None:
    settings = EngineSettings(
        num_kv_blocks=9, max_num_seqs=max_num_seqs, max_num_batched_tokens=2048
    )
    built = make_build(tmp_path, settings, max_model_len=90)
    build._run_every_size(built, built.make_sampler())
    largest = padded_tokens(90 * max_num_seqs, 2048)
    assert max(shape.num_tokens for _, shape in launched) == largest


def test_memory_is_kept_for_the_largest_graph_though_a_sequence_is_shorter(
    tmp_path: Path, launched: list[tuple[StepModel, RowShape]]
) -> None:
    settings = EngineSettings(num_kv_blocks=9, max_num_seqs=4, max_num_batched_tokens=512)
    built = make_build(tmp_path, settings, max_model_len=32)
    runner, _ = built.make_runner(built.make_sampler(), num_blocks=2)

    build._graph_bytes(runner, built, 0, decodes=False)
    assert max(shape.num_tokens for _, shape in launched) == 512
    runner.close()


@pytest.mark.parametrize("max_tokens", [64, 512, 8192])
def test_start_up_runs_a_step_for_every_tile_that_serving_can_choose(max_tokens: int) -> None:
    """Kernels are compiled when a tile is first used, and no request should wait for that."""
    lengths = {min(length, max_tokens) for length in (*LONGEST_CHUNKS, *OTHER_CHUNKS)}

    def choices(counts: Iterable[int]) -> set[object]:
        return {
            choice
            for count in counts
            for choice in (
                ("rope", choose_rope_tile(count, 128)),
                ("silu", count > MAX_SKINNY_ROWS and choose_silu_tile(count)),
                ("rms", choose_rms_tile(4096)),
                (
                    "product",
                    count <= MAX_SKINNY_ROWS
                    and choose_skinny_tiles(count, 4096, 4096, torch.bfloat16),
                ),
            )
        }

    assert choices(range(1, max_tokens + 1)) <= choices(lengths)


def test_a_closed_runner_holds_no_pool(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM", num_hidden_layers=1)
    driver = RunnerDriver(tmp_path, kind="gpu", num_slots=2, num_blocks=4)
    memory = weakref.ref(driver.pool.kv)
    driver.runner.close()
    del driver.pool
    gc.collect()
    assert memory() is None
