"""Compare the engine with another one, offline: `python -m paceline.bench.compare --peer vllm`.

The same requests, greedy and with outputs of given lengths, on the same device: each side in a
process of its own, in turn (A B A B ...), which loads it once, warms it up with a short run of each
load and then measures all loads. No router and no gRPC on either side.
`paceline.bench.against_transformers` compares a deployment.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from paceline.bench.compared_figures import load_figures, median_figures, ratio_figures
from paceline.bench.compared_loads import PlannedLoad, plan_loads
from paceline.bench.environment import write_result
from paceline.bench.llm_shapes import SHAPES, model_folder
from paceline.bench.load import TRACES, Vocabulary
from paceline.bench.side_process import run_to_end
from paceline.bench.sides import SIDES, SideOptions
from paceline.engine.model_config import read_model_config
from paceline.errors import ConfigError


def run_side(options: argparse.Namespace, loads: Sequence[PlannedLoad], folder: Path) -> None:
    """Load the side named by --side, warm it up and measure it, in this process.

    Writes what there is after each load, so that nothing measured is lost by a later failure.
    """
    started = time.perf_counter()
    side = SIDES[options.side](side_options(options, loads, folder))
    loaded = time.perf_counter()
    for load in loads:
        side.generate(load.warm_up())
    found = {
        **side.describe(),
        "load_s": loaded - started,
        "warm_up_s": time.perf_counter() - loaded,
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "loads": {},
    }
    sys.stderr.write(f"{options.side}: ready after {time.perf_counter() - started:.0f} s\n")
    for load in loads:
        figures = load_figures(load, side.generate(load.requests))
        found["loads"][load.name] = figures
        unfinished = options.output.with_suffix(".part")
        unfinished.write_text(json.dumps(found), encoding="utf-8")
        unfinished.replace(options.output)
        say(options.side, load, figures)


def say(side: str, load: PlannedLoad, figures: dict[str, Any]) -> None:
    """Tell at once, in case that a later load fails."""
    parts = [
        f"{figures['output_tokens_per_s']:,.0f} output tokens/s",
        f"{figures['requests_per_s']:.2f} requests/s",
        f"TTFT p50 {1e3 * figures['ttft']['p50']:,.1f} ms",
    ]
    if "decode_step_s" in figures:
        parts.append(f"decode step {1e3 * figures['decode_step_s']:.2f} ms")
    if load.num_left_out:
        parts.append(f"{load.num_left_out} requests left out, longer than --max-model-len")
    sys.stderr.write(f"{side}, {load.name}: {', '.join(parts)}\n")
    sys.stderr.flush()


def side_options(
    options: argparse.Namespace, loads: Sequence[PlannedLoad], folder: Path
) -> SideOptions:
    """Size every side for exactly these loads."""
    return SideOptions(
        folder=folder,
        device=options.device,
        dtype=options.dtype,
        max_model_len=options.max_model_len or max(load.max_tokens for load in loads),
        max_num_seqs=min(max(len(load.requests) for load in loads), options.max_num_seqs),
        max_num_batched_tokens=options.max_num_batched_tokens,
        gpu_memory_utilization=options.gpu_memory_utilization,
        num_kv_blocks=options.num_kv_blocks,
    )


def compare(
    options: argparse.Namespace,
    arguments: Sequence[str],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run the sides in turn, each as a child with the same arguments, so that it leaves no memory
    behind. Calls `keep` with what there is after each.
    """
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    failures: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for number in range(1, options.rounds + 1):
        for side in options.sides:
            with tempfile.TemporaryDirectory() as written:
                output = Path(written) / "side.json"
                command = [sys.executable, "-m", "paceline.bench.compare", *arguments]
                command += ["--side", side, "--output", str(output)]
                stop: SystemExit | None = None
                try:
                    ended = run_to_end(command, options.side_timeout)
                except SystemExit as told:  # keep what there is, then stop
                    stop = told
                if output.exists():
                    rounds[side].append(json.loads(output.read_text(encoding="utf-8")))
                if stop is not None:
                    keep(summary(rounds, failures))
                    raise stop
            if ended.status != 0:
                how = f"ended with status {ended.status}"
                if ended.status is None:
                    how = f"was not done after {options.side_timeout:g} s (--side-timeout)"
                sys.stderr.write(f"{side}, round {number}: {how}. Its last lines:\n")
                sys.stderr.write(ended.last_lines)
                failures.append(
                    {"side": side, "round": number, "how": how, "last_lines": ended.last_lines}
                )
            result = summary(rounds, failures)
            keep(result)
    return result


def summary(
    rounds: dict[str, list[dict[str, Any]]], failures: list[dict[str, Any]]
) -> dict[str, Any]:
    """Add medians over the rounds, and of these the ratios: the first side's over the other's."""
    medians: dict[str, dict[str, Any]] = {}
    for side, found in rounds.items():
        names = dict.fromkeys(name for one in found for name in one["loads"])
        medians[side] = {
            name: median_figures([one["loads"][name] for one in found if name in one["loads"]])
            for name in names
        }
    ratios = {}
    if len(medians) == 2:
        ours, theirs = medians.values()
        ratios = {name: ratio_figures(ours[name], theirs[name]) for name in ours if name in theirs}
    return {
        "gpu": next((one["gpu"] for found in rounds.values() for one in found), None),
        "medians": medians,
        "ratios": ratios,
        "failures": failures,
        "rounds": rounds,
    }


def parse_sides(text: str, peer: str) -> list[str]:
    """Read paceline,vllm: one of the two, or both."""
    sides = text.split(",")
    if len(set(sides)) < len(sides) or not set(sides) <= {"paceline", peer}:
        raise ConfigError(
            f"--sides is {text!r}, and must be paceline, {peer} (the --peer), or both with a comma."
        )
    return sides


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", default="llama-3-8b", help=f"{', '.join(SHAPES)}, or a folder with config.json")
    add("--peer", choices=[side for side in SIDES if side != "paceline"], default="transformers")
    add("--sides", help="which to run; default: paceline and the peer")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--dtype", default="bfloat16")
    add("--loads", default="32x1024+128", help="REQUESTSxINPUT+OUTPUT,...: tokens, all at once")
    add(
        "--trace",
        default="",
        help=f"TRACE:REQUESTS[@RATE],...: the first ones of {', '.join(TRACES)} or a file like "
        "those in bench/traces, at a mean rate a second; without it all at once",
    )
    add("--rounds", type=int, default=1, help="of both sides in turn")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--max-model-len", type=int, help="longer ones of a trace are left out; default: none is")
    add("--max-num-seqs", type=int, default=256, help="of paceline, at most the requests of a load")
    add("--max-num-batched-tokens", type=int, default=8192, help="of paceline")
    add("--num-kv-blocks", type=int, help="default: what the memory holds")
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--side-timeout", type=float, default=1800.0, help="seconds for a side in a round")
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    add("--output", type=Path, help="file to write, after each side; default: standard output")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = make_parser().parse_args(arguments)
    options.sides = parse_sides(options.sides or f"paceline,{options.peer}", options.peer)
    with tempfile.TemporaryDirectory() as written:
        folder = model_folder(options.model, Path(written))
        vocabulary = Vocabulary(read_model_config(folder).vocab_size, frozenset())
        loads = plan_loads(
            options.loads, options.trace, vocabulary, options.max_model_len, options.seed
        )  # here too, so that what cannot be had is said before a side starts
        if options.side is not None:
            run_side(options, loads, folder)
            return
    config = {key: value for key, value in vars(options).items() if key not in ("output", "side")}

    def keep(result: dict[str, Any]) -> None:
        if options.output is not None:
            write_result(options.output, "compare", config, result)

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    result = compare(options, arguments, keep)
    if options.output is None:
        write_result(None, "compare", config, result)
    if result["failures"]:
        raise SystemExit(f"{len(result['failures'])} of the sides' runs failed.")


if __name__ == "__main__":
    main()
