"""Figures of a load are of all its requests, and medians and ratios of what there is."""

import pytest

from paceline.bench.compared_figures import (
    decode_step_s,
    load_figures,
    median_figures,
    ratio_figures,
)
from paceline.bench.compared_loads import PlannedLoad
from paceline.bench.load import PlannedRequest
from paceline.bench.record import RequestRecord


def make_record(*token_times_s: float, due_s: float = 0.0) -> RequestRecord:
    return RequestRecord(
        "a",
        10,
        len(token_times_s),
        due_s,
        due_s,
        token_times_s=list(token_times_s),
        ended_s=token_times_s[-1],
    )


def make_load(*max_tokens: int, num_left_out: int = 0) -> PlannedLoad:
    requests = [PlannedRequest(0.0, (1,) * 10, count) for count in max_tokens]
    return PlannedLoad("load", requests, num_left_out)


def test_figures_are_of_the_whole_load() -> None:
    records = [make_record(1.0, 2.0, 4.0), make_record(3.0, 4.0, due_s=2.0)]
    figures = load_figures(make_load(3, 2, num_left_out=7), records)
    assert figures["num_requests"] == 2
    assert figures["num_left_out"] == 7
    assert figures["duration_s"] == 4.0
    assert figures["output_tokens_per_s"] == 5 / 4
    assert figures["requests_per_s"] == 2 / 4
    assert figures["ttft"]["p99"] == 1.0
    assert figures["tpot"]["mean"] == pytest.approx(1.25)
    assert figures["decode_step_s"] == 1.0


def test_a_decode_step_is_a_gap_while_all_decode_together() -> None:
    early, late = make_record(0.0, 5.0, 6.0, 7.0, 8.0), make_record(5.0, 6.0, 7.1, 8.2, 90.0)
    # Neither the gap that the late one's prompt made, nor that after the early one's end.
    assert decode_step_s([early, late]) == pytest.approx(1.0)
    assert decode_step_s([late]) == pytest.approx(1.1)
    assert decode_step_s([make_record(0.0, 1.0), make_record(2.0, 3.0)]) is None
    assert decode_step_s([make_record(1.0)]) is None


def test_a_side_that_leaves_tokens_out_is_no_result() -> None:
    whole, short = make_record(1.0, 2.0, 3.0), make_record(1.0)
    with pytest.raises(RuntimeError, match=r"1 have not all their tokens \(\['1 of 3'\]\)"):
        load_figures(make_load(3, 3), [whole, short])
    with pytest.raises(RuntimeError, match="1 of 2 requests were answered"):
        load_figures(make_load(3, 3), [whole])
    short.error = "no memory"
    with pytest.raises(RuntimeError, match=r"1 failed .*no memory"):
        load_figures(make_load(3, 1), [whole, short])


def test_medians_and_ratios_are_of_the_figures_that_all_have() -> None:
    rounds = [{"rate": value, "ttft": {"p50": value, "p99": 1.0}} for value in (1.0, 4.0, 2.0)]
    assert median_figures(rounds) == {"rate": 2.0, "ttft": {"p50": 2.0, "p99": 1.0}}
    assert median_figures([{"rate": 1.0, "step": 3.0}, {"rate": 3.0}]) == {"rate": 2.0}
    theirs = {"rate": 4.0, "num_resumed": 0, "ttft": {"p50": 1.0}}
    assert ratio_figures({**rounds[0], "num_resumed": 0}, theirs) == {
        "rate": 0.25,
        "ttft": {"p50": 1.0},
    }
