"""`paceline chat` and `generate` against a router that is not real."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from paceline.cluster import signals
from paceline.cluster.cli import talk
from paceline.cluster.signals import END_SIGNALS
from paceline.v1 import inference_pb2, inference_pb2_grpc


class Screen(io.StringIO):
    """Standard output, which tells when there is something on it."""

    def __init__(self) -> None:
        super().__init__()
        self.shows_text = threading.Event()

    def write(self, text: str) -> int:
        self.shows_text.set()
        return super().write(text)


class Router(inference_pb2_grpc.InferenceServiceServicer):
    """Answers in two pieces; may interrupt the client in between, as Ctrl-C would."""

    def __init__(self) -> None:
        self.conversations: list[list[str]] = []
        self.interrupts_after: dict[int, int] = {}
        """Number of the request -> pieces that the client gets before its Ctrl-C."""
        self.was_cancelled = threading.Event()
        self.screen = Screen()

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        self.conversations.append([message.content for message in request.chat.messages])
        num_pieces = self.interrupts_after.get(len(self.conversations))
        for number, piece in enumerate(("some ", "words")):
            if number == num_pieces:
                assert number == 0 or self.screen.shows_text.wait(10)
                context.add_callback(self.was_cancelled.set)
                os.kill(os.getpid(), signal.SIGINT)
                self.was_cancelled.wait(10)
                return
            yield inference_pb2.GenerateResponse(text=piece)


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Iterator[Router]:
    before = {number: signal.getsignal(number) for number in END_SIGNALS}
    signals.raise_ended()
    router = Router()
    server = grpc.server(ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(router, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        monkeypatch.setattr(talk, "inference", lambda name: contextlib.nullcontext(stub))
        yield router
    server.stop(None)
    for number, handler in before.items():
        signal.signal(number, handler)


def chat(router: Router, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdout", router.screen)
    typed = iter([*lines, "/exit"])
    monkeypatch.setattr(talk.out, "input", lambda prompt: next(typed))
    talk.chat(talk.Sampling(8), "", None)


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on_with_what_was_said(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    router.interrupts_after = {1: 1}
    chat(router, monkeypatch, "first", "second")
    assert router.was_cancelled.wait(10)
    assert router.conversations == [["first"], ["first", "some ", "second"]]
    assert router.screen.getvalue() == "some some words\n"


def test_a_question_without_any_answer_is_forgotten(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    router.interrupts_after = {1: 0}
    chat(router, monkeypatch, "first", "second")
    assert router.was_cancelled.wait(10)
    assert router.conversations == [["first"], ["second"]]


@pytest.mark.parametrize("error", [EOFError(), signals.Ended(signal.SIGINT)])
def test_ctrl_d_and_ctrl_c_at_the_prompt_end_the_conversation(
    router: Router, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def end(prompt: str) -> str:
        raise error

    monkeypatch.setattr(talk.out, "input", end)
    talk.chat(talk.Sampling(8), "", None)
    assert router.conversations == []


def test_ctrl_c_cancels_a_single_request_and_ends_the_command(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", router.screen)
    router.interrupts_after = {1: 1}
    with pytest.raises(signals.Ended):
        talk.generate("a prompt", talk.Sampling(8), False, None, False)
    assert router.was_cancelled.wait(10)
