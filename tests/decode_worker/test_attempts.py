"""States of attempts and sequences: every move is in the table, or raises."""

import itertools

import pytest
from decode_simulation import make_attempt

from paceline.decode_worker.attempts import (
    ATTEMPT_MOVES,
    SEQUENCE_MOVES,
    AttemptState,
    Sequence,
    SequenceState,
)
from paceline.errors import IntegrityError


@pytest.mark.parametrize(("before", "after"), list(itertools.product(AttemptState, repeat=2)))
def test_an_attempt_moves_only_as_the_table_says(before: AttemptState, after: AttemptState) -> None:
    attempt = make_attempt(before)
    if after in ATTEMPT_MOVES[before]:
        attempt.move_to(after)
        assert attempt.state is after
    else:
        with pytest.raises(IntegrityError, match=f"is {before.value} and cannot become"):
            attempt.move_to(after)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(SequenceState, repeat=2)))
def test_a_sequence_moves_only_as_the_table_says(
    before: SequenceState, after: SequenceState
) -> None:
    sequence = Sequence(make_attempt(), choice=0, stream_id=1, slot=0, state=before)
    if after in SEQUENCE_MOVES[before]:
        sequence.move_to(after)
        assert sequence.state is after
    else:
        with pytest.raises(IntegrityError, match=f"is {before.value} and cannot become"):
            sequence.move_to(after)


def test_every_state_has_its_line_in_the_table() -> None:
    assert set(ATTEMPT_MOVES) == set(AttemptState)
    assert set(SEQUENCE_MOVES) == set(SequenceState)
