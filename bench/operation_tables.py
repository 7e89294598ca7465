"""Tables in Markdown from results of `paceline.bench.kernels`, one for each kind of operation."""

from collections.abc import Mapping
from typing import Any

from paceline.bench.gpu_tables import Document, table, tokens_text


def operations_section(document: Document) -> str:
    """Every operation beside its floor and PyTorch's own."""
    result = document.result
    return "\n\n".join(
        (
            _products_table(result["products"]),
            _decode_attention_table(result["decode_attention"]),
            _prefill_attention_table(result["prefill_attention"]),
            _small_table(result["small"]),
        )
    )


def _products_table(products: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(next(iter(products.values())))
    rows = [
        [f"{rows}{who}", *(f"{found[name][key]:.1f}" for name in names)]
        for rows, found in products.items()
        for who, key in (("", "us"), (" PyTorch", "torch_us"))
    ]
    floors = next(iter(products.values()))
    rows.append(["floor of the first", *(f"{floors[name]['floor_us']:.1f}" for name in names)])
    return table(["product, µs", *names], rows)


def _decode_attention_table(points: Mapping[str, Any]) -> str:
    names = []
    for point in points:
        batch, context = point.split(" x ")
        text = tokens_text(int(context)) if context.isdigit() else context
        names.append(f"{batch} × {text}")
    return table(
        ["decode attention, batch × context", *names],
        [
            ["µs", *(f"{found['us']:.1f}" for found in points.values())],
            ["over floor", *(f"{found['over_floor']:.2f}" for found in points.values())],
        ],
    )


def _prefill_attention_table(lengths: Mapping[str, Any]) -> str:
    def torch_rate(found: Mapping[str, Any]) -> float:
        return float(found["tflop_per_s"] * found["us"] / found["torch_us"])

    return table(
        ["prefill attention, causal, TFLOP/s", *(tokens_text(int(count)) for count in lengths)],
        [
            [
                "paceline, paged keys",
                *(f"{found['tflop_per_s']:.0f}" for found in lengths.values()),
            ],
            ["PyTorch, dense keys", *(f"{torch_rate(found):.0f}" for found in lengths.values())],
        ],
    )


def _small_table(found: Mapping[str, Any]) -> str:
    """One row an operation, one column a number of tokens, rows or blocks."""
    operations: dict[str, dict[int, Mapping[str, Any]]] = {}
    for name, times in found.items():
        operation, _, count = name.rpartition(" ")
        operations.setdefault(operation, {})[int(count)] = times
    counts = sorted({count for by_count in operations.values() for count in by_count})
    rows = [
        [operation, *(_small_cell(by_count.get(count)) for count in counts)]
        for operation, by_count in operations.items()
    ]
    return table(["µs (PyTorch's), by tokens, rows or blocks", *map(str, counts)], rows)


def _small_cell(times: Mapping[str, Any] | None) -> str:
    if times is None:
        return "–"
    theirs = "" if times["torch_us"] is None else f" ({times['torch_us']:,.0f})"
    return f"{times['us']:,.1f}{theirs}"
