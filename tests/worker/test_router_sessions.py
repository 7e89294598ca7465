"""What routers are told, and in which order."""

from typing import Any

import numpy as np

from paceline.internal.v1 import worker_pb2
from paceline.request import AttemptKey, FailureReason
from paceline.wire import unpack_uint32
from paceline.worker.core import LoadReport
from paceline.worker.outgoing import Outgoing
from paceline.worker.router_sessions import RouterSessions
from paceline.worker.step_output import StepOutput

KEY = AttemptKey("r", 1)
LOAD = LoadReport(10, 4, 0, 0, 10, False)


class LoadedCore:
    """Has a load and nothing else."""

    def __init__(self) -> None:
        self.value = LOAD

    def load(self) -> LoadReport:
        return self.value


def make_output(stream_id: int) -> StepOutput:
    one = np.array([stream_id], dtype=np.uint32)
    return StepOutput(stream_ids=one, indices=one * 0, token_ids=one + 100)


async def open_sessions(core: Any) -> tuple[RouterSessions, list[worker_pb2.SessionResponse]]:
    sessions = RouterSessions()
    stream: Outgoing[worker_pb2.SessionResponse] = Outgoing()
    sent: list[worker_pb2.SessionResponse] = []
    stream.send = sent.append  # type: ignore[method-assign]
    sessions.open(7, stream)
    sessions.report(core, 0.0)
    return sessions, sent


async def test_tokens_of_a_round_travel_with_the_load_after_it() -> None:
    core = LoadedCore()
    sessions, sent = await open_sessions(core)
    sessions.send_output(7, make_output(3))
    core.value = LOAD._replace(credit_blocks=9)
    sessions.report(core, 0.0)
    step = sent[-1].step
    assert list(unpack_uint32(step.stream_ids)) == [3]
    assert list(unpack_uint32(step.token_ids)) == [103]
    assert step.load.credit_blocks == 9


async def test_tokens_come_before_a_failure_of_the_same_round() -> None:
    sessions, sent = await open_sessions(LoadedCore())
    sessions.send_output(7, make_output(3))
    sessions.send_failure(7, (3,), FailureReason.PREEMPTED, "too few blocks")
    assert [message.WhichOneof("message") for message in sent[-2:]] == ["step", "failure"]


async def test_an_early_message_claims_no_load_that_is_not_known_yet() -> None:
    sessions, sent = await open_sessions(LoadedCore())
    sessions.send_output(7, make_output(3))
    sessions.count_dispatch(7)
    sessions.send_admission(7, KEY, admitted=True, message="", cached_tokens=0)
    assert not sent[-2].step.HasField("load")


async def test_nothing_is_sent_while_nothing_changes() -> None:
    core = LoadedCore()
    sessions, sent = await open_sessions(core)
    sessions.report(core, 0.0)
    assert len(sent) == 1


async def test_a_counted_dispatch_is_told_even_if_the_load_is_the_same() -> None:
    core = LoadedCore()
    sessions, sent = await open_sessions(core)
    sessions.count_dispatch(7)
    sessions.report(core, 0.0)
    assert sent[-1].step.load.num_dispatches_seen == 1


async def test_a_session_that_has_ended_is_told_nothing() -> None:
    core = LoadedCore()
    sessions, sent = await open_sessions(core)
    sessions.close(7)
    sessions.send_output(7, make_output(3))
    sessions.send_failure(7, (3,), FailureReason.INTERNAL, "x")
    sessions.report(core, 0.0)
    assert len(sent) == 1


async def test_every_report_says_when_it_was_made_by_a_clock_that_never_goes_back() -> None:
    core = LoadedCore()
    sessions, sent = await open_sessions(core)
    for stream_id in range(3):
        sessions.send_output(7, make_output(stream_id))
        sessions.report(core, 0.0)
    times_s = [message.step.made_s for message in sent if message.step.HasField("made_s")]
    assert len(times_s) == len(sent)
    assert times_s == sorted(times_s)


async def test_claim_lasts_until_the_next_dispatch_or_the_end_of_its_session() -> None:
    core = LoadedCore()
    sessions, sent = await open_sessions(core)
    other: list[worker_pb2.SessionResponse] = []
    stream: Outgoing[worker_pb2.SessionResponse] = Outgoing()
    stream.send = other.append  # type: ignore[method-assign]
    sessions.open(8, stream)
    for end_claim in (
        lambda: sessions.count_dispatch(8),
        lambda: sessions.claim(8, 0, 0, 0.0, False, 0.0),
        lambda: sessions.close(8),
    ):
        sessions.claim(8, 100, 1, 5.0, True, 0.0)
        sessions.report(core, 0.0)
        assert sent[-1].step.load.credit_blocks == 0
        end_claim()
        sessions.report(core, 0.0)
        assert sent[-1].step.load.credit_blocks == LOAD.credit_blocks
