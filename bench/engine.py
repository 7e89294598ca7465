"""Time the engine alone, without workers: `python -m paceline.bench.engine --model llama-3-8b`.

Drives a model runner in this process with plans like the schedulers', on random weights and random
KV. Beside each decode step stands its floor, from the read and matrix rates that the same run
measures (`paceline.bench.model_costs`), and, from traces taken after all timing, where its time
goes. With --sampled-points, decode steps that sample by every parameter stand beside greedy ones.
On --device cpu only the times are measured.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from paceline.bench.environment import write_result
from paceline.bench.gpu_rates import measure_rates
from paceline.bench.gpu_trace import record_device_events
from paceline.bench.llm_shapes import SHAPES, model_folder
from paceline.bench.startup import StartUp
from paceline.bench.step_benchmark import LOGIT_SCALES, Benchmark, Point
from paceline.engine.model_config import read_model_config
from paceline.engine.settings import EngineSettings, ModelSettings
from paceline.errors import ConfigError

DEFAULT_POINTS = "1x1024,8x1024,64x1024,256x1024,1x8192,8x8192,64x8192"
DEFAULT_PREFILLS = "1024,2048,8192"


def parse_points(text: str, option: str) -> list[Point]:
    """Read 1x1024,8x1024: sequences times tokens of context. `option` is named if that fails."""
    try:
        return [Point(*map(int, entry.split("x"))) for entry in text.split(",") if entry]
    except (TypeError, ValueError):
        raise ConfigError(
            f"{option} is {text!r}, and each must be SEQUENCESxTOKENS, such as 8x1024."
        ) from None


def parse_counts(text: str) -> list[int]:
    """Read 1024,2048."""
    try:
        return [int(entry) for entry in text.split(",") if entry]
    except ValueError:
        raise ConfigError(
            f"--prefill is {text!r}, and must be numbers of tokens, such as 1024,2048."
        ) from None


def decode_points(options: argparse.Namespace) -> list[Point]:
    """Return all loads whose decode steps are measured."""
    sampled = parse_points(options.sampled_points, "--sampled-points")
    return parse_points(options.points, "--points") + sampled


def model_settings(options: argparse.Namespace, path: Path) -> ModelSettings:
    """Choose the model's length: what the loads need, unless --max-model-len gives more."""
    margin = max(options.steps, options.profile_steps) + options.block_tokens
    lengths = [point.context + margin for point in decode_points(options)]
    lengths += [count + 1 for count in parse_counts(options.prefill)]
    needed = max(lengths, default=options.block_tokens)
    limit = read_model_config(path).max_position_embeddings
    if needed > limit:
        raise ConfigError(
            f"--points, --sampled-points and --prefill need sequences of {needed} tokens, and "
            f"{options.model} was made for {limit} (max_position_embeddings). Leave out the "
            "longest."
        )
    return ModelSettings(
        path=str(path),
        load_format="dummy",
        dtype=options.dtype,
        max_model_len=options.max_model_len or needed,
    )


def measure(options: argparse.Namespace, written: Path) -> dict[str, Any]:
    """Do all measurements; traces last, because a tracer can slow what comes after it."""
    points, prefills = parse_points(options.points, "--points"), parse_counts(options.prefill)
    sampled_points = parse_points(options.sampled_points, "--sampled-points")
    is_cuda = options.device == "cuda"
    model = model_settings(options, model_folder(options.model, written))
    settings = EngineSettings(
        device=options.device,
        num_kv_blocks=options.num_kv_blocks,
        gpu_memory_utilization=options.gpu_memory_utilization,
        max_num_seqs=max((point.batch for point in decode_points(options)), default=1),
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
    decode, sampled, prefill = {}, {}, {}
    for point in points:
        found = decode[str(point)] = benchmark.measure_decode(point)
        say(f"decode {point}: {found['step_ms']:.3f} ms", found)
    for point in sampled_points:
        sampled[str(point)] = {
            name: benchmark.measure_sampled(point, scale) for name, scale in LOGIT_SCALES.items()
        }
        for name, found in sampled[str(point)].items():
            text = f"{found['step_ms']:.3f} ms, {found['sampled_step_ms']:.3f} ms sampled"
            say(f"decode {point}, {name} logits: {text}", found)
    for count in prefills:
        found = prefill[str(count)] = benchmark.measure_prefill(count)
        say(f"prompt of {count}: {found['ms']:.2f} ms, {found['tflop_per_s']:.0f} TFLOP/s", found)
    start_up.note_memory("measured")
    if is_cuda and options.profile_steps:
        record_device_events(torch.cuda.synchronize)  # the first trace starts the tracer
        for point in points:
            decode[str(point)]["profile"] = benchmark.profile_decode(point)
        for point in sampled_points:
            for name, found in sampled[str(point)].items():
                step_ms = found["sampled_step_ms"]
                found |= benchmark.profile_sampled(point, LOGIT_SCALES[name], step_ms)
        for count in prefills:
            prefill[str(count)]["profile"] = benchmark.profile_prefill(count)
    engine.runner.close()
    return {
        "gpu": torch.cuda.get_device_name() if is_cuda else None,
        "cuda": torch.version.cuda,
        "rates": rates._asdict() if rates else None,
        "max_model_len": engine.max_model_len,
        "decode": decode,
        "sampled": sampled,
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
    add("--sampled-points", default="", help="decode loads to measure with sampling too")
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
