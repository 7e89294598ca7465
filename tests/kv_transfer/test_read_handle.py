"""A read ends once, and tells everyone who asked."""

import pytest

from paceline.kv_transfer.read_handle import PendingRead
from paceline.kv_transfer.transport import ReadOutcome, ReadState


def test_the_first_end_counts() -> None:
    read = PendingRead(10)
    outcomes: list[ReadOutcome] = []
    read.add_done_callback(outcomes.append)
    assert read.state is ReadState.RUNNING
    read.fail("no")
    read.finish()
    assert read.state is ReadState.FAILED
    assert [(o.state, o.num_bytes, o.error) for o in outcomes] == [(ReadState.FAILED, 0, "no")]


def test_a_callback_that_raises_is_logged_and_keeps_nobody_from_hearing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    read = PendingRead(10)
    outcomes: list[ReadOutcome] = []

    def fail(outcome: ReadOutcome) -> None:
        raise RuntimeError("a bug of the waiter")

    read.add_done_callback(fail)
    read.add_done_callback(outcomes.append)
    read.finish()
    assert outcomes[0].num_bytes == 10
    assert "a bug of the waiter" in caplog.text
