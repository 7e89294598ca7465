"""Tables and the picture say what the results say, and only between their marks."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from paceline.bench import render
from paceline.bench.gpu_rates import Rates
from paceline.bench.roofline import Measured, draw_roofline
from paceline.errors import ConfigError

SECTIONS = (
    "decode",
    "roofline",
    "sampling",
    "prefill",
    "kernels",
    "busy",
    "start-up",
    "memory",
    "compare",
    "operations",
)
KERNELS = {
    "config": {},
    "result": {
        "gpu": "NVIDIA H200",
        "products": {
            "M=1": {
                "qkv": {"us": 15.0, "torch_us": 17.0, "floor_us": 11.0},
                "down": {"us": 32.0, "torch_us": 33.0, "floor_us": 27.0},
            }
        },
        "decode_attention": {
            "64 x 8192": {"us": 487.0, "over_floor": 1.0},
            "16 x mixed": {"us": 33.0, "over_floor": 1.8},
        },
        "prefill_attention": {"8192": {"us": 1250.0, "torch_us": 1000.0, "tflop_per_s": 445.0}},
        "small": {
            "silu_mul 1": {"us": 1.4, "torch_us": 3.0},
            "rope_kv_write 1": {"us": 1.8, "torch_us": None},
            "silu_mul 64": {"us": 3.1, "torch_us": 9.0},
        },
    },
}
PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def kernel(name: str, us: float, num_calls: float = 1) -> dict[str, Any]:
    return {"name": name, "us": us, "num_calls": num_calls}


def decode_point(batch: int, context: int, step_ms: float) -> dict[str, Any]:
    return {
        "batch": batch,
        "context": context,
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * batch / step_ms,
        "launch_p50_us": 41.0,
        "floor_ms": 3.4,
        "over_floor": step_ms / 3.4,
        "bytes": 15e9,
        "flops": 15e9 * batch,
        "profile": {
            "num_steps": 50,
            "wall_us": 1e3 * step_ms + 100,
            "busy_us": 1e3 * step_ms,
            "busy_share": 0.975,
            "idle_us": 100.0,
            "kernels": [kernel(f"_kernel_{n}", 100.0 - n, 32) for n in range(14)],
            "other_us": 5.0,
        },
    }


def memory(in_use: int) -> dict[str, int]:
    return {"in_use": in_use << 30, "max_allocated": 120 << 30}


ENGINE: dict[str, Any] = {
    "config": {"model": "llama-3-8b"},
    "result": {
        "gpu": "NVIDIA H200",
        "rates": {"read_bytes_per_s": 4.43e12, "matrix_flop_per_s": 687e12},
        "decode": {"1x1024": decode_point(1, 1024, 4.0), "64x1000": decode_point(64, 1000, 7.0)},
        "sampled": {
            "64x1024": {
                "peaked": {
                    "step_ms": 7.0,
                    "sampled_step_ms": 7.14,
                    "greedy_sampling_us": 22.0,
                    "sampling_us": 178.5,
                    "sampling_share": 0.025,
                },
                "flat": {"step_ms": 7.0, "sampled_step_ms": 7.0},
            },
        },
        "prefill": {
            "8192": {
                "ms": 200.0,
                "tflop_per_s": 660.0,
                "of_matrix_rate": 0.824,
                "bytes": 16e9,
                "flops": 1.3e14,
            }
        },
        "start_up": [{"name": "load weights", "seconds": 1.25}, {"name": "rest", "seconds": 2.0}],
        "num_cached_kernels": 7,
        "memory": {
            "plan": dict.fromkeys(("weights", "state", "activations", "graphs", "pool"), 3 << 29),
            "before": memory(1),
            "loaded": memory(100),
            "measured": memory(111),
        },
    },
}
FIGURES = {
    "output_tokens_per_s": 5000.0,
    "requests_per_s": 39.1,
    "ttft": {"p50": 0.1, "p99": 0.2},
    "tpot": {"p50": 0.01, "p99": 0.02},
    "itl": {"p50": 0.0055, "p99": 0.15},
    "decode_step_s": 0.00542,
}
COMPARE: dict[str, Any] = {
    "config": {"model": "llama-3-8b", "rounds": 2},
    "result": {
        "gpu": "NVIDIA H200",
        "medians": {
            "paceline": {"32x1024+100": FIGURES, "azure-conversation:200@6.5": FIGURES},
            "vllm": {
                "32x1024+100": {"output_tokens_per_s": 4000.0},
                "azure-conversation:200": {"output_tokens_per_s": 6.0, "num_left_out": 3.0},
            },
        },
        "ratios": {"32x1024+100": {"output_tokens_per_s": 1.25}},
        "failures": [{"side": "vllm", "round": 2}],
        "rounds": {"paceline": [{}, {}], "vllm": [{"version": "0.26.0"}]},
    },
}


def render_page(folder: Path) -> str:
    page = folder / "page.md"
    arguments = ["--results", str(folder), "--page", str(page)]
    render.main([*arguments, "--roofline", str(folder / "roofline.svg")])
    return page.read_text()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "engine_llama-3-8b_h200.json").write_text(json.dumps(ENGINE))
    (tmp_path / "compare_vllm_h200.json").write_text(json.dumps(COMPARE))
    (tmp_path / "kernels_h200.json").write_text(json.dumps(KERNELS))
    marks = [f"before {n}\n<!-- begin {n} -->\nold\n<!-- end {n} -->\nafter" for n in SECTIONS]
    (tmp_path / "page.md").write_text("\n".join(marks))
    return tmp_path


def test_tables_show_the_results(results: Path) -> None:
    page = render_page(results)
    assert "old" not in page
    for line in (
        "| decode, batch × context | 1 × 1K | 64 × 1000 |",
        "| step, ms | 4.00 | 7.00 |",
        "| step over floor | 1.18 | 2.06 |",
        "| tokens/s | 250 | 9,143 |",
        "| TFLOP/s | 660 |",
        "| of the matrix rate | 82% |",
        "| `_kernel_0` | 100 (32) |",
        "| other kernels | 180 |",  # 88 + 87 beyond the named ones, and what was not listed
        "| idle, with the tracer on | 100 |",
        "| llama-3-8b | 1 × 1K | 4.00 | 4.10 | 4.00 | 100.0% | 50 |",
        "| in all | 3.2 |",
        "| llama-3-8b | 1.50 | 1.50 | 1.50 | 1.50 | 1.50 | 99.00 | 110.00 | 120.00 |",
        "| M=1 | 15.0 | 32.0 |",
        "| M=1 PyTorch | 17.0 | 33.0 |",
        "| floor of the first | 11.0 | 27.0 |",
        "| decode attention, batch × context | 64 × 8K |",
        "| paceline, paged keys | 445 |",
        "| PyTorch, dense keys | 556 |",
        "| µs (PyTorch's), by tokens, rows or blocks | 1 | 64 |",
        "| silu_mul | 1.4 (3) | 3.1 (9) |",
        "| rope_kv_write | 1.8 | – |",
        "| llama-3-8b | 64 × 1K | peaked | 7.00 | 7.14 | +2.0% | 22 | 178 | 2.5% |",
        "| llama-3-8b | 64 × 1K | flat | 7.00 | 7.00 | +0.0% | – | – | – |",
        "medians of 2 rounds; failed: vllm in round 2:",
        "| 32 × 1K in, 100 out | paceline | 5,000 | 39.10 | 100.0 | 200.0 | 10.0 | 20.0 |",
        "| 20.0 | 5.5 | 150.0 | 5.42 |",
        "|  | vllm 0.26.0 | 4,000 | – | – | – | – | – | – | – | – |",
        "|  | ratio | 1.25 | – | – | – | – | – | – | – | – |",
        "| azure-conversation, first 200 at 6.5/s | paceline | 5,000 |",
        "| azure-conversation, first 200 at once, 3 left out | vllm 0.26.0 | 6 |",
    ):
        assert line in page
    assert "4.43 TB/s and 687 TFLOP/s" in page
    assert "`_kernel_12`" not in page
    assert page.count("before ") == page.count("after") == len(SECTIONS)


def test_rendering_again_changes_nothing(results: Path) -> None:
    assert render_page(results) == render_page(results)


def test_without_results_sections_are_empty(results: Path) -> None:
    for path in results.glob("*.json"):
        path.unlink()
    page = render_page(results)
    assert "|" not in page
    assert "old" not in page
    assert not (results / "roofline.svg").exists()


def test_a_page_without_marks_is_refused(results: Path) -> None:
    (results / "page.md").write_text("nothing")
    with pytest.raises(ConfigError, match="begin decode"):
        render_page(results)


def test_the_performance_page_has_every_section() -> None:
    page = PAGE.read_text()
    for name in SECTIONS:
        render.fill(page, name, "")


def test_points_lie_where_their_rates_put_them() -> None:
    rates = Rates(read_bytes_per_s=1e12, matrix_flop_per_s=1e14)
    points = [
        Measured("decode", "slow <1>", 1e9, 1e9, 2e-3),
        Measured("decode", "fast", 1e9, 1e9, 1e-3),
        Measured("prefill", "prompt", 1e9, 1e12, 1e-2),
    ]
    picture = ElementTree.fromstring(draw_roofline("title & more", rates, points))
    space = "{http://www.w3.org/2000/svg}"
    slow, fast, prompt = [
        (float(mark.get("cx", "")), float(mark.get("cy", "")))
        for mark in picture.iter(f"{space}circle")
    ]
    [roof] = picture.iter(f"{space}polyline")
    corners = [tuple(map(float, pair.split(","))) for pair in roof.get("points", "").split()]
    assert slow[0] == fast[0] < prompt[0]
    assert prompt[1] == pytest.approx(corners[-1][1], abs=0.2)  # at the matrix rate
    (x0, y0), (x1, y1), _ = corners
    slope = y0 + (fast[0] - x0) * (y1 - y0) / (x1 - x0)
    assert fast[1] == pytest.approx(slope, abs=0.2)  # at the read rate
    assert slow[1] > fast[1]
    labels = {mark.text: mark for mark in picture.iter(f"{space}text")}
    assert "slow <1>" in labels
    heights = [float(labels[name].get("y", "")) for name in ("slow <1>", "fast")]
    assert abs(heights[0] - heights[1]) >= 13
