"""`paceline generate` and `chat`."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TypeAlias

from rich.text import Text

from paceline.cluster.cli.clients import inference, translated
from paceline.cluster.cli.output import out, print_json, print_note
from paceline.cluster.cli.text import as_text, read_stdin
from paceline.cluster.signals import Ended, held, raise_ended
from paceline.errors import ConfigError
from paceline.v1 import inference_pb2
from paceline.v1.inference_pb2_grpc import InferenceServiceStub

SIGNAL_POLL_S = 0.2
Response: TypeAlias = inference_pb2.GenerateResponse | Exception | None
"""What the reading thread hands over; None is the end."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling parameters that the command line offers."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def to_proto(self) -> inference_pb2.SamplingParams:
        return inference_pb2.SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=self.stop,
        )


@dataclass(slots=True)
class Answer:
    """What came back for one request, filled while it streams."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)
    phase_times: inference_pb2.PhaseTimes = field(default_factory=inference_pb2.PhaseTimes)
    first_token_s: float = 0.0
    """From sending the request to the first token, as the client saw it."""
    total_s: float = 0.0

    def summary(self) -> str:
        """Say the counts and times in one line."""
        times = self.phase_times
        rate = (len(self.token_ids) - 1) / times.decode_s if times.decode_s > 0 else 0.0
        return (
            f"{self.usage.prompt_tokens} + {self.usage.completion_tokens} tokens, {rate:.1f} "
            f"tokens/s · queue {times.queue_s * 1e3:.1f} ms, worker wait "
            f"{times.wait_s * 1e3:.1f} ms, prefill {times.prefill_s * 1e3:.0f} ms, router wait "
            f"{times.router_s * 1e3:.1f} ms, KV transfer {times.kv_transfer_s * 1e3:.1f} ms, "
            f"decode {times.decode_s:.2f} s"
        )


def stream(
    stub: InferenceServiceStub, request: inference_pb2.GenerateRequest, answer: Answer
) -> Generator[str]:
    """Yield new text as it comes, and fill `answer`. Raises PacelineError in the router's words.

    The request is cancelled when the caller stops early, as by Ctrl-C.
    """
    started = time.monotonic()
    responses: SimpleQueue[Response] = SimpleQueue()
    with translated("the router"), contextlib.ExitStack() as cleanup:
        with held():
            call = stub.Generate(request)
            cleanup.callback(call.cancel)
            threading.Thread(target=_read, args=(call, responses), daemon=True).start()
        while (response := _next(responses)) is not None:
            if isinstance(response, Exception):
                raise response
            if response.tokens and not answer.token_ids:
                answer.first_token_s = time.monotonic() - started
            answer.token_ids.extend(token.token_id for token in response.tokens)
            answer.text += response.text
            if response.finish_reason:
                name = inference_pb2.FinishReason.Name(response.finish_reason)
                answer.finish_reason = name.removeprefix("FINISH_REASON_").lower()
            if response.HasField("usage"):
                answer.usage, answer.phase_times = response.usage, response.phase_times
            if response.text:
                yield response.text
    answer.total_s = time.monotonic() - started


def _read(
    call: Iterable[inference_pb2.GenerateResponse],
    responses: "SimpleQueue[Response]",
) -> None:
    """Read on a thread of its own: what a signal raises within gRPC can leave its locks held."""
    try:
        for response in call:
            responses.put(response)
        responses.put(None)
    except Exception as error:
        responses.put(error)


def _next(responses: "SimpleQueue[Response]") -> Response:
    """Wait for a response; look up now and then, for a signal that another thread was given."""
    while True:
        with contextlib.suppress(Empty):
            return responses.get(timeout=SIGNAL_POLL_S)


def message(role: str, content: str) -> inference_pb2.ChatMessage:
    return inference_pb2.ChatMessage(role=role, content=content)


def generate(
    prompt: str, sampling: Sampling, as_chat: bool, deployment: str | None, as_json: bool
) -> None:
    text = read_stdin() if prompt == "-" else prompt
    request = inference_pb2.GenerateRequest(sampling=sampling.to_proto())
    if as_chat:
        request.chat.messages.append(message("user", text))
    else:
        request.text = text
    answer = Answer()
    with inference(deployment) as stub:
        for piece in stream(stub, request, answer):
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    if as_json:
        print_json(_document(answer))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    print_note(answer.summary())


def chat(sampling: Sampling, system: str, deployment: str | None) -> None:
    first = [message("system", system)] if system else []
    messages = list(first)
    with inference(deployment) as stub:
        while (line := _read_line()) not in ("", "/exit"):
            if line == "/new":
                messages = list(first)
                continue
            messages.append(message("user", line))
            request = inference_pb2.GenerateRequest(sampling=sampling.to_proto())
            request.chat.messages.extend(messages)
            text = _answer(stub, request)
            if text:
                messages.append(message("assistant", text))
            else:  # stopped before its first word: templates want an answer after each question
                messages.pop()


def _answer(stub: InferenceServiceStub, request: inference_pb2.GenerateRequest) -> str:
    """Show an answer as it comes, and return it. Ctrl-C stops it: what was shown was said."""
    answer = Answer()
    try:
        with contextlib.closing(stream(stub, request, answer)) as pieces:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except Ended as ended:
        if ended.number != signal.SIGINT:
            raise
        raise_ended()  # by the next Ctrl-C
        print_note("\nstopped")
    else:
        sys.stdout.write("\n")
        print_note(answer.summary())
    return answer.text


def _read_line() -> str:
    """Return the next line of the conversation; empty at its end, by Ctrl-D or Ctrl-C."""
    import readline  # noqa: F401 (gives input() editing and history)

    try:
        return as_text(out.input(Text("> ", "bold")), "the line").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise ConfigError(f"the line is not UTF-8 text ({error})") from None
    except Ended as ended:
        if ended.number != signal.SIGINT:
            raise
        sys.stdout.write("\n")
        return ""


def _document(answer: Answer) -> dict[str, object]:
    from google.protobuf.json_format import MessageToDict

    def plain(part: inference_pb2.Usage | inference_pb2.PhaseTimes) -> dict[str, object]:
        document: dict[str, object] = MessageToDict(
            part, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return document

    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "usage": plain(answer.usage),
        "phase_times": plain(answer.phase_times),
        "first_token_s": round(answer.first_token_s, 4),
        "total_s": round(answer.total_s, 4),
    }
