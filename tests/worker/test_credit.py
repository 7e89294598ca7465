"""Which room routers are offered."""

from hypothesis import given
from hypothesis import strategies as st

from paceline.worker.credit import CLAIM_LIFETIME_S, Claim, Room, offer

NOW = 100.0


def make_claim(
    num_blocks: int, since_s: float, *, num_sequences: int = 1, holds: bool = True
) -> Claim:
    return Claim(num_blocks, num_sequences, since_s, holds, renewed_s=NOW)


CLAIMS = st.dictionaries(
    st.integers(0, 20),
    st.builds(
        make_claim,
        st.integers(0, 100),
        st.floats(0, NOW),
        num_sequences=st.integers(1, 4),
        holds=st.booleans(),
    ),
)
ROOMS = st.builds(Room, st.integers(0, 100), st.integers(0, 8))


def fits(claim: Claim, room: Room) -> bool:
    return claim.num_blocks <= room.num_blocks and claim.num_sequences <= room.num_sequences


def test_all_room_is_offered_to_everyone_while_nobody_claims_any() -> None:
    assert offer(Room(10, 4), {}, NOW) == ({}, Room(10, 4))


def test_freed_slot_goes_to_the_claim_that_has_waited_longest() -> None:
    claims = {1: make_claim(2, 50.0), 2: make_claim(2, 40.0)}
    offers = offer(Room(10, 1), claims, NOW)
    assert offers.claimed == {2: Room(10, 1), 1: Room(8, 0)}
    assert offers.rest.num_sequences == 0


def test_claim_that_holds_keeps_room_free_until_it_fits() -> None:
    claims = {1: make_claim(30, 40.0), 2: make_claim(1, 50.0)}
    assert offer(Room(29, 4), claims, NOW) == ({1: Room(29, 4), 2: Room(0, 0)}, Room(0, 0))
    assert offer(Room(31, 4), claims, NOW) == ({1: Room(31, 4), 2: Room(1, 3)}, Room(0, 2))


def test_small_requests_fill_the_room_before_a_claim_that_does_not_hold() -> None:
    claims = {1: make_claim(30, 40.0, holds=False), 2: make_claim(1, 50.0)}
    assert offer(Room(29, 4), claims, NOW).claimed[2] == Room(29, 4)


def test_claim_of_a_silent_router_keeps_no_room() -> None:
    claims = {1: make_claim(30, 40.0)}
    later = NOW + CLAIM_LIFETIME_S
    assert offer(Room(29, 4), claims, later) == ({}, Room(29, 4))


@given(ROOMS, CLAIMS)
def test_claims_that_fit_where_they_stand_never_need_more_than_there_is(
    free: Room, claims: dict[int, Claim]
) -> None:
    offers = offer(free, claims, NOW)
    served = [
        claims[session] for session, room in offers.claimed.items() if fits(claims[session], room)
    ]
    assert sum(claim.num_blocks for claim in served) <= free.num_blocks
    assert sum(claim.num_sequences for claim in served) <= free.num_sequences
    assert all(min(room) >= 0 for room in (*offers.claimed.values(), offers.rest))


@given(ROOMS, CLAIMS)
def test_the_oldest_claim_is_offered_everything(free: Room, claims: dict[int, Claim]) -> None:
    if claims:
        oldest = min(claims, key=lambda session: claims[session].since_s)
        assert offer(free, claims, NOW).claimed[oldest] == free
