"""`paceline demo`: the whole path in a minute, with its times."""

import signal
import sys
import threading
import time

import grpc
from rich.table import Table
from rich.text import Text

from paceline.cluster import lifecycle
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


class Load:
    """Several requests on threads of their own, while something else happens."""

    def __init__(self, stub: InferenceServiceStub, num_requests: int) -> None:
        self.answers = [Answer() for _ in range(num_requests)]
        self.errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._ask, args=(stub, number), daemon=True)
            for number in range(num_requests)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_streaming(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(REQUEST_TIMEOUT_S)
        if self.errors or self.num_streaming:
            raise PacelineError("; ".join(self.errors) or "a request of the demo did not end")

    def _ask(self, stub: InferenceServiceStub, number: int) -> None:
        topic = TOPICS[number % len(TOPICS)]
        request = _question(f"Tell a short story about {topic}.", MAX_TOKENS)
        try:
            for _ in stream(stub, request, self.answers[number]):
                pass
        except (PacelineError, grpc.RpcError) as error:
            self.errors.append(f"request {number}: {error}")


def demo(overrides: list[str], num_requests: int) -> None:
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    _title("1. Start: Ray, a router, a prefill worker and a decode worker")
    # A name and ports of its own, so that it runs beside a deployment of yours.
    loaded = load_settings(DEFAULT_FILE, ["deployment=demo", "router.grpc_port=0", *overrides])
    deployment = deploy.start(loaded, DEFAULT_FILE)
    name = deployment.record.deployment
    try:
        _perform(name, num_requests)
    finally:
        _title("5. End")
        ending = time.monotonic()
        lifecycle.down(name)
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


def _scale_decode(name: str, size: int, load: Load) -> None:
    started = time.monotonic()
    with control(name) as api:
        with translated("the controller"):
            api.stub.Scale(control_pb2.ScaleRequest(pools={"decode": size}), timeout=10.0)
        while True:
            pools = {pool.name: pool.ready for pool in api.status().pools}
            if pools["decode"] == size:
                break
            if time.monotonic() - started > READY_TIMEOUT_S:
                raise PacelineError(f"decode has no {size} workers after {READY_TIMEOUT_S:g} s")
            time.sleep(0.1)
    out.print(
        f"decode has {size} workers after {time.monotonic() - started:.1f} s; "
        f"{load.num_streaming} requests still stream, none was disturbed"
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
            f"{times.kv_transfer_s * 1e3:.1f} ms",
            f"{times.decode_s:.2f} s",
            f"{answer.total_s:.2f} s",
        )
    return table


def _title(text: str) -> None:
    out.print(Text(f"\n{text}", "bold cyan"))
