"""The engine thread, with a core and a runner that only count."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paceline.engine.step_plan import EMPTY, StepPlan, StepResult
from paceline.worker import stall
from paceline.worker.mailbox import Mailbox
from paceline.worker.step_loop import StepLoop

TIMEOUT_S = 20.0


class CountingCore:
    """Plans `num_steps` steps; writes down what it is told, in order."""

    def __init__(self, num_steps: int) -> None:
        self.num_left = num_steps
        self.calls: list[str] = []
        self.applied = threading.Semaphore(0)

    def tick(self, now: float) -> None: ...

    def plan(self, now: float) -> StepPlan | None:
        if not self.num_left:
            return None
        self.num_left -= 1
        number = sum(call.startswith("plan") for call in self.calls)
        self.calls.append(f"plan {number}")
        ones = np.zeros(0, np.int32)
        return StepPlan(number, ones, ones, ones, ones.astype(bool), ones, ones, ones, ones)

    def apply(self, result: StepResult, now: float) -> None:
        self.calls.append(f"apply {result.step_id}")
        self.applied.release()


class Finished:
    def __init__(self, step_id: int) -> None:
        self.step_id = step_id

    def done(self) -> bool:
        return True

    def result(self) -> StepResult:
        return StepResult(self.step_id, EMPTY)


class InstantRunner:
    max_num_slots = 1

    def launch(self, plan: StepPlan) -> Finished:
        return Finished(plan.step_id)

    def close(self) -> None: ...


def start_loop(
    core: Any,
    mailbox: Mailbox,
    *,
    overlap: bool = False,
    on_failure: Callable[[BaseException], None] = lambda error: None,
    runner: Any = None,
) -> StepLoop:
    loop = StepLoop(
        core,
        runner or InstantRunner(),
        mailbox,
        after_round=lambda: None,
        on_failure=on_failure,
        idle_round_s=0.01,
        most_stall_s=60.0,
        overlap=overlap,
    )
    loop.start()
    return loop


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_without_overlap_a_step_is_applied_before_the_next_is_planned() -> None:
    core = CountingCore(3)
    loop = start_loop(core, Mailbox())
    for _ in range(3):
        assert core.applied.acquire(timeout=TIMEOUT_S)
    loop.stop(TIMEOUT_S)
    assert core.calls == ["plan 0", "apply 0", "plan 1", "apply 1", "plan 2", "apply 2"]


def test_with_overlap_a_step_is_planned_before_the_last_is_applied_and_all_are_applied() -> None:
    core = CountingCore(3)
    loop = start_loop(core, Mailbox(), overlap=True)
    for _ in range(3):
        assert core.applied.acquire(timeout=TIMEOUT_S)
    loop.stop(TIMEOUT_S)
    assert core.calls == ["plan 0", "plan 1", "apply 0", "plan 2", "apply 1", "apply 2"]


def test_posted_calls_run_in_order_on_the_engine_thread() -> None:
    mailbox = Mailbox()
    loop = start_loop(CountingCore(0), mailbox)
    seen: list[tuple[int, str]] = []
    done = threading.Event()
    for number in range(100):
        mailbox.post(
            lambda now, number=number: seen.append((number, threading.current_thread().name))
        )
    mailbox.post(lambda now: done.set())
    assert done.wait(TIMEOUT_S)
    loop.stop(TIMEOUT_S)
    assert seen == [(number, "engine") for number in range(100)]


def test_a_failing_call_ends_the_loop_and_its_cause_is_told() -> None:
    failed: list[BaseException] = []
    told = threading.Event()

    def on_failure(error: BaseException) -> None:
        failed.append(error)
        told.set()

    mailbox = Mailbox()
    loop = start_loop(CountingCore(0), mailbox, on_failure=on_failure)

    def fail(now: float) -> None:
        raise ValueError("broken")

    mailbox.post(fail)
    assert told.wait(TIMEOUT_S)
    assert str(failed[0]) == "broken"
    loop.stop(TIMEOUT_S)


def test_an_idle_loop_counts_as_making_progress() -> None:
    loop = start_loop(CountingCore(0), Mailbox())
    before = loop.last_progress_s
    deadline = time.monotonic() + TIMEOUT_S
    while loop.last_progress_s == before and time.monotonic() < deadline:
        time.sleep(0.005)
    loop.stop(TIMEOUT_S)
    assert loop.last_progress_s > before


class TimedRunner:
    """Steps of 0.2 s each, one after the other; `short` ones of 0.01 s."""

    max_num_slots = 1

    def __init__(self, *, blocking: int = -1, short: int = -1) -> None:
        """blocking: the step whose launch returns when it has ended."""
        self._blocking = blocking
        self._short = short
        self._free_s = 0.0
        self.idle_s: list[float] = []
        """Ahead of each step."""

    def launch(self, plan: StepPlan) -> "TimedStep":
        start_s = max(self._free_s, time.monotonic())
        self.idle_s.append(start_s - self._free_s)
        self._free_s = start_s + (0.01 if plan.step_id == self._short else 0.2)
        step = TimedStep(plan.step_id, self._free_s)
        if plan.step_id == self._blocking:
            step.result()
        return step

    def close(self) -> None: ...


class TimedStep(Finished):
    def __init__(self, step_id: int, end_s: float) -> None:
        super().__init__(step_id)
        self._end_s = end_s

    def done(self) -> bool:
        return time.monotonic() >= self._end_s

    def result(self) -> StepResult:
        time.sleep(max(0.0, self._end_s - time.monotonic()))
        return StepResult(self.step_id, EMPTY, ended_s=self._end_s)


def run_steps(core: CountingCore, mailbox: Mailbox, runner: TimedRunner) -> None:
    num_steps = core.num_left
    loop = start_loop(core, mailbox, overlap=True, runner=runner)
    for _ in range(num_steps):
        assert core.applied.acquire(timeout=TIMEOUT_S)
    loop.stop(TIMEOUT_S)


def test_what_arrives_while_a_step_runs_is_there_when_the_next_is_planned() -> None:
    mailbox = Mailbox()

    class Core(CountingCore):
        def apply(self, result: StepResult, now: float) -> None:
            super().apply(result, now)
            if result.step_id == 3:  # step 4 begins
                call = lambda now: self.calls.append("arrived")  # noqa: E731
                threading.Timer(0.05, mailbox.post, [call]).start()

    core, runner = Core(8), TimedRunner()
    run_steps(core, mailbox, runner)
    calls = core.calls
    assert calls.index("apply 3") < calls.index("arrived") < calls.index("plan 5")
    assert [call for call in calls if call.startswith("apply")] == [f"apply {n}" for n in range(8)]
    assert max(runner.idle_s[1:]) < 0.1


def test_a_step_that_ends_before_it_was_expected_to_does_not_keep_the_device_waiting() -> None:
    core, runner = CountingCore(8), TimedRunner(short=5)
    run_steps(core, Mailbox(), runner)
    assert max(runner.idle_s[1:]) < 0.1


def test_a_device_that_is_ahead_is_not_kept_waiting() -> None:
    """The results are taken late then, and nobody knows when the running step began."""
    core, runner = CountingCore(10), TimedRunner(blocking=5)
    run_steps(core, Mailbox(), runner)
    assert max(runner.idle_s[1:]) < 0.1


class StuckRunner(InstantRunner):
    """Its second step does not end before `can_end` is set."""

    def __init__(self) -> None:
        self.can_end = threading.Event()
        self.is_stuck = threading.Event()

    def launch(self, plan: StepPlan) -> Finished:
        if plan.step_id:
            self.is_stuck.set()
            assert self.can_end.wait(TIMEOUT_S)
        return Finished(plan.step_id)


def test_a_step_that_takes_far_longer_than_others_is_a_stall_until_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stall, "LEAST_S", 0.05)
    core, runner = CountingCore(2), StuckRunner()
    loop = start_loop(core, Mailbox(), runner=runner)
    try:
        assert runner.is_stuck.wait(TIMEOUT_S)
        wait_until(lambda: loop.stalled_s() > 0.05)
        runner.can_end.set()
        wait_until(lambda: loop.stalled_s() == 0.0)
        assert loop.num_steps == 2
    finally:
        runner.can_end.set()
        loop.stop(TIMEOUT_S)


def test_an_idle_engine_is_not_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "LEAST_S", 0.05)
    core = CountingCore(1)
    loop = start_loop(core, Mailbox())
    try:
        assert core.applied.acquire(timeout=TIMEOUT_S)
        looks = [loop.stalled_s() for _ in range(50) if time.sleep(0.005) is None]
        assert not any(looks)
    finally:
        loop.stop(TIMEOUT_S)
