"""Where a request's time went, from given times."""

import pytest
from router_requests import make_active_request

from paceline.request import PhaseTimes, Span
from paceline.router.active_request import MAX_SPANS

WORKER_CLOCK_S = 1.7e9
"""The worker's clock, which has nothing to do with the router's."""


def chunk(start_s: float, end_s: float) -> Span:
    return Span("prefill", "prefill-0", WORKER_CLOCK_S + start_s, WORKER_CLOCK_S + end_s, 100)


def test_what_the_worker_did_not_compute_between_dispatch_and_first_token_is_wait() -> None:
    request = make_active_request(arrived_s=10.0)
    request.dispatched(12.0)
    request.add_spans(1, [chunk(0.0, 0.5), chunk(1.0, 1.25)])
    request.first_token_s, request.last_token_s = 16.0, 20.0
    assert request.phase_times() == PhaseTimes(2.0, 2.75, 1.25, 0.0, 4.0)


def test_all_is_prefill_as_long_as_the_worker_has_not_reported() -> None:
    request = make_active_request()
    request.dispatched(1.0)
    request.first_token_s = request.last_token_s = 4.0
    assert request.phase_times() == PhaseTimes(1.0, 0.0, 3.0, 0.0, 0.0)


@pytest.mark.parametrize("computed_s", [-1.0, 3.5])
def test_no_phase_is_negative_or_too_long_when_a_workers_clock_jumps(computed_s: float) -> None:
    request = make_active_request()
    request.dispatched(1.0)
    request.add_spans(1, [chunk(0.0, computed_s)])
    request.first_token_s = request.last_token_s = 4.0
    times = request.phase_times()
    assert times.wait_s >= 0.0
    assert times.prefill_s >= 0.0
    assert times.wait_s + times.prefill_s == 3.0


@pytest.mark.parametrize("is_reported", [True, False])
def test_the_time_that_the_first_token_waited_for_the_router_is_no_prefill(
    is_reported: bool,
) -> None:
    request = make_active_request()
    request.dispatched(1.0)
    if is_reported:
        request.add_spans(1, [chunk(0.0, 0.5)])
    request.first_token_s = request.last_token_s = 4.0
    request.first_token_lag_s = 2.0
    wait_s, prefill_s = (0.5, 0.5) if is_reported else (0.0, 1.0)
    assert request.phase_times() == PhaseTimes(1.0, wait_s, prefill_s, 0.0, 0.0, 2.0)


def test_an_attempt_that_gave_no_token_counts_as_wait() -> None:
    request = make_active_request()
    request.dispatched(0.0)
    request.add_spans(1, [chunk(0.0, 3.0)])  # its worker died before the first token was sent
    request.dispatched(5.0)
    request.add_spans(2, [chunk(6.0, 8.0)])
    request.first_token_s = request.last_token_s = 9.0
    assert request.phase_times() == PhaseTimes(0.0, 7.0, 2.0, 0.0, 0.0)


def test_computing_the_context_again_after_the_first_token_belongs_to_decode() -> None:
    request = make_active_request()
    request.dispatched(0.0)
    request.add_spans(1, [chunk(1.0, 3.0)])
    request.first_token_s = 4.0
    request.dispatched(5.0)
    request.add_spans(2, [chunk(6.0, 16.0)])
    request.last_token_s = 20.0
    assert request.phase_times() == PhaseTimes(0.0, 2.0, 2.0, 0.0, 16.0)


def test_a_report_that_comes_after_the_first_token_counts() -> None:
    request = make_active_request()
    request.dispatched(0.0)
    request.first_token_s = request.last_token_s = 4.0
    request.add_spans(1, [chunk(1.0, 3.0)])
    assert request.phase_times() == PhaseTimes(0.0, 2.0, 2.0, 0.0, 0.0)


def test_a_request_that_resumes_again_and_again_keeps_a_bounded_number_of_spans() -> None:
    request = make_active_request()
    for attempt in range(1, 3 * MAX_SPANS):
        request.dispatched(float(attempt))
        request.add_spans(attempt, [Span("kv_transfer", "decode-0", 1.0, 1.5, attempt)])
    assert len(request.spans) == MAX_SPANS
    assert request.spans[-1].num_tokens == 3 * MAX_SPANS - 1
    assert request.phase_times().kv_transfer_s == 0.5 * (3 * MAX_SPANS - 1)
