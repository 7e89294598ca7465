"""The engine thread: drain the mailbox, plan, launch, apply, for ever.

With `overlap`, step n + 1 is planned and launched while step n runs, and its results are applied
one round later; without, each step is applied before the next is planned. Output is the same.

    step n       planned launched    |----------------- runs ----------------| result
    step n + 1                               calls are taken   planned launched |---- runs

It is planned as late as can be without keeping the device waiting: what arrives while a long step
runs is in the next one.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from paceline.engine.step_plan import ModelRunner, StepHandle
from paceline.worker.core import Core
from paceline.worker.mailbox import Mailbox
from paceline.worker.stall import Stall
from paceline.worker.step_times import StepTimes

logger = logging.getLogger(__name__)

POLL_S = 0.002
"""How long the device may wait for a step when the one before it ended early."""


class _Launched(NamedTuple):
    handle: StepHandle
    num_tokens: int
    time_s: float
    """When its launch began."""


class StepLoop:
    """Owns the engine thread. A failure in it ends the worker: `on_failure` is called with the
    cause.
    """

    def __init__(
        self,
        core: Core,
        runner: ModelRunner,
        mailbox: Mailbox,
        *,
        after_round: Callable[[], None],
        on_failure: Callable[[BaseException], None],
        idle_round_s: float,
        most_stall_s: float,
        overlap: bool = False,
    ) -> None:
        """idle_round_s: how often deadlines are looked at without work. most_stall_s: how long a
        step may take of whose size nothing is known.
        """
        self._core = core
        self._runner = runner
        self._mailbox = mailbox
        self._after_round = after_round
        self._on_failure = on_failure
        self._idle_round_s = idle_round_s
        self._overlap = overlap
        self._stopping = False
        self._times = StepTimes()
        self._stall = Stall(most_stall_s)
        self._awaited_tokens = 0
        """Of the largest step that has been launched, or is being launched."""
        self._free_s = 0.0
        """When the device ended the last step whose result was taken."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.last_progress_s = time.monotonic()
        """When the last step ended, or the loop last found nothing to do."""
        self.num_steps = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread after the running step. Raises TimeoutError if it does not end in time."""
        self._stopping = True
        self._mailbox.wake()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(
                f"the engine thread still runs {timeout_s} s after it was told to stop"
            )

    def stalled_s(self) -> float:
        """Return the seconds since the last progress, once that is more than the engine's steps
        explain; else 0. Any thread."""
        silent_s = time.monotonic() - self.last_progress_s
        return silent_s if silent_s > self._stall.limit_s(self._awaited_tokens) else 0.0

    def _run(self) -> None:
        gc.freeze()
        try:
            self._loop()
        except BaseException as error:
            logger.exception("event=engine_failed steps=%d", self.num_steps)
            self._on_failure(error)

    def _loop(self) -> None:
        running: _Launched | None = None
        while not self._stopping:
            if running is not None:
                self._take_late_calls(running)
            now = time.monotonic()
            self._mailbox.run_calls(now)
            self._core.tick(now)
            plan = self._core.plan(now)
            launched = None
            self._awaited_tokens = max(
                plan.num_tokens if plan is not None else 0,
                running.num_tokens if running is not None else 0,
            )
            if plan is not None:
                begun_s = time.monotonic()
                launched = _Launched(self._runner.launch(plan), plan.num_tokens, begun_s)
            ready, running = (running, launched) if self._overlap else (launched, None)
            if ready is not None:
                self._apply(ready)
            self._after_round()
            if launched is None and ready is None:
                self.last_progress_s = time.monotonic()
                self._mailbox.wait(self._idle_round_s)
            elif ready is not None:
                self.last_progress_s = time.monotonic()

    def _take_late_calls(self, running: _Launched) -> None:
        """Run calls until the step behind `running` has to be planned."""
        started_s = max(self._free_s, running.time_s)
        until_s = started_s + self._times.time_to_spare(running.num_tokens)
        while not self._stopping and (left_s := until_s - time.monotonic()) > 0:
            if running.handle.done():
                return
            self._mailbox.wait(min(left_s, POLL_S))
            self._mailbox.run_calls(time.monotonic())

    def _apply(self, step: _Launched) -> None:
        result = step.handle.result()
        started_s = max(self._free_s, step.time_s)
        self._free_s = result.ended_s
        self._times.note(step.num_tokens, result.ended_s - started_s)
        now = time.monotonic()
        self._stall.note(step.num_tokens, now - max(self.last_progress_s, step.time_s))
        self._core.apply(result, now)
        self.num_steps += 1
