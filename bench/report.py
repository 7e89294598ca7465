"""Show a load's figures: a table for people, a document for machines."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from paceline.bench.record import Limits, LoadSummary, RequestRecord

NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "gap between tokens",
    "e2e": "end to end",
    "queue": "phase: queue",
    "wait": "phase: worker wait",
    "prefill": "phase: prefill",
    "router": "phase: router wait",
    "kv_transfer": "phase: KV transfer",
    "decode": "phase: decode",
}


def summary_table(summary: LoadSummary, title: str) -> Table:
    """Lay the distributions out in milliseconds, the rates below."""
    table = Table(title=title, caption=_rates(summary), caption_justify="left")
    table.add_column("milliseconds")
    for column in ("mean", "p50", "p95", "p99"):
        table.add_column(column, justify="right")
    for key, name in NAMES.items():
        found = summary.distributions[key]
        values = asdict(found).values() if found is not None else ()
        cells = [f"{1000 * value:,.1f}" for value in values] or ["–"] * 4
        table.add_row(name, *cells)
    return table


def _rates(summary: LoadSummary) -> str:
    return (
        f"{summary.num_requests} requests, {summary.num_failed} failed, "
        f"{summary.num_resumed} resumed, {summary.duration_s:.1f} s\n"
        f"{summary.output_tokens_per_s:,.1f} output tokens/s, "
        f"{summary.input_tokens_per_s:,.1f} input tokens/s, "
        f"{summary.requests_per_s:.2f} requests/s\n"
        f"{cached(summary)}\n{repeated(summary)}\n"
        f"goodput {summary.goodput_per_s:.2f} requests/s ({summary.good_share:.0%} within limits)"
    )


def cached(summary: LoadSummary) -> str:
    """Say how much of the prompts the prefix cache saved."""
    return (
        f"{summary.cached_share:.1%} of prompt tokens were cached "
        f"({summary.num_cached_tokens:,} of {summary.num_prompt_tokens:,})"
    )


def repeated(summary: LoadSummary) -> str:
    """Say how much of the prompts the load itself makes it save."""
    return f"{summary.shared_share:.1%} of prompt tokens repeat within the load"


def result_document(
    summary: LoadSummary, limits: Limits, records: Sequence[RequestRecord]
) -> dict[str, Any]:
    """Everything a later reader may ask for, JSON-ready."""
    return {
        "summary": asdict(summary),
        "limits": asdict(limits),
        "errors": [record.error for record in records if record.error],
        "requests": [_request_document(record) for record in records],
    }


def _request_document(record: RequestRecord) -> dict[str, Any]:
    document = asdict(record)
    del document["token_times_s"], document["timeline"]
    document["num_output_tokens"] = record.num_output_tokens
    document["ttft_s"] = record.ttft_s if record.succeeded else None
    document["tpot_s"] = record.tpot_s if record.succeeded else None
    return document
