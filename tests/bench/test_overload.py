"""What counts as goodput under overload."""

from paceline.bench.overload import Ended, Segment
from paceline.bench.simulated_workers import ComputedTokens


def test_only_whole_answers_in_time_and_within_the_window_count_as_goodput() -> None:
    segment = Segment(load=2.0, from_s=10.0, until_s=20.0)
    segment.ended = [
        Ended("OK", 1.0, 15.0),
        Ended("OK", 1.0, 9.9),  # before the load has lasted for a deadline
        Ended("OK", 1.0, 20.1),
        Ended("OK", 4.5, 15.0),  # too late
        Ended("RESOURCE_EXHAUSTED", 0.01, 15.0),
        Ended("DEADLINE_EXCEEDED", 4.0, 15.0),
    ]
    summary = segment.summary(4.0, ComputedTokens(1000, 250))
    assert summary["goodput_per_s"] == 0.1
    assert summary["statuses"] == {"DEADLINE_EXCEEDED": 1, "OK": 4, "RESOURCE_EXHAUSTED": 1}
    assert summary["refused_after_s"] == {"p50": 0.01, "p99": 0.01}
    assert summary["wasted_share"] == 0.25
