"""The engine's benchmark: its plans are sound, its floors and traces add up, and it runs."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paceline.bench.engine import main, parse_counts, parse_points
from paceline.bench.gpu_rates import Rates
from paceline.bench.gpu_trace import (
    DeviceEvent,
    KernelTotal,
    busy_us,
    device_events,
    kernel_totals,
    short_name,
)
from paceline.bench.llm_shapes import SHAPES, model_folder
from paceline.bench.model_costs import floor_s, num_bytes, num_flops, step_operations
from paceline.bench.startup import StartUp
from paceline.bench.step_benchmark import SAMPLED, SAMPLER_KERNELS, Point
from paceline.bench.step_driver import StepDriver
from paceline.engine.load import LoadedEngine
from paceline.engine.model_config import ModelConfig, read_model_config
from paceline.engine.settings import EngineSettings, ModelSettings
from paceline.engine.step_plan import StepPlan
from paceline.errors import CapacityError, ConfigError
from paceline.kernels import sampling

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
RATES = Rates(read_bytes_per_s=4.45e12, matrix_flop_per_s=700e12)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


@pytest.fixture
def engine(tiny_folder: Path) -> LoadedEngine:
    model = ModelSettings(path=str(tiny_folder), load_format="dummy", dtype="float32")
    return StartUp("cpu").load(model, EngineSettings(num_kv_blocks=40, max_num_seqs=4), 8)


def config_of(name: str, folder: Path) -> ModelConfig:
    return read_model_config(model_folder(name, folder))


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3-8b", 8.03), ("qwen3-0.6b", 0.596), ("smollm2-135m", 0.1345)]
)
def test_shapes_have_the_weights_of_their_models(
    name: str, billions: float, tmp_path: Path
) -> None:
    config = config_of(name, tmp_path)
    found = num_bytes(step_operations(config, [(0, 1)], 1)) / 2
    if not config.tie_word_embeddings:  # a step reads single rows of an embedding of its own
        found += config.vocab_size * config.hidden_size
    assert found / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize(
    ("batch", "context", "milliseconds"), [(1, 1024, 3.40), (8, 1024, 3.61), (64, 8192, 18.8)]
)
def test_floor_of_a_decode_step_is_reading_weights_and_context(
    batch: int, context: int, milliseconds: float, tmp_path: Path
) -> None:
    config = config_of("llama-3-8b", tmp_path)
    operations = step_operations(config, [(context - 1, 1)] * batch, batch)
    assert 1e3 * floor_s(operations, RATES) == pytest.approx(milliseconds, rel=2e-3)


def test_floor_adds_what_each_operation_is_bound_by(tmp_path: Path) -> None:
    config = config_of("llama-3-8b", tmp_path)
    operations = step_operations(config, [(1023, 1)] * 256, 256)
    products = 256 * (13.96e9 + 1.05e9) / RATES.matrix_flop_per_s
    context = 256 * 1024 * 131_072 / RATES.read_bytes_per_s
    assert floor_s(operations, RATES) == pytest.approx(products + context, rel=1e-3)


def test_a_prompt_costs_the_same_in_one_chunk_or_several(tmp_path: Path) -> None:
    config = config_of("llama-3-8b", tmp_path)
    expected = 2048 * 13.96e9 + 2 * 32 * 32 * 128 * 2048**2 + 1.05e9
    whole = num_flops(step_operations(config, [(0, 2048)], 1))
    assert whole == pytest.approx(expected, rel=1e-3)
    parts = [((0, 512), 0), ((512, 1000), 0), ((1512, 536), 1)]
    several = sum(num_flops(step_operations(config, [chunk], n)) for chunk, n in parts)
    assert several == pytest.approx(whole)


def test_a_window_bounds_what_attention_reads_and_computes(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    values = TINY | mistral | {"sliding_window": 16}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_model_config(tmp_path)

    def attention(start: int, num_new: int) -> tuple[float, float]:
        [found] = [
            op
            for op in step_operations(config, [(start, num_new)], 1)
            if op.name.startswith("attention")
        ]
        return found.num_bytes / (2 * 2 * 2 * 8), found.flops / (4 * 32)

    assert attention(99, 1) == (16, 16)
    assert attention(7, 1) == (8, 8)
    assert attention(0, 20) == (20, 16 * 17 / 2 + 4 * 16)


def read_tables(plans: list[StepPlan], num_slots: int) -> None:
    """Follow plans as a runner does; check that each new token has a block of its own sequence."""
    tables: dict[int, dict[int, int]] = {slot: {} for slot in range(num_slots)}
    lengths: dict[int, int] = {}
    for plan in plans:
        for start in plan.slot_starts:
            tables[start.slot], lengths[start.slot] = {}, len(start.prompt)
        changes = (plan.table_slots, plan.table_columns, plan.table_blocks)
        for slot, column, block in zip(*(change.tolist() for change in changes), strict=True):
            assert column == len(tables[slot])
            tables[slot][column] = block
        used = [block for table in tables.values() for block in table.values()]
        assert len(set(used)) == len(used)
        rows = zip(plan.slots.tolist(), plan.starts.tolist(), strict=True)
        for slot, start in rows:
            assert start == lengths[slot]
            assert start // 8 == len(tables[slot]) - 1
            lengths[slot] += 1


def test_decode_plans_grow_sequences_around_the_context(engine: LoadedEngine) -> None:
    driver = StepDriver(engine, overlap=True)
    plans = list(driver.decode_plans(4, 40, warm_up=5, num_steps=21))
    read_tables(plans, 4)
    assert [plan.step_id for plan in plans] == list(range(1, 27))
    assert not plans[0].from_last_sample.any()
    assert all(plan.from_last_sample.all() for plan in plans[1:])
    seen = [float(plan.starts.mean()) + 1 for plan in plans[5:]]
    assert np.mean(seen) == pytest.approx(40, abs=1)
    growths = [len(plan.table_slots) for plan in plans[1:]]
    assert max(growths) == 1  # spread over the steps


def test_prefill_plans_cover_the_prompt_and_sample_once(engine: LoadedEngine) -> None:
    plans = list(StepDriver(engine, overlap=True).prefill_plans(50, 20))
    assert [plan.starts.tolist() for plan in plans] == [[0], [20], [40]]
    assert [plan.num_tokens for plan in plans] == [20, 20, 10]
    assert [len(plan.sample_slots) for plan in plans] == [0, 0, 1]
    prompt = plans[0].slot_starts[0].prompt
    assert np.array_equal(np.concatenate([plan.tokens for plan in plans]), prompt)
    assert len(set(plans[0].table_blocks.tolist())) == 7


@pytest.mark.parametrize("overlap", [True, False])
def test_steps_are_timed_one_by_one(engine: LoadedEngine, overlap: bool) -> None:
    driver = StepDriver(engine, overlap=overlap)
    driver.fill_kv()
    times = driver.run(driver.decode_plans(3, 40, warm_up=2, num_steps=10), 12)
    assert len(times.steps) == len(times.launches) == 12
    assert all(seconds > 0 for seconds in times.steps)


def test_a_pool_that_is_too_small_is_said_with_numbers(engine: LoadedEngine) -> None:
    with pytest.raises(CapacityError, match="83 KV blocks are needed"):
        next(StepDriver(engine, overlap=True).decode_plans(4, 160, warm_up=0, num_steps=4))
    with pytest.raises(ConfigError, match="too many around a context of 20 tokens"):
        next(StepDriver(engine, overlap=True).decode_plans(4, 20, warm_up=10, num_steps=50))


def test_busy_time_counts_overlapping_events_once() -> None:
    times = [(0, 10), (2, 5), (8, 12), (20, 21), (21, 22)]
    events = [DeviceEvent("k", start, end) for start, end in times]
    assert busy_us(events) == 14
    assert busy_us([]) == 0


def test_traces_keep_what_occupies_the_device() -> None:
    def event(category: str, name: str, ts: float, dur: float) -> dict[str, object]:
        return {"cat": category, "name": name, "ts": ts, "dur": dur, "ph": "X"}

    trace = {
        "traceEvents": [
            event("cuda_runtime", "cudaLaunchKernel", 1, 2),
            event("kernel", "void at::native::fill<4, float>(int, float)", 5, 1),
            event("kernel", "_attention", 3, 2),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 7, 0.5),
            event("kernel", "_attention", 8, 3),
            {"ph": "M", "name": "process_name"},
        ]
    }
    events = device_events(trace)
    assert [found.start_us for found in events] == [3, 5, 7, 8]
    assert kernel_totals(events) == [
        KernelTotal("_attention", 5, 2),
        KernelTotal("at::native::fill", 1, 1),
        KernelTotal("Memcpy HtoD", 0.5, 1),
    ]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_skinny_matmul_kernel", "_skinny_matmul_kernel"),
        ("nvjet_tst_64x8_64x16_1x4_h_bz_coopA_TNT", "nvjet (cuBLAS)"),
        ("void cutlass::Kernel2<cutlass_80_tensorop>(Params)", "cutlass::Kernel2"),
        ("void (anonymous namespace)::softmax<float>(float*)", "softmax"),
        ("Memset (Device)", "Memset"),
    ],
)
def test_names_of_kernels_lose_their_arguments(name: str, short: str) -> None:
    assert short_name(name) == short


def test_points_and_lengths_are_read_or_refused() -> None:
    assert parse_points("1x1024,8x64", "--points") == [Point(1, 1024), Point(8, 64)]
    assert parse_counts("") == []
    for wrong in ("1024", "ax1", "1x2x3"):
        with pytest.raises(ConfigError, match=r"--sampled-points is .*SEQUENCESxTOKENS"):
            parse_points(wrong, "--sampled-points")
    with pytest.raises(ConfigError, match="numbers of tokens"):
        parse_counts("1k")


def test_unknown_models_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"qwen3-0\.6b"):
        model_folder("llama", tmp_path)
    assert set(SHAPES) == {"llama-3-8b", "qwen3-0.6b", "smollm2-135m"}


def test_the_command_measures_on_a_cpu(tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine.json"
    arguments = f"--model {tiny_folder} --device cpu --dtype float32 --points 1x64,3x100"
    arguments += " --prefill 64,100 --max-num-batched-tokens 64 --steps 20 --warm-up 2"
    arguments += f" --num-kv-blocks 64 --output {output}"
    main(arguments.split())
    document = json.loads(output.read_text())
    result = document["result"]
    assert document["benchmark"] == "engine"
    assert list(result["decode"]) == ["1x64", "3x100"]
    point = result["decode"]["3x100"]
    assert point["tokens_per_s"] == pytest.approx(3 / point["step_ms"] * 1e3)
    assert "over_floor" not in point
    assert result["prefill"]["100"]["num_chunks"] == 2
    assert [step["name"] for step in result["start_up"]] == ["load weights", "allocate the KV pool"]
    assert result["sampled"] == {}


def test_sampled_steps_are_measured_beside_greedy_ones(tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine.json"
    arguments = f"--model {tiny_folder} --device cpu --dtype float32 --points= --prefill="
    arguments += (
        f" --sampled-points 3x64 --steps 5 --warm-up 2 --num-kv-blocks 64 --output {output}"
    )
    main(arguments.split())
    result = json.loads(output.read_text())["result"]
    assert result["decode"] == result["prefill"] == {}
    [(point, cases)] = result["sampled"].items()
    assert point == "3x64"
    assert list(cases) == ["flat", "between", "peaked"]
    for found in cases.values():
        difference_ms = found["sampled_step_ms"] - found["step_ms"]
        assert found["difference_ms"] == pytest.approx(difference_ms)


def test_logits_are_scaled_for_a_while(engine: LoadedEngine) -> None:
    model: Any = engine.runner
    norm = model._model._final_norm
    before = norm.clone()
    with StepDriver(engine, overlap=False).scaled_logits(4.0):
        assert (norm == 4.0 * before).all()
    assert (norm == before).all()


def test_every_sampled_sequence_has_all_parameters_and_a_seed_of_its_own(
    engine: LoadedEngine,
) -> None:
    driver = StepDriver(engine, overlap=True)
    plan = next(driver.decode_plans(3, 40, warm_up=0, num_steps=2, sampling=SAMPLED))
    samplings = [start.sampling for start in plan.slot_starts]
    assert [found.seed for found in samplings] == [0, 1, 2]
    assert {replace(found, seed=None) for found in samplings} == {SAMPLED}
    assert not list(SAMPLED.violations(vocab_size=64))


def test_the_samplers_kernels_are_named_as_they_are() -> None:
    wrapper = Path(sampling.__file__).with_name("sampling_triton.py").read_text()
    assert set(re.findall(r"launch\((\w+_kernel),", wrapper)) == set(SAMPLER_KERNELS)


def test_lengths_beyond_the_model_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="made for 512"):
        main(["--model", str(tiny_folder), "--device", "cpu", "--prefill", "8192"])


def test_neither_ray_nor_grpc_is_needed() -> None:
    code = (
        "import sys, paceline.bench.engine\n"
        "print({name.split('.')[0] for name in sys.modules} & {'ray', 'grpc', 'google'})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
