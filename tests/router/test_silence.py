from paceline.router.silence import NUM_LOOKS, Silence


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
