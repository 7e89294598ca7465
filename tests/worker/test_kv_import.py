"""The state machine of one import."""

import pytest

from paceline.errors import IntegrityError
from paceline.kv_transfer.lease import FirstToken
from paceline.kv_transfer.read_plan import ReadPlan
from paceline.kv_transfer.transport import ReadOutcome, ReadState
from paceline.request import AttemptKey, Span
from paceline.worker.kv_import import (
    TRANSITIONS,
    ImportState,
    KvImport,
    LeaseNews,
    Read,
)

KEY = AttemptKey("r", 1)
DONE = ReadOutcome(ReadState.DONE, 10, 1.0, 2.0)
FAILED = ReadOutcome(ReadState.FAILED, 0, 1.0, 2.0, "cable cut")
FIRST = (FirstToken(0, 7),)


class Recorder:
    """Writes down what the import says."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.reason = ""

    def import_progressed(self, key: AttemptKey) -> None:
        self.calls.append("progressed")

    def imported(self, key: AttemptKey, first_tokens: object) -> None:
        self.calls.append("imported")

    def confirmed(self, key: AttemptKey, spans: list[Span], num_bytes: int) -> None:
        self.calls.append(f"confirmed {len(spans)} spans {num_bytes} bytes")

    def lost(self, key: AttemptKey, reason: str) -> None:
        self.calls.append("lost")
        self.reason = reason

    def import_ended(self, key: AttemptKey) -> None:
        self.calls.append("ended")


def make_import(num_tokens: int = 40, num_cached: int = 0) -> tuple[KvImport, Recorder]:
    targets = list(range(100, 100 + -(-num_tokens // 16)))
    plan = ReadPlan(
        block_tokens=16,
        num_context_tokens=num_tokens,
        targets=targets,
        num_cached_blocks=num_cached,
    )
    recorder = Recorder()
    return KvImport(KEY, plan, recorder, reader_id="decode-0", block_tokens=16), recorder


def start_read(started: KvImport, news: LeaseNews) -> Read:
    read = started.take_news(news)
    assert read is not None
    return read


def test_chunks_are_read_as_they_become_final_and_the_partial_block_last() -> None:
    started, recorder = make_import()
    first = start_read(started, LeaseNews(9, [5, 6, 7], 32, ()))
    assert first == Read([5, 6], [100, 101])
    started.read_ended(first, DONE)
    assert started.state is ImportState.SUBSCRIBED
    last = start_read(started, LeaseNews(9, [], 40, FIRST))
    assert last == Read([7], [102])
    assert "imported" not in recorder.calls
    started.read_ended(last, DONE)
    assert started.state is ImportState.CONFIRMING
    started.take_verdict(held=True)
    assert recorder.calls[2:] == ["imported", "confirmed 2 spans 20 bytes", "ended"]
    assert started.is_quiet


def test_a_context_that_is_cached_whole_needs_no_read() -> None:
    started, recorder = make_import(num_tokens=32, num_cached=2)
    assert started.take_news(LeaseNews(9, [5, 6], 32, FIRST)) is None
    assert started.state is ImportState.CONFIRMING
    assert recorder.calls == ["progressed", "imported"]


def test_destinations_are_not_given_back_while_a_read_runs() -> None:
    started, recorder = make_import()
    read = start_read(started, LeaseNews(9, [5, 6, 7], 32, ()))
    started.lose("revoked")
    assert recorder.calls[-1] == "lost"
    assert not started.is_quiet
    started.read_ended(read, DONE)
    assert recorder.calls[-1] == "ended"
    assert started.is_quiet


def test_a_failed_read_loses_the_import_and_says_why() -> None:
    started, recorder = make_import()
    read = start_read(started, LeaseNews(9, [5, 6, 7], 32, ()))
    started.read_ended(read, FAILED)
    assert recorder.calls[-2:] == ["lost", "ended"]
    assert "cable cut" in recorder.reason


def test_a_lost_verdict_loses_what_was_read() -> None:
    started, recorder = make_import(num_tokens=16)
    started.read_ended(start_read(started, LeaseNews(9, [5], 16, FIRST)), DONE)
    started.take_verdict(held=False)
    assert recorder.calls[-2:] == ["lost", "ended"]
    started.take_verdict(held=True)
    assert started.state is ImportState.LOST


def test_an_abandoned_import_says_only_that_it_ended() -> None:
    started, recorder = make_import()
    read = start_read(started, LeaseNews(9, [5, 6, 7], 32, ()))
    started.abandon()
    started.read_ended(read, FAILED)
    assert recorder.calls == ["progressed", "ended"]


def test_abandoning_while_the_verdict_is_under_way_ends_once() -> None:
    started, recorder = make_import(num_tokens=16)
    started.read_ended(start_read(started, LeaseNews(9, [5], 16, FIRST)), DONE)
    started.abandon()
    started.take_verdict(held=True)
    assert recorder.calls == ["progressed", "imported", "ended"]


def test_news_after_the_end_start_nothing() -> None:
    started, _ = make_import()
    started.lose("gone")
    assert started.take_news(LeaseNews(9, [5, 6, 7], 40, FIRST)) is None


def test_news_that_contradict_the_context_lose_the_import() -> None:
    started, recorder = make_import()
    assert started.take_news(LeaseNews(9, [5], 40, FIRST)) is None
    assert recorder.calls[-2:] == ["lost", "ended"]
    assert "makes no sense" in recorder.reason


def test_a_lease_cannot_change_its_name() -> None:
    started, _ = make_import()
    started.take_news(LeaseNews(9, [5, 6, 7], 16, ()))
    with pytest.raises(IntegrityError, match="lease 9 and now 10"):
        started.take_news(LeaseNews(10, [], 40, FIRST))


@pytest.mark.parametrize("state", ImportState)
@pytest.mark.parametrize("target", ImportState)
def test_only_written_transitions_happen(state: ImportState, target: ImportState) -> None:
    started, _ = make_import()
    started.state = state
    if target in TRANSITIONS[state]:
        started._move(target)
        assert started.state is target
    else:
        with pytest.raises(IntegrityError, match="cannot go"):
            started._move(target)
