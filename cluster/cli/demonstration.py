"""`paceline demo`: the whole path in a minute, with its times."""

import sys
import threading
import time
from collections.abc import Callable

import grpc
from rich.table import Table
from rich.text import Text

from paceline.cluster.cli import deploy, operate
from paceline.cluster.cli.clients import control, inference, translated
from paceline.cluster.cli.output import out
from paceline.cluster.cli.talk import Answer, Sampling, message, stream
from paceline.cluster.settings_file import DEFAULT_FILE, load_settings
from paceline.errors import PacelineError
from paceline.v1 import control_pb2, inference_pb2
from paceline.v1.inference_pb2_grpc import InferenceServiceStub

QUESTION = "What is gravity? Answer in two sentences."
TOPICS = ("the sea", "a robot", "winter", "a lighthouse", "two friends", "an old clock")
MAX_TOKENS = 160
READY_TIMEOUT_S = 120.0
REQUEST_TIMEOUT_S = 300.0
POLL_S = 0.1
SHOW_EVERY_S = 3.0
"""Seconds between two lines about what goes on."""


class Load:
    """Several requests on threads of their own, while something else happens."""

    def __init__(self, stub: InferenceServiceStub, num_requests: int) -> None:
        self.answers = [Answer() for _ in range(num_requests)]
        self.errors: list[str] = []
        self.longest_pauses_s = [0.0] * num_requests
        """Of each request: the longest time between two pieces of its text."""
        self._threads = [
            threading.Thread(target=self._ask, args=(stub, number), daemon=True)
            for number in range(num_requests)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_streaming(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    def progress(self) -> str:
        """Say how far the requests are."""
        failed = f", {len(self.errors)} have failed" if self.errors else ""
        return f"{self.num_streaming} requests stream, {self.num_tokens:,} tokens so far{failed}"

    def outcome(self) -> str:
        """Say what became of the requests, once they have ended."""
        num_resumed = sum(answer.usage.resumed for answer in self.answers)
        num_good = len(self.answers) - len(self.errors)
        return (
            f"{num_good} of {len(self.answers)} requests ended without an error: "
            f"{self.num_tokens:,} tokens, {num_resumed} resumed, longest pause in a stream "
            f"{max(self.longest_pauses_s):.2f} s"
        )

    def join(self) -> None:
        wait_until(lambda: not self.num_streaming, self.progress, REQUEST_TIMEOUT_S)
        if self.errors:
            raise PacelineError("; ".join(self.errors))

    def _ask(self, stub: InferenceServiceStub, number: int) -> None:
        topic = TOPICS[number % len(TOPICS)]
        request = _question(f"Tell a short story about {topic}.", MAX_TOKENS)
        last_s: float | None = None
        try:
            for _ in stream(stub, request, self.answers[number]):
                now = time.monotonic()
                pause_s = 0.0 if last_s is None else now - last_s
                self.longest_pauses_s[number] = max(self.longest_pauses_s[number], pause_s)
                last_s = now
        except (PacelineError, grpc.RpcError) as error:
            self.errors.append(f"request {number}: {error}")


def wait_until(
    condition: Callable[[], bool],
    progress: Callable[[], str],
    timeout_s: float,
    *,
    show_every_s: float = SHOW_EVERY_S,
) -> None:
    """Poll until the condition holds, and print the progress now and then."""
    started = shown = time.monotonic()
    while not condition():
        now = time.monotonic()
        if now - started > timeout_s:
            raise PacelineError(f"the demonstration waited for {timeout_s:g} s: {progress()}")
        if now - shown >= show_every_s:
            shown = now
            out.print(Text(f"  {now - started:.0f} s: {progress()}", "dim"))
        time.sleep(POLL_S)


def demo(overrides: list[str], num_requests: int) -> None:
    started = time.monotonic()
    _title("1. Start: Ray, a router, a prefill worker and a decode worker")
    # A name and ports of its own, so that it runs beside a deployment of yours.
    loaded = load_settings(DEFAULT_FILE, ["deployment=demo", "router.grpc_port=0", *overrides])
    with deploy.running(loaded, DEFAULT_FILE) as deployment:
        _perform(deployment.record.deployment, num_requests)
        _title("5. End")
        ending = time.monotonic()
    out.print(f"everything has ended after {time.monotonic() - ending:.1f} s; nothing is left")
    out.print(
        f"READY after {deployment.seconds:.1f} s; the whole demonstration took "
        f"{time.monotonic() - started:.1f} s"
    )


def _perform(name: str, num_requests: int) -> None:
    with inference(name) as stub:
        _title("2. Stream an answer over gRPC")
        out.print(Text(f"> {QUESTION}", "bold"))
        answer = Answer()
        for piece in stream(stub, _question(QUESTION, MAX_TOKENS), answer):
            sys.stdout.write(piece)
            sys.stdout.flush()
        out.print(Text(f"\n{answer.summary()}", "dim"))

        _title(f"3. Scale decode to 2 while {num_requests} requests run")
        load = Load(stub, num_requests)
        _scale_decode(name, 2, load)
        # Those that follow are spread over both.
        second = Load(stub, num_requests)
        load.join()
        with control(name) as api:
            _title("4. Status, and where each request's time went")
            operate.print_status(api.status(), num_events=4)
        second.join()
        out.print(_phases([*load.answers, *second.answers]))
        out.print(f"sent before decode was scaled: {load.outcome()}")
        out.print(f"sent afterwards: {second.outcome()}")


def _scale_decode(name: str, size: int, load: Load) -> None:
    started = time.monotonic()
    num_ready = 0
    with control(name) as api:
        with translated("the controller"):
            api.stub.Scale(control_pb2.ScaleRequest(pools={"decode": size}), timeout=10.0)

        def is_ready() -> bool:
            nonlocal num_ready
            num_ready = next(pool.ready for pool in api.status().pools if pool.name == "decode")
            return num_ready == size

        def progress() -> str:
            return f"{num_ready} of {size} decode workers are ready; {load.progress()}"

        wait_until(is_ready, progress, READY_TIMEOUT_S)
    out.print(
        f"decode has {size} workers after {time.monotonic() - started:.1f} s; {load.progress()}"
    )


def _question(text: str, max_tokens: int) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(sampling=Sampling(max_tokens, 0.0).to_proto())
    request.chat.messages.append(message("user", text))
    return request


def _phases(answers: list[Answer]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in (
        "request",
        "prompt",
        "output",
        "queue",
        "worker wait",
        "prefill",
        "router wait",
        "KV transfer",
        "decode",
        "total",
    ):
        table.add_column(name, justify="right")
    for number, answer in enumerate(answers):
        times = answer.phase_times
        table.add_row(
            str(number),
            f"{answer.usage.prompt_tokens}",
            f"{answer.usage.completion_tokens}",
            f"{times.queue_s * 1e3:.1f} ms",
            f"{times.wait_s * 1e3:.1f} ms",
            f"{times.prefill_s * 1e3:.0f} ms",
            f"{times.router_s * 1e3:.1f} ms",
            f"{times.kv_transfer_s * 1e3:.1f} ms",
            f"{times.decode_s:.2f} s",
            f"{answer.total_s:.2f} s",
        )
    return table


def _title(text: str) -> None:
    out.print(Text(f"\n{text}", "bold cyan"))
