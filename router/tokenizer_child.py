"""A child process that tokenizes: what can take long, or for ever, is done where it can be ended.

`tokenizers` holds the GIL for its whole run, and a chat template is a program, so neither may run
in the router's process. Requests come on standard input, answers go to standard output, in frames
of a kind, a length and so many bytes. The child ends when its input does.
"""

import json
import os
import resource
import signal
import struct
import sys
from array import array
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import IO, NamedTuple

from paceline.errors import FieldViolation, InvalidRequestError
from paceline.router.chat_template import ChatMessage
from paceline.router.tokenize import PromptTokenizer

HEADER = struct.Struct("<BI")
MAX_CHILD_BYTES = 4 << 30
"""Of address space that it may take for its work. A text of 1 MiB takes a tenth of it, and a
template may ask for any amount."""


class FrameKind(IntEnum):
    """What a frame holds."""

    TEXT = 0
    """Request: plain text, UTF-8."""
    CHAT = 1
    """Request: JSON, [[role, content], …]."""
    READY = 2
    """The first answer: the digest of the tokenizer that has been read."""
    TOKENS = 3
    """Answer: token ids, int32 each."""
    REFUSED = 4
    """Answer: JSON, [field, description] of what is wrong with the prompt."""


class Frame(NamedTuple):
    """A request or an answer."""

    kind: FrameKind
    payload: bytes = b""

    def encode(self) -> bytes:
        return HEADER.pack(self.kind, len(self.payload)) + self.payload


def chat_frame(messages: Sequence[ChatMessage]) -> Frame:
    return Frame(FrameKind.CHAT, json.dumps(messages, ensure_ascii=False).encode())


class Limits(NamedTuple):
    """What a call may take."""

    max_text_bytes: int
    timeout_s: float


def main(folder: str, max_text_bytes: str, timeout_s: str) -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the router decides
    most = _address_space() + MAX_CHILD_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    # What a library prints must not come between the frames.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tokenizer = PromptTokenizer.from_folder(Path(folder))
    limits = Limits(int(max_text_bytes), float(timeout_s))
    _write(answers, Frame(FrameKind.READY, tokenizer.digest()))
    while (request := _read(sys.stdin.buffer)) is not None:
        # Ends this process, whatever it does and even if its router is gone.
        signal.setitimer(signal.ITIMER_REAL, limits.timeout_s)
        answer = _answer(tokenizer, request, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(answers, answer)


def _address_space() -> int:
    num_pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    return num_pages * os.sysconf("SC_PAGE_SIZE")


def _answer(tokenizer: PromptTokenizer, request: Frame, limits: Limits) -> Frame:
    try:
        if request.kind is FrameKind.TEXT:
            token_ids = tokenizer.encode_text(request.payload.decode())
        else:
            messages = [ChatMessage(role, content) for role, content in json.loads(request.payload)]
            token_ids = tokenizer.encode_chat(messages, limits.max_text_bytes)
    except InvalidRequestError as error:
        return Frame(FrameKind.REFUSED, json.dumps(error.violations[0]).encode())
    except MemoryError:
        why = f"takes more than {MAX_CHILD_BYTES} bytes of memory to tokenize"
        return Frame(FrameKind.REFUSED, json.dumps(FieldViolation("prompt", why)).encode())
    return Frame(FrameKind.TOKENS, array("i", token_ids).tobytes())


def _read(stream: IO[bytes]) -> Frame | None:
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    kind, length = HEADER.unpack(header)
    return Frame(FrameKind(kind), stream.read(length))


def _write(stream: IO[bytes], frame: Frame) -> None:
    stream.write(frame.encode())
    stream.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
