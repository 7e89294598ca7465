"""When connects are tried again, with time passed in."""

import logging

import pytest

from paceline.kv_transfer.connect_backoff import ConnectBackoff


def test_two_failures_hold_nothing_up() -> None:
    backoff = ConnectBackoff("owner-0.1")
    for _ in range(2):
        backoff.failed("no route", 100.0)
        assert backoff.refusal(100.0) is None


def test_the_pause_doubles_from_one_second_to_thirty_and_a_success_ends_it() -> None:
    backoff = ConnectBackoff("owner-0.1")
    now = 100.0
    backoff.failed("no route", now)
    backoff.failed("no route", now)
    for pause_s in (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        backoff.failed("no route", now)
        assert "(no route)" in (backoff.refusal(now + pause_s - 0.01) or "")
        now += pause_s
        assert backoff.refusal(now) is None
    backoff.connected()
    backoff.failed("no route", now)
    assert backoff.refusal(now) is None


def test_the_reason_is_told_once_as_an_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    backoff = ConnectBackoff("owner-0.1")
    for _ in range(6):
        backoff.failed("no route", 100.0)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in errors] == [
        "event=kv_pair_cannot_connect peer=owner-0.1 num_failures=3 error='no route'"
    ]
    backoff.connected()
    assert "event=kv_pair_connects_again peer=owner-0.1 num_failures=6" in caplog.text
