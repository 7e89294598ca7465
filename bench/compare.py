"""Compare the engine with another one, offline: `python -m paceline.bench.compare --peer vllm`.

The same prompts, all at once, greedy and of fixed lengths, on the same device: each side in a
process of its own, in turn (A B A B ...), after a run with other prompts that warms it up. No
router and no gRPC on either side. `paceline.bench.against_transformers` compares a deployment.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from paceline.bench.environment import write_result
from paceline.bench.llm_shapes import SHAPES, model_folder
from paceline.bench.load import Vocabulary, fixed_lengths
from paceline.bench.record import Limits, RequestRecord, summarize
from paceline.bench.sides import SIDES, SideOptions
from paceline.engine.model_config import read_model_config

SIDE_TIMEOUT_S = 3600.0
DISTRIBUTIONS = ("ttft", "tpot", "itl", "e2e")
PRINTED_LINES = 30
"""Of what a side that failed said last."""


def run_side(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Load the side named by --side, warm it up and measure it, in this process."""
    started = time.perf_counter()
    side = SIDES[options.side](side_options(options, folder))
    loaded = time.perf_counter()
    vocabulary = Vocabulary(read_model_config(folder).vocab_size, frozenset())
    records: list[RequestRecord] = []
    for seed in (options.seed + 1, options.seed):  # the first one warms up
        planned = fixed_lengths(
            options.requests, options.input, options.output_tokens, vocabulary, seed
        )
        records = side.generate([request.prompt for request in planned], options.output_tokens)
    check_complete(records, options)
    summary = summarize(records, Limits())
    return {
        **side.describe(),
        "load_s": loaded - started,
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "duration_s": summary.duration_s,
        "output_tokens_per_s": summary.output_tokens_per_s,
        "num_resumed": summary.num_resumed,
        **{
            name: asdict(found)
            for name in DISTRIBUTIONS
            if (found := summary.distributions[name]) is not None
        },
    }


def check_complete(records: Sequence[RequestRecord], options: argparse.Namespace) -> None:
    """Raise RuntimeError unless every request got all its tokens."""
    failed = [record.error for record in records if record.error]
    short = [r.num_output_tokens for r in records if r.num_output_tokens != options.output_tokens]
    if failed or short or len(records) != options.requests:
        raise RuntimeError(
            f"{options.side} answered {len(records)} of {options.requests} requests, "
            f"{len(failed)} failed ({failed[:1]}), {len(short)} have not {options.output_tokens} "
            f"tokens ({short[:5]})"
        )


def side_options(options: argparse.Namespace, folder: Path) -> SideOptions:
    """Size every side for exactly this load."""
    return SideOptions(
        folder=folder,
        device=options.device,
        dtype=options.dtype,
        max_model_len=options.max_model_len or options.input + options.output_tokens + 1,
        max_num_seqs=min(options.requests, options.max_num_seqs),
        max_num_batched_tokens=options.max_num_batched_tokens,
        gpu_memory_utilization=options.gpu_memory_utilization,
        num_kv_blocks=options.num_kv_blocks,
    )


def run_in_process_of_its_own(side: str, arguments: Sequence[str], written: Path) -> dict[str, Any]:
    """Run a side as a child with the same arguments, so that it leaves no memory behind."""
    output = written / "side.json"
    command = [sys.executable, "-m", "paceline.bench.compare", *arguments]
    done = subprocess.run(
        [*command, "--side", side, "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SIDE_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[-PRINTED_LINES:])
        raise RuntimeError(f"{side} ended with status {done.returncode}: {said}")
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def compare(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Run both sides in turn."""
    rounds: dict[str, list[dict[str, Any]]] = {"paceline": [], options.peer: []}
    with tempfile.TemporaryDirectory() as written:
        for _ in range(options.rounds):
            for side, results in rounds.items():
                found = run_in_process_of_its_own(side, arguments, Path(written))
                results.append(found)
                sys.stderr.write(f"{side}: {found['output_tokens_per_s']:,.0f} output tokens/s\n")
    rates = {
        side: statistics.median(found["output_tokens_per_s"] for found in results)
        for side, results in rounds.items()
    }
    return {
        "output_tokens_per_s": rates,
        "ratio": rates["paceline"] / rates[options.peer],
        "rounds": rounds,
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", default="llama-3-8b", help=f"{', '.join(SHAPES)}, or a folder with config.json")
    add("--peer", choices=[side for side in SIDES if side != "paceline"], default="transformers")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--dtype", default="bfloat16")
    add("--requests", type=int, default=32)
    add("--input", type=int, default=1024, help="tokens of a prompt")
    add("--output-tokens", type=int, default=128)
    add("--rounds", type=int, default=1, help="of both sides in turn")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--max-model-len", type=int, help="default: what the load needs")
    add("--max-num-seqs", type=int, default=256, help="of paceline, at most --requests")
    add("--max-num-batched-tokens", type=int, default=8192, help="of paceline")
    add("--num-kv-blocks", type=int, help="default: what the memory holds")
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    add("--output", type=Path, help="file to write; default: standard output")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = make_parser().parse_args(arguments)
    if options.side is not None:
        with tempfile.TemporaryDirectory() as written:
            result = run_side(options, model_folder(options.model, Path(written)))
        options.output.write_text(json.dumps(result))
        return
    result = compare(options, arguments)
    config = {key: value for key, value in vars(options).items() if key not in ("output", "side")}
    write_result(options.output, "compare", config, result)


if __name__ == "__main__":
    main()
