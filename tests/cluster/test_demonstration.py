"""`paceline demo`, as a new user runs it."""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from paceline.cluster.cli import demonstration
from paceline.cluster.cli.demonstration import Load, wait_until
from paceline.errors import PacelineError, UnavailableError
from paceline.v1 import inference_pb2 as pb


class Stub:
    """Answers each request with three tokens, or breaks after the second."""

    def __init__(self, *, breaks: bool = False) -> None:
        self._breaks = breaks
        self.may_end = threading.Event()

    def Generate(self, request: pb.GenerateRequest) -> "Call":
        return Call(self._responses())

    def _responses(self) -> Iterator[pb.GenerateResponse]:
        for index in range(3):
            if index == 2:
                assert self.may_end.wait(10)
                if self._breaks:
                    raise UnavailableError("the router went away")
            yield pb.GenerateResponse(tokens=[pb.Token(index=index, token_id=7)], text="a")
        yield pb.GenerateResponse(usage=pb.Usage(resumed=1))


class Call:
    """A stream of responses that can be cancelled, as gRPC's."""

    def __init__(self, responses: Iterator[pb.GenerateResponse]) -> None:
        self._responses = responses

    def __iter__(self) -> Iterator[pb.GenerateResponse]:
        return self._responses

    def cancel(self) -> None:
        self._responses = iter(())


def make_load(stub: Stub) -> Load:
    return Load(stub, 2)  # type: ignore[arg-type]


def test_a_load_says_how_far_it_is_and_what_became_of_it() -> None:
    stub = Stub()
    load = make_load(stub)
    wait_until(lambda: load.num_tokens == 4, load.progress, 10.0)
    assert load.progress() == "2 requests stream, 4 tokens so far"
    ending = threading.Timer(0.05, stub.may_end.set)
    ending.start()
    load.join()
    assert load.outcome().startswith(
        "2 of 2 requests ended without an error: 6 tokens, 2 resumed, longest pause in a stream 0."
    )
    assert min(load.longest_pauses_s) > 0.02


def test_requests_that_fail_are_counted_and_end_the_demonstration() -> None:
    stub = Stub(breaks=True)
    load = make_load(stub)
    stub.may_end.set()
    with pytest.raises(PacelineError, match="request 0: the router went away"):
        load.join()
    assert load.progress() == "0 requests stream, 4 tokens so far, 2 have failed"
    assert load.outcome().startswith("0 of 2 requests ended without an error")


def test_waiting_shows_progress_and_ends_at_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(demonstration, "out", Console(file=written))
    with pytest.raises(PacelineError, match=r"waited for 0\.3 s: 5 of 9"):
        wait_until(lambda: False, lambda: "5 of 9", 0.3, show_every_s=0.05)
    assert "  0 s: 5 of 9\n" in written.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demonstration_runs_to_its_end_and_leaves_nothing(tmp_path: Path) -> None:
    code = "from paceline.cluster.cli import main; main()"
    # Ray makes sockets in it, so it has to be short.
    runtime_folder = Path("/tmp") / f"pd-{os.getpid()}"
    result = subprocess.run(
        [sys.executable, "-c", code, "demo"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"PACELINE_RUNTIME_DIR": str(runtime_folder)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "gravity" in result.stdout.lower()
    assert "decode 2 of 2 ready" in result.stdout
    assert "nothing is left" in result.stdout
    assert result.stdout.count("6 of 6 requests ended without an error: ") == 2
    assert not list(runtime_folder.glob("*"))
