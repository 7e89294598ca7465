from paceline.silence import CALM_S, NUM_LOOKS, Company, Patience, Silence


def look_until_too_long(silence: Silence, now: float, every_s: float) -> float:
    """Return when it was too long."""
    while not silence.is_too_long(now):
        now += every_s
    return now


def test_a_silent_peer_is_given_up_at_the_limit() -> None:
    silence = Silence(8.0, now=0.0)
    assert look_until_too_long(silence, 1.0, silence.interval_s) == 8.0


def test_a_peer_that_says_something_now_and_then_is_not() -> None:
    silence = Silence(8.0, now=0.0)
    for now in range(1, 100):
        if now % 7 == 0:
            silence.heard()
        assert not silence.is_too_long(now)


def test_the_time_in_which_this_process_was_frozen_does_not_count() -> None:
    silence = Silence(8.0, now=0.0)
    assert not silence.is_too_long(1.0)
    assert not silence.is_too_long(1000.0)
    silence.heard()  # read as soon as the process goes on
    assert not silence.is_too_long(1001.0)


def test_a_peer_that_is_silent_after_a_freeze_is_given_up_all_the_same() -> None:
    silence = Silence(8.0, now=0.0)
    assert not silence.is_too_long(1000.0)
    assert look_until_too_long(silence, 1001.0, silence.interval_s) <= 1000.0 + 8.0


def test_a_process_that_always_looks_late_still_gives_up() -> None:
    silence = Silence(8.0, now=0.0)
    assert look_until_too_long(silence, 5.0, 5.0) == 5.0 * NUM_LOOKS / 2


def test_a_silence_is_borne_longer_while_everybody_is_silent() -> None:
    company = Company()
    company.num_peers = 2
    silence = Silence(8.0, now=0.0, company=company)
    assert look_until_too_long(silence, 1.0, silence.interval_s) == 24.0


def test_a_silence_is_not_borne_longer_while_another_peer_speaks() -> None:
    company = Company()
    company.num_peers = 2
    silence, other = Silence(8.0, 0.0, company), Silence(8.0, 0.0, company)
    for now in range(1, 8):
        other.heard()
        assert not other.is_too_long(now)
        assert not silence.is_too_long(now)
    assert silence.is_too_long(8.0)


def test_a_peer_alone_is_given_up_at_the_limit() -> None:
    company = Company()
    company.num_peers = 1
    silence = Silence(8.0, now=0.0, company=company)
    assert look_until_too_long(silence, 1.0, silence.interval_s) == 8.0


def test_patience_grows_with_false_alarms_to_a_bound_and_ends_with_calm() -> None:
    patience = Patience(2.0)
    patience.answered(0.0)  # the first connection
    assert patience.limit_s(0.0) == 2.0
    limits = []
    for now in range(1, 8):
        patience.alarm(now)
        assert patience.limit_s(now) == (limits[-1] if limits else 2.0)  # it may be dead
        patience.answered(now + 0.5)
        limits.append(patience.limit_s(now + 0.5))
    assert limits[:3] == [3.0, 4.5, 6.75]
    assert limits[3:] == [8.0] * 4
    assert patience.limit_s(8.0 + CALM_S) == 2.0
