"""Tables in Markdown from the results of the GPU's benchmarks. Figures come from there alone."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BREAKDOWN_POINTS = ("1x1024", "64x1024", "256x1024", "64x8192")
MAX_KERNELS = 12
"""Rows of a breakdown; the rest is one row."""
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Document:
    """A benchmark's JSON."""

    name: str
    """Of its file"""
    config: dict[str, Any]
    result: dict[str, Any]

    @property
    def title(self) -> str:
        gpu = self.result.get("gpu") or "CPU"
        return f"{self.config['model']} on {gpu} ([JSON](../bench/results/{self.name}))"


def read_documents(folder: Path, benchmark: str) -> list[Document]:
    """Read all results of one benchmark, in the order of their names."""
    paths = sorted(folder.glob(f"{benchmark}_*.json"))
    read = [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return [Document(name, value["config"], value["result"]) for name, value in read]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def decode_section(engines: Sequence[Document]) -> str:
    """Time of decode steps over their floors."""
    return "\n\n".join(
        f"{document.title}, {_rates_text(document)}:\n\n{_decode_table(document)}"
        for document in engines
        if document.result["decode"]
    )


def _decode_table(document: Document) -> str:
    points = document.result["decode"]

    def row(name: str, show: Callable[[dict[str, Any]], str]) -> list[str]:
        return [name, *(show(point) for point in points.values())]

    return table(
        ["decode, batch × context", *map(point_name, points)],
        [
            row("step, ms", lambda point: f"{point['step_ms']:.2f}"),
            row("floor, ms", lambda point: _number(point.get("floor_ms"), ".2f")),
            row("step over floor", lambda point: _number(point.get("over_floor"), ".2f")),
            row("tokens/s", lambda point: f"{point['tokens_per_s']:,.0f}"),
            row("launch on the CPU, µs", lambda point: f"{point['launch_p50_us']:.0f}"),
        ],
    )


def sampling_section(engines: Sequence[Document]) -> str:
    """What sampling adds to decode steps."""
    rows = [
        [
            document.config["model"],
            point_name(point),
            logits,
            f"{found['step_ms']:.2f}",
            f"{found['sampled_step_ms']:.2f}",
            f"{found['sampled_step_ms'] / found['step_ms'] - 1:+.1%}",
            *(_number(found.get(name), ",.0f") for name in ("greedy_sampling_us", "sampling_us")),
            _number(found.get("sampling_share"), ".1%"),
        ]
        for document in engines
        for point, cases in document.result.get("sampled", {}).items()
        for logits, found in cases.items()
    ]
    head = [
        "model",
        "batch × context",
        "logits",
        "step, greedy, ms",
        "step, sampled, ms",
        "difference",
        "sampling greedily, µs",
        "sampling, µs",
        "share of a sampled step",
    ]
    return table(head, rows) if rows else ""


def prefill_section(engines: Sequence[Document]) -> str:
    """Time of whole prompts."""
    blocks = []
    for document in engines:
        prompts = document.result["prefill"]
        if not prompts:
            continue
        rows = [
            ["ms", *(f"{found['ms']:.1f}" for found in prompts.values())],
            ["TFLOP/s", *(f"{found['tflop_per_s']:.0f}" for found in prompts.values())],
            [
                "of the matrix rate",
                *(_number(found["of_matrix_rate"], ".0%") for found in prompts.values()),
            ],
        ]
        head = ["one prompt, tokens", *(tokens_text(int(count)) for count in prompts)]
        blocks.append(f"{document.title}, {_rates_text(document)}:\n\n{table(head, rows)}")
    return "\n\n".join(blocks)


def kernels_section(engines: Sequence[Document]) -> str:
    """Where the time of a decode step goes."""
    blocks = []
    for document in engines:
        profiles = {
            point_name(point): found["profile"]
            for point, found in document.result["decode"].items()
            if point in BREAKDOWN_POINTS and "profile" in found
        }
        if profiles:
            head = ["µs a step (calls)", *profiles]
            blocks.append(f"{document.title}:\n\n{table(head, _kernel_rows(profiles))}")
    return "\n\n".join(blocks)


def _kernel_rows(profiles: dict[str, dict[str, Any]]) -> list[list[str]]:
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for point, profile in profiles.items():
        for kernel in profile["kernels"]:
            cells.setdefault(kernel["name"], {})[point] = kernel
    longest = sorted(cells, key=lambda name: -sum(found["us"] for found in cells[name].values()))
    named = longest[:MAX_KERNELS]
    rows = [
        [
            f"`{name}`",
            *(
                f"{found['us']:,.0f} ({found['num_calls']:.0f})"
                if (found := cells[name].get(point))
                else ""
                for point in profiles
            ),
        ]
        for name in named
    ]
    rest = [
        profile["other_us"] + sum(k["us"] for k in profile["kernels"] if k["name"] not in named)
        for profile in profiles.values()
    ]
    idle = [profile["idle_us"] for profile in profiles.values()]
    rows.append(["other kernels", *(f"{us:,.0f}" for us in rest)])
    rows.append(["idle, with the tracer on", *(f"{us:,.0f}" for us in idle)])
    return rows


def busy_section(engines: Sequence[Document]) -> str:
    """Share of the time in which the GPU works."""
    rows = [
        [
            document.config["model"],
            point_name(point),
            f"{found['step_ms']:.2f}",
            f"{profile['wall_us'] / 1e3:.2f}",
            f"{profile['busy_us'] / 1e3:.2f}",
            f"{profile['busy_us'] / 1e3 / found['step_ms']:.1%}",
            f"{profile['num_steps']}",
        ]
        for document in engines
        for point, found in document.result["decode"].items()
        if (profile := found.get("profile"))
    ]
    head = [
        "model",
        "batch × context",
        "step, ms",
        "step while traced, ms",
        "busy, ms",
        "busy share of a step",
        "steps traced",
    ]
    return table(head, rows) if rows else ""


def start_up_section(engines: Sequence[Document]) -> str:
    """What starting consists of."""
    blocks = []
    for document in engines:
        steps = document.result["start_up"]
        rows = [[step["name"], f"{step['seconds']:.1f}"] for step in steps]
        rows.append(["in all", f"{sum(step['seconds'] for step in steps):.1f}"])
        cached = document.result["num_cached_kernels"]
        heading = f"{document.title}, {cached} kernels compiled by earlier processes:"
        blocks.append(f"{heading}\n\n{table(['start-up', 's'], rows)}")
    return "\n\n".join(blocks)


def memory_section(engines: Sequence[Document]) -> str:
    """What the engine planned, and what was in use."""
    found = [document for document in engines if document.result["memory"]]
    names = ("weights", "state", "activations", "graphs", "pool")
    rows = [
        [
            document.config["model"],
            *(_gib(memory["plan"][name]) for name in names),
            _gib(memory["loaded"]["in_use"] - memory["before"]["in_use"]),
            _gib(memory["measured"]["in_use"] - memory["before"]["in_use"]),
            _gib(memory["measured"]["max_allocated"]),
        ]
        for document in found
        if (memory := document.result["memory"])
    ]
    head = ["GiB", *(f"{name}, planned" for name in names)]
    head += ["in use when loaded", "in use at the end", "PyTorch's peak"]
    return table(head, rows) if rows else ""


def _rates_text(document: Document) -> str:
    rates = document.result["rates"]
    if rates is None:
        return "without rates"
    return (
        f"rates of this run {rates['read_bytes_per_s'] / 1e12:.2f} TB/s and "
        f"{rates['matrix_flop_per_s'] / 1e12:.0f} TFLOP/s"
    )


def point_name(point: str) -> str:
    batch, context = point.split("x")
    return f"{batch} × {tokens_text(int(context))}"


def tokens_text(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"
