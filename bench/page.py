"""Draw a load as one self-contained HTML page: distributions and a timeline of requests."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from paceline.bench.record import LoadSummary, RequestRecord
from paceline.bench.report import NAMES, cached, repeated

WIDTH = 1000.0
"""Of every drawing, in its own units; the page scales it."""
MAX_ROWS = 200
"""Requests in the timeline; more cannot be told apart."""
NUM_BINS = 40
PHASE_ORDER = ("queue", "wait", "prefill", "router", "kv_transfer", "decode")


class Bar(NamedTuple):
    """A rectangle of a drawing, and what it says when pointed at."""

    kind: str
    row: float
    x: float
    width: float
    height: float
    label: str


class Histogram(NamedTuple):
    """One distribution."""

    name: str
    bars: list[Bar]
    low_ms: float
    high_ms: float
    num_values: int


def write_page(
    path: Path, title: str, summary: LoadSummary, records: Sequence[RequestRecord]
) -> None:
    """Write the page. Records without a token are listed as failures, not drawn."""
    good = sorted((r for r in records if r.succeeded), key=lambda record: record.sent_s)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    start_s = good[0].sent_s if good else 0.0
    end_s = max((record.ended_s for record in good), default=1.0)
    page = environment.get_template("page.html").render(
        title=title,
        summary=summary,
        names=NAMES,
        cached=cached(summary),
        repeated=repeated(summary),
        width=WIDTH,
        histograms=list(_histograms(good)),
        rows=min(len(good), MAX_ROWS),
        num_hidden=max(0, len(good) - MAX_ROWS),
        bars=list(timeline_bars(good[:MAX_ROWS], start_s, end_s)),
        duration_s=end_s - start_s,
        failures=[record for record in records if not record.succeeded],
        phases=PHASE_ORDER,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def timeline_bars(records: Sequence[RequestRecord], start_s: float, end_s: float) -> Iterator[Bar]:
    """Lay each request's spans out in its row; transfers lie thinner, over what they overlap."""
    scale = WIDTH / max(end_s - start_s, 1e-9)
    for row, record in enumerate(records):
        for span in record.timeline:
            thin = span.phase == "kv_transfer"
            tokens = f", {span.num_tokens} tokens" if span.num_tokens else ""
            yield Bar(
                kind=span.phase,
                row=row + (0.35 if thin else 0.1),
                x=(span.start_s - start_s) * scale,
                width=max((span.end_s - span.start_s) * scale, 0.3),
                height=0.3 if thin else 0.8,
                label=f"{record.request_id} {span.phase} on {span.worker_id}: "
                f"{1000 * (span.end_s - span.start_s):.1f} ms{tokens}",
            )


def _histograms(records: Sequence[RequestRecord]) -> Iterator[Histogram]:
    values = {
        "ttft": [record.ttft_s for record in records],
        "tpot": [tpot for record in records if (tpot := record.tpot_s) is not None],
        "itl": [gap for record in records for gap in record.itl_s],
        "e2e": [record.e2e_s for record in records],
    }
    for key, seconds in values.items():
        if seconds:
            yield histogram(NAMES[key], [1000 * value for value in seconds])


def histogram(name: str, values_ms: Sequence[float]) -> Histogram:
    """Count values in bins of equal width, up to the 99.5th percentile so that the shape shows."""
    ordered = sorted(values_ms)
    low, high = ordered[0], ordered[int(0.995 * (len(ordered) - 1))]
    bin_width = max((high - low) / NUM_BINS, 1e-6)
    counts = [0] * NUM_BINS
    for value in ordered:
        counts[min(int((value - low) / bin_width), NUM_BINS - 1)] += 1
    tallest = max(counts)
    bars = [
        Bar(
            kind="count",
            row=1 - count / tallest,
            x=number * WIDTH / NUM_BINS,
            width=WIDTH / NUM_BINS - 1,
            height=count / tallest,
            label=f"{low + number * bin_width:.2f} to {low + (number + 1) * bin_width:.2f} ms: "
            f"{count}",
        )
        for number, count in enumerate(counts)
        if count
    ]
    return Histogram(name, bars, low, high, len(ordered))
