"""Progress where nobody can see a bar."""

import io

from rich.console import Console
from router_deployment import until

from paceline.bench.progress import shown_progress
from paceline.bench.record import RequestRecord


async def test_lines_come_while_a_load_runs_though_no_request_ends() -> None:
    written = io.StringIO()
    async with shown_progress(3, Console(file=written), line_every_s=0.01) as on_end:
        line = "0 of 3 requests have ended after 0 s\n"
        await until(lambda: written.getvalue().count(line) > 1, "two lines")
        on_end(RequestRecord("good", 1, 1, 0.0, token_times_s=[1.0]))
        on_end(RequestRecord("bad", 1, 1, 0.0, error="UNAVAILABLE"))
        line = "2 of 3 requests have ended after 0 s, 1 of them failed\n"
        await until(lambda: line in written.getvalue(), "a line with the failure")


async def test_a_terminal_gets_a_bar_and_keeps_nothing_of_it() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=80)
    async with shown_progress(2, console) as on_end:
        on_end(RequestRecord("good", 1, 1, 0.0, token_times_s=[1.0]))
    assert "requests" in written.getvalue()
    assert "have ended" not in written.getvalue()
