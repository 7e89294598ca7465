"""The timed checklist of a start: a live view on a terminal, lines elsewhere."""

import time
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from paceline.cluster.process_state import ProcessState

if TYPE_CHECKING:
    from types import TracebackType

    from paceline.cluster.actors import ProcessSnapshot

_DONE = Text("✓", "green")
BAR_WIDTH = 24


class Checklist:
    """A `lifecycle.Watcher`; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._done: list[tuple[str, float]] = []
        self._running: tuple[str, float] | None = None
        self._snapshots: list[ProcessSnapshot] = []
        self._announced: set[str] = set()
        self._spinner = Spinner("line" if console.options.ascii_only else "dots")
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=12)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: "TracebackType | None",
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def began(self, step: str) -> None:
        self._running = (step, time.monotonic())

    def ended(self, step: str, seconds: float) -> None:
        self._running = None
        self._done.append((step, seconds))
        self._say(Text.assemble(_DONE, f" {step} {seconds:.1f} s"))

    def processes(self, snapshots: "list[ProcessSnapshot]") -> None:
        self._snapshots = snapshots
        for process in snapshots:
            is_ready = process.state is ProcessState.READY
            if is_ready and process.worker_id not in self._announced:
                self._announced.add(process.worker_id)
                took = f" {process.worker_id} {process.elapsed_s:.1f} s {_steps(process)}"
                self._say(Text.assemble("  ", _DONE, took))

    def _say(self, line: Text) -> None:
        if not self._console.is_terminal:
            self._console.print(line)

    def _render(self) -> RenderableType:
        steps = Table.grid(padding=(0, 1))
        for name, seconds in self._done:
            steps.add_row(_DONE, Text(name), Text(f"{seconds:.1f} s", "dim"))
        if self._running is not None:
            name, began = self._running
            took = Text(f"{time.monotonic() - began:.1f} s", "dim")
            steps.add_row(self._spinner, Text(name), took)
        processes = Table.grid(padding=(0, 1))
        for is_detail in (False, False, False, False, True):
            processes.add_column(no_wrap=not is_detail)
        for process in self._snapshots:
            is_ready = process.state is ProcessState.READY
            processes.add_row(
                "  ",
                _DONE if is_ready else self._spinner,
                Text(process.worker_id),
                Text(f"{process.elapsed_s:.1f} s", "dim"),
                _detail(process, is_ready),
            )
        return Group(steps, processes)


def _detail(process: "ProcessSnapshot", is_ready: bool) -> RenderableType:
    if is_ready or process.loading is None or process.loading.fraction >= 1:
        return Text(_steps(process), "dim")
    row = Table.grid(padding=(0, 1))
    row.add_row(
        Text(process.loading.step),
        ProgressBar(total=1.0, completed=process.loading.fraction, width=BAR_WIDTH),
        f"{process.loading.fraction:.0%}",
    )
    return row


def _steps(process: "ProcessSnapshot") -> str:
    # Names may have commas of their own: allocate the KV pool (64,000 blocks, 100.0 GiB).
    return " · ".join(f"{step.name} {step.seconds:.1f} s" for step in process.steps)
