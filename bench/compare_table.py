"""The table of `bench.compare`, from its results alone: of each load every side, and the ratio."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from paceline.bench.gpu_tables import Document, table, tokens_text


class Column(NamedTuple):
    """A figure of a load."""

    head: str
    path: tuple[str, ...]
    """Where it is among a load's figures"""
    scale: float
    form: str

    def value(self, figures: dict[str, Any]) -> float | None:
        found: Any = figures
        for key in self.path:
            found = found.get(key, {})
        return found or None


COLUMNS = (
    Column("output tokens/s", ("output_tokens_per_s",), 1.0, ",.0f"),
    Column("requests/s", ("requests_per_s",), 1.0, ",.2f"),
    Column("TTFT p50, ms", ("ttft", "p50"), 1e3, ",.1f"),
    Column("p99", ("ttft", "p99"), 1e3, ",.1f"),
    Column("TPOT p50, ms", ("tpot", "p50"), 1e3, ",.1f"),
    Column("p99", ("tpot", "p99"), 1e3, ",.1f"),
    Column("ITL p50, ms", ("itl", "p50"), 1e3, ",.1f"),
    Column("p99", ("itl", "p99"), 1e3, ",.1f"),
    Column("decode step, ms", ("decode_step_s",), 1e3, ",.2f"),
)


def compare_section(comparisons: Sequence[Document]) -> str:
    """The engine beside others."""
    head = ["load", "", *(column.head for column in COLUMNS)]
    return "\n\n".join(
        f"{document.title}, {_rounds_text(document)}:\n\n{table(head, _rows(document))}"
        for document in comparisons
    )


def _rows(document: Document) -> list[list[str]]:
    medians, ratios = document.result["medians"], document.result["ratios"]
    rows = []
    for load in dict.fromkeys(name for figures in medians.values() for name in figures):
        sides = {side: figures[load] for side, figures in medians.items() if load in figures}
        names = [load_text(load, next(iter(sides.values()))), *[""] * len(sides)]
        for name, (side, figures) in zip(names, sides.items(), strict=False):
            cells = [_cell(column.value(figures), column) for column in COLUMNS]
            rows.append([name, _side_text(document, side), *cells])
        if load in ratios:
            found = [column.value(ratios[load]) for column in COLUMNS]
            rows.append(["", "ratio", *("–" if r is None else f"{r:.2f}" for r in found)])
    return rows


def load_text(name: str, figures: dict[str, Any]) -> str:
    """Say what a load of that name is."""
    if match := re.fullmatch(r"(\d+)x(\d+)\+(\d+)", name):
        num_requests, num_in, num_out = map(int, match.groups())
        return f"{num_requests} × {tokens_text(num_in)} in, {tokens_text(num_out)} out"
    trace, _, numbers = name.rpartition(":")
    first, _, rate = numbers.partition("@")
    text = f"{trace}, first {first} " + (f"at {rate}/s" if rate else "at once")
    num_left_out = figures.get("num_left_out")
    return f"{text}, {num_left_out:g} left out" if num_left_out else text


def _rounds_text(document: Document) -> str:
    num_rounds = document.config["rounds"]
    text = "one round" if num_rounds == 1 else f"medians of {num_rounds} rounds"
    failures = [
        f"{found['side']} in round {found['round']}" for found in document.result["failures"]
    ]
    return f"{text}; failed: {', '.join(failures)}" if failures else text


def _side_text(document: Document, side: str) -> str:
    return " ".join(filter(None, (side, document.result["rounds"][side][0].get("version", ""))))


def _cell(value: float | None, column: Column) -> str:
    return "–" if value is None else format(column.scale * value, column.form)
