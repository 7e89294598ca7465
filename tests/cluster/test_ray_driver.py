"""What joining a Ray leaves in the process that joins it."""

import signal
from pathlib import Path

from paceline.cluster import lifecycle, ray_driver


def is_caught(number: int) -> bool:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (caught,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (number - 1) & 1)


def test_ray_handles_no_signal_of_a_command(deployment: lifecycle.Deployment) -> None:
    """Its C++ handler, of SIGTERM and of SIGTRAP, aborts the process 3 s after the signal."""
    with lifecycle.connected(deployment.record):
        assert not is_caught(signal.SIGTRAP)


def test_an_alarm_that_ray_sets_is_taken_back() -> None:
    with ray_driver._undisturbed():
        signal.alarm(60)
    assert signal.alarm(0) == 0
