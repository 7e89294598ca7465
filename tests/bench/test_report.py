"""Figures, table, document and page of a load, from records with known times."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from paceline.bench.page import histogram, timeline_bars, write_page
from paceline.bench.record import Distribution, Limits, RequestRecord, summarize
from paceline.bench.report import result_document, summary_table
from paceline.request import PhaseTimes, Span


def make_record(number: int, *, ttft_s: float = 0.5, gap_s: float = 0.1) -> RequestRecord:
    sent = 100.0 + number
    return RequestRecord(
        request_id=f"r{number}",
        prompt_tokens=10,
        max_tokens=4,
        scheduled_s=sent,
        sent_s=sent,
        token_times_s=[sent + ttft_s + gap_s * index for index in range(4)],
        ended_s=sent + ttft_s + 3 * gap_s,
        phases=PhaseTimes(0.0, 0.2 * ttft_s, 0.8 * ttft_s, 0.0, 3 * gap_s),
        timeline=[
            Span("wait", "router-0", sent, sent + 0.2 * ttft_s),
            Span("prefill", "prefill-0", sent + 0.2 * ttft_s, sent + ttft_s, 10),
            Span("decode", "decode-0", sent + ttft_s, sent + ttft_s + 3 * gap_s, 3),
        ],
    )


def failed_record() -> RequestRecord:
    return RequestRecord("bad", 10, 4, 100.0, sent_s=100.0, ended_s=101.0, error="UNAVAILABLE: x")


def test_figures_follow_from_the_tokens_times() -> None:
    summary = summarize([make_record(0), make_record(1, ttft_s=1.5)], Limits(ttft_s=1.0))
    assert summary.duration_s == pytest.approx(2.8)
    assert summary.output_tokens_per_s == pytest.approx(8 / 2.8)
    assert summary.good_share == 0.5
    ttft = summary.distributions["ttft"]
    assert ttft is not None
    assert ttft.mean == 1.0
    itl = summary.distributions["itl"]
    assert itl is not None
    assert round(itl.p99, 6) == 0.1


def test_percentiles_are_values_that_were_seen() -> None:
    found = Distribution.of([float(value) for value in range(1, 101)])
    assert found == Distribution(mean=50.5, p50=51.0, p95=96.0, p99=100.0)
    assert Distribution.of([]) is None


def test_a_failed_request_is_counted_and_left_out_of_the_distributions() -> None:
    summary = summarize([make_record(0), failed_record()], Limits())
    assert (summary.num_requests, summary.num_failed) == (2, 1)
    assert summary.good_share == 0.5
    only = summarize([failed_record()], Limits())
    assert only.distributions["ttft"] is None


def test_one_token_meets_a_limit_on_the_time_between_tokens() -> None:
    record = make_record(0)
    record.token_times_s = record.token_times_s[:1]
    assert Limits(tpot_s=0.001).are_met(record)
    assert not Limits(ttft_s=0.001).are_met(record)


def test_the_document_is_json_and_names_errors() -> None:
    records = [make_record(0), failed_record()]
    document = json.loads(
        json.dumps(result_document(summarize(records, Limits()), Limits(), records))
    )
    assert document["errors"] == ["UNAVAILABLE: x"]
    assert document["requests"][0]["num_output_tokens"] == 4


def test_the_table_shows_milliseconds() -> None:
    console = Console(width=120, record=True)
    console.print(summary_table(summarize([make_record(0)], Limits()), "load"))
    text = console.export_text()
    assert "time to first token" in text
    assert "500.0" in text
    [wait] = [line for line in text.splitlines() if "phase: worker wait" in line]
    assert "100.0" in wait


def test_table_and_page_say_what_the_prefix_cache_saved(tmp_path: Path) -> None:
    records = [make_record(0), make_record(1), failed_record()]
    records[1].cached_tokens = 5
    summary = summarize(records, Limits(), num_shared_tokens=3)
    assert (summary.num_cached_tokens, summary.num_prompt_tokens) == (5, 20)
    assert (summary.cached_share, summary.shared_share) == (0.25, 0.1)
    lines = (
        "25.0% of prompt tokens were cached (5 of 20)",
        "10.0% of prompt tokens repeat within the load",
    )
    console = Console(width=120, record=True)
    console.print(summary_table(summary, "load"))
    table = console.export_text()
    write_page(tmp_path / "page.html", "load", summary, records)
    page = (tmp_path / "page.html").read_text()
    assert all(line in table and line in page for line in lines)
    assert result_document(summary, Limits(), records)["summary"]["cached_share"] == 0.25


def test_the_page_draws_every_phase_and_lists_failures(tmp_path: Path) -> None:
    records = [make_record(0), make_record(1), failed_record()]
    path = tmp_path / "page.html"
    write_page(path, "a <load>", summarize(records, Limits()), records)
    text = path.read_text()
    assert "a &lt;load&gt;" in text
    assert text.count('class="wait"') == 2
    assert text.count('class="prefill"') == 2
    assert "phase: worker wait" in text
    assert "UNAVAILABLE: x" in text


def test_bars_lie_where_their_spans_are() -> None:
    wait, prefill, decode = timeline_bars([make_record(0)], 100.0, 101.0)
    assert (wait.x, round(wait.width, 6)) == (0.0, 100.0)
    assert (round(prefill.x, 6), round(prefill.width, 6)) == (100.0, 400.0)
    assert (round(decode.x, 6), round(decode.width, 6)) == (500.0, 300.0)


def test_a_histogram_counts_every_value() -> None:
    drawn = histogram("x", [1.0, 2.0, 2.0, 3.0])
    assert sum(int(bar.label.rsplit(": ", 1)[1]) for bar in drawn.bars) == 4
