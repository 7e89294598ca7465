"""Time the engine alone, without workers: `python -m paceline.bench.engine --model llama-3-8b`.

Drives a model runner in this process with plans like the schedulers', on random weights and random
KV. Beside each decode step stands its floor, from the read and matrix rates that the same run
measures (`paceline.bench.model_costs`), and, from traces taken after all timing, where its time
goes. On --device cpu only the times are measured.
"""

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from paceline.bench.environment import write_result
from paceline.bench.gpu_rates import Rates, measure_rates
from paceline.bench.gpu_trace import busy_us, kernel_totals, record_device_events
from paceline.bench.llm_shapes import SHAPES, model_folder
from paceline.bench.model_costs import floor_s, num_bytes, num_flops, step_operations
from paceline.bench.startup import StartUp
from paceline.bench.step_driver import StepDriver, StepTimes
from paceline.engine.load import LoadedEngine
from paceline.engine.model_config import read_model_config
from paceline.engine.settings import EngineSettings, ModelSettings
from paceline.errors import ConfigError

DEFAULT_POINTS = "1x1024,8x1024,64x1024,256x1024,1x8192,8x8192,64x8192"
DEFAULT_PREFILLS = "1024,2048,8192"
PREFILL_WARM_UPS, PREFILL_REPEATS = 2, 5
MAX_KERNELS = 25
"""Kernels named in a profile; the rest is added up."""


class Point(NamedTuple):
    """A decode load."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"


class Benchmark:
    """An engine under measurement."""

    def __init__(self, engine: LoadedEngine, rates: Rates | None, options: argparse.Namespace):
        """rates: None where there is no GPU, and then no floor."""
        self._engine = engine
        self._rates = rates
        self._options = options
        self._driver = StepDriver(engine, overlap=not options.no_overlap)

    def fill_kv(self) -> None:
        """Called before the first measurement."""
        self._driver.fill_kv()

    def measure_decode(self, point: Point) -> dict[str, Any]:
        """Time decode steps; each step's time is between two results."""
        warm_up, num_steps = self._options.warm_up, self._options.steps
        plans = self._driver.decode_plans(*point, warm_up=warm_up, num_steps=num_steps)
        times = self._driver.run(plans, warm_up + num_steps)
        steps, launches = times.steps[warm_up:], times.launches[warm_up:]
        mean_s = statistics.fmean(steps)
        operations = step_operations(
            self._engine.config, [(point.context - 1, 1)] * point.batch, point.batch
        )
        return {
            **point._asdict(),
            "step_ms": 1e3 * mean_s,
            "step_p50_ms": 1e3 * statistics.median(steps),
            "step_p99_ms": 1e3 * float(np.percentile(steps, 99)),
            "tokens_per_s": point.batch / mean_s,
            "launch_p50_us": 1e6 * statistics.median(launches),
            "launch_p99_us": 1e6 * float(np.percentile(launches, 99)),
            **_over_floor(mean_s, floor_s(operations, self._rates) if self._rates else None),
            "bytes": num_bytes(operations),
            "flops": num_flops(operations),
        }

    def measure_prefill(self, num_tokens: int) -> dict[str, Any]:
        """Time one prompt, from the launch of its first chunk to the result of its last."""
        chunk = min(self._options.max_num_batched_tokens, num_tokens)
        seconds = []
        for _ in range(PREFILL_WARM_UPS + PREFILL_REPEATS):
            plans = list(self._driver.prefill_plans(num_tokens, chunk))
            seconds.append(sum(self._driver.run(iter(plans), len(plans)).steps))
        median_s = statistics.median(seconds[PREFILL_WARM_UPS:])
        chunks = [(start, min(chunk, num_tokens - start)) for start in range(0, num_tokens, chunk)]
        steps = [
            step_operations(self._engine.config, [part], int(part is chunks[-1])) for part in chunks
        ]
        flops = sum(map(num_flops, steps))
        rates = self._rates
        return {
            "num_tokens": num_tokens,
            "num_chunks": len(chunks),
            "ms": 1e3 * median_s,
            "min_ms": 1e3 * min(seconds[PREFILL_WARM_UPS:]),
            "tflop_per_s": flops / median_s / 1e12,
            "of_matrix_rate": flops / median_s / rates.matrix_flop_per_s if rates else None,
            **_over_floor(median_s, sum(floor_s(s, rates) for s in steps) if rates else None),
            "bytes": sum(map(num_bytes, steps)),
            "flops": flops,
        }

    def profile_decode(self, point: Point) -> dict[str, Any]:
        """Say which kernels decode steps consist of, and how long the device is idle."""
        num_steps = self._options.profile_steps
        plans = self._driver.decode_plans(
            *point, warm_up=self._options.warm_up, num_steps=num_steps
        )
        self._driver.run(plans, self._options.warm_up)
        return self._profile(lambda: self._driver.run(plans, num_steps))

    def profile_prefill(self, num_tokens: int) -> dict[str, Any]:
        """Say which kernels a prompt's steps consist of."""
        chunk = min(self._options.max_num_batched_tokens, num_tokens)
        plans = list(self._driver.prefill_plans(num_tokens, chunk))
        return self._profile(lambda: self._driver.run(iter(plans), len(plans)))

    def _profile(self, run: Callable[[], StepTimes]) -> dict[str, Any]:
        times: list[StepTimes] = []
        events = record_device_events(lambda: times.append(run()))
        num_steps = len(times[0].steps)
        totals = kernel_totals(events)
        wall_us = 1e6 * sum(times[0].steps) / num_steps
        busy = busy_us(events) / num_steps
        return {
            "num_steps": num_steps,
            "wall_us": wall_us,
            "busy_us": busy,
            "busy_share": busy / wall_us,
            "idle_us": wall_us - busy,
            "kernels": [
                {"name": name, "us": us / num_steps, "num_calls": num_calls / num_steps}
                for name, us, num_calls in totals[:MAX_KERNELS]
            ],
            "other_us": sum(total.us for total in totals[MAX_KERNELS:]) / num_steps,
        }


def _over_floor(seconds: float, floor: float | None) -> dict[str, Any]:
    if floor is None:
        return {}
    return {"floor_ms": 1e3 * floor, "over_floor": seconds / floor}


def parse_points(text: str) -> list[Point]:
    """Read 1x1024,8x1024: sequences times tokens of context."""
    try:
        return [Point(*map(int, entry.split("x"))) for entry in text.split(",") if entry]
    except (TypeError, ValueError):
        raise ConfigError(
            f"--points is {text!r}, and each must be SEQUENCESxTOKENS, such as 8x1024."
        ) from None


def parse_counts(text: str) -> list[int]:
    """Read 1024,2048."""
    try:
        return [int(entry) for entry in text.split(",") if entry]
    except ValueError:
        raise ConfigError(
            f"--prefill is {text!r}, and must be numbers of tokens, such as 1024,2048."
        ) from None


def model_settings(options: argparse.Namespace, path: Path) -> ModelSettings:
    """Choose the model's length: what the loads need, unless --max-model-len gives more."""
    margin = max(options.steps, options.profile_steps) + options.block_tokens
    lengths = [point.context + margin for point in parse_points(options.points)]
    lengths += [count + 1 for count in parse_counts(options.prefill)]
    needed = max(lengths, default=options.block_tokens)
    limit = read_model_config(path).max_position_embeddings
    if needed > limit:
        raise ConfigError(
            f"--points and --prefill need sequences of {needed} tokens, and {options.model} was "
            f"made for {limit} (max_position_embeddings). Leave out the longest."
        )
    return ModelSettings(
        path=str(path),
        load_format="dummy",
        dtype=options.dtype,
        max_model_len=options.max_model_len or needed,
    )


def measure(options: argparse.Namespace, written: Path) -> dict[str, Any]:
    """Do all measurements; traces last, because a tracer can slow what comes after it."""
    points, prefills = parse_points(options.points), parse_counts(options.prefill)
    is_cuda = options.device == "cuda"
    model = model_settings(options, model_folder(options.model, written))
    settings = EngineSettings(
        device=options.device,
        num_kv_blocks=options.num_kv_blocks,
        gpu_memory_utilization=options.gpu_memory_utilization,
        max_num_seqs=max((point.batch for point in points), default=1),
        max_num_batched_tokens=options.max_num_batched_tokens,
        enforce_eager=options.no_graphs,
        async_scheduling=not options.no_overlap,
    )
    start_up, rates = StartUp(options.device), None
    if is_cuda:
        with start_up.timed("start CUDA"):
            torch.cuda.synchronize()
        rates = measure_rates()
        torch.cuda.empty_cache()
    engine = start_up.load(model, settings, options.block_tokens)
    benchmark = Benchmark(engine, rates, options)
    benchmark.fill_kv()
    gc.collect()
    gc.freeze()  # as a worker does when it is ready
    decode, prefill = {}, {}
    for point in points:
        found = decode[str(point)] = benchmark.measure_decode(point)
        say(f"decode {point}: {found['step_ms']:.3f} ms", found)
    for count in prefills:
        found = prefill[str(count)] = benchmark.measure_prefill(count)
        say(f"prompt of {count}: {found['ms']:.2f} ms, {found['tflop_per_s']:.0f} TFLOP/s", found)
    start_up.note_memory("measured")
    if is_cuda and options.profile_steps:
        record_device_events(torch.cuda.synchronize)  # the first trace starts the tracer
        for point in points:
            decode[str(point)]["profile"] = benchmark.profile_decode(point)
        for count in prefills:
            prefill[str(count)]["profile"] = benchmark.profile_prefill(count)
    engine.runner.close()
    return {
        "gpu": torch.cuda.get_device_name() if is_cuda else None,
        "cuda": torch.version.cuda,
        "rates": rates._asdict() if rates else None,
        "max_model_len": engine.max_model_len,
        "decode": decode,
        "prefill": prefill,
        "start_up": start_up.steps,
        "num_cached_kernels": start_up.num_cached_kernels,
        "memory": start_up.memory,
    }


def say(text: str, found: dict[str, Any]) -> None:
    """Tell at once, in case that a later measurement fails."""
    over = f", {found['over_floor']:.3f} x floor" if "over_floor" in found else ""
    sys.stderr.write(f"{text}{over}\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", default="llama-3-8b", help=f"{', '.join(SHAPES)}, or a folder with config.json")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--dtype", default="bfloat16", help="of weights and KV; floors are of bfloat16")
    add("--points", default=DEFAULT_POINTS, help="decode loads, SEQUENCESxTOKENS,...")
    add("--prefill", default=DEFAULT_PREFILLS, help="lengths of prompts")
    add("--steps", type=int, default=50, help="timed decode steps of each load")
    add("--warm-up", type=int, default=10, help="decode steps before them")
    add("--profile-steps", type=int, default=50, help="traced decode steps; 0: no traces")
    add("--no-graphs", action="store_true", help="enforce_eager")
    add("--no-overlap", action="store_true", help="async_scheduling: false")
    add("--block-tokens", type=int, default=16)
    add("--max-model-len", type=int, help="default: what the loads need")
    add("--max-num-batched-tokens", type=int, default=8192, help="tokens of a prompt's chunk")
    add("--num-kv-blocks", type=int, help="default: by --gpu-memory-utilization")
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--output", type=Path, help="file to write; default: standard output")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as written:
        result = measure(options, Path(written))
    config = {key: value for key, value in vars(options).items() if key != "output"}
    write_result(options.output, "engine", config, result)


if __name__ == "__main__":
    main()
