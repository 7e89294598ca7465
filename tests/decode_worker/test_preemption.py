"""Who gives up its blocks: the youngest, and never the oldest sequence."""

from collections import OrderedDict

from decode_simulation import make_attempt

from paceline.decode_worker.attempts import Attempt, AttemptState, Sequence, SequenceState
from paceline.decode_worker.preemption import Victim, choose_victim

WAITING, RUNNING = SequenceState.WAITING, SequenceState.RUNNING
FINISHED = SequenceState.FINISHED


def make(*states: SequenceState) -> Attempt:
    attempt = make_attempt(AttemptState.RUNNING)
    attempt.sequences = tuple(
        Sequence(attempt, choice, choice, choice, state) for choice, state in enumerate(states)
    )
    return attempt


def choose(*attempts: Attempt) -> Victim | None:
    return choose_victim(OrderedDict.fromkeys(a for a in attempts if a.holds_blocks))


def test_the_youngest_goes_whether_it_runs_or_waits() -> None:
    old, middle = make(RUNNING), make(RUNNING)
    for young in (make(RUNNING), make(WAITING)):
        victim = choose(old, middle, young)
        assert victim is not None
        assert victim.attempt is young


def test_of_a_running_attempt_one_choice_goes_and_of_a_waiting_one_all() -> None:
    running, waiting = make(RUNNING, RUNNING), make(WAITING, WAITING)
    victim = choose(make(RUNNING), running)
    assert victim is not None
    assert victim.sequences == (running.sequences[1],)
    victim = choose(make(RUNNING), waiting)
    assert victim is not None
    assert victim.sequences == waiting.sequences


def test_what_has_finished_holds_no_blocks_and_is_passed_over() -> None:
    done, old, young = make(FINISHED), make(RUNNING), make(FINISHED)
    middle = make(RUNNING)
    victim = choose(done, old, middle, young)
    assert victim is not None
    assert victim.attempt is middle
    assert choose(done, old, young) is None


def test_the_oldest_attempt_keeps_one_choice() -> None:
    oldest = make(RUNNING, RUNNING, FINISHED)
    victim = choose(oldest)
    assert victim is not None
    assert victim.sequences == (oldest.sequences[1],)
    assert choose(make(RUNNING, FINISHED)) is None
    assert choose(make(WAITING, WAITING)) is None
    assert choose() is None
