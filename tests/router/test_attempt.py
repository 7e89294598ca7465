import itertools

import pytest

from paceline.errors import IntegrityError
from paceline.request import AttemptKey
from paceline.router.attempt import TRANSITIONS, Attempt, AttemptEvent, AttemptState


def make_attempt(state: AttemptState, prefill_id: str | None = "p0") -> Attempt:
    return Attempt(AttemptKey("a", 1), prefill_id, "d0", {0: 1}, state)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(AttemptState, AttemptEvent)))
def test_every_move_is_in_the_table_or_raises(state: AttemptState, event: AttemptEvent) -> None:
    attempt = make_attempt(state)
    wanted = TRANSITIONS.get((state, event))
    if wanted is None:
        with pytest.raises(IntegrityError, match=event.name):
            attempt.move(event)
        assert attempt.state is state
    else:
        attempt.move(event)
        assert attempt.state is wanted


def test_nothing_leaves_the_end() -> None:
    assert not any(state is AttemptState.ENDED for state, _ in TRANSITIONS)


def test_prefill_worker_is_needed_until_decode_has_sent_a_token() -> None:
    assert make_attempt(AttemptState.SENT).workers() == ("d0", "p0")
    assert make_attempt(AttemptState.ADMITTED).workers() == ("d0", "p0")
    assert make_attempt(AttemptState.DECODING).workers() == ("d0",)
    assert make_attempt(AttemptState.SENT, prefill_id=None).workers() == ("d0",)
