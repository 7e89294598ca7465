"""Child processes that tokenize, one call at a time each. A call that takes too long ends its
process; the next call starts another."""

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paceline.errors import FieldViolation, InvalidRequestError, PacelineError, QueueFullError
from paceline.request import TokenIds
from paceline.router.tokenizer_child import HEADER, Frame, FrameKind, Limits

START_TIMEOUT_S = 60.0
"""A tokenizer of 250,000 entries is read in 2 s; a machine may be busy."""
GRACE_S = 1.0
"""By how much the child's own alarm is later than its router's."""
EXIT_TIMEOUT_S = 1.0
"""For a process that has closed its output."""
RETRY_AFTER_S = 1.0


class _Exit(NamedTuple):
    """How a process ended without an answer."""

    status: int | None


class _Child:
    """One process, started by its first call. Used by one task at a time."""

    def __init__(self, folder: Path, digest: bytes, limits: Limits) -> None:
        self._folder = folder
        self._digest = digest
        self._limits = limits
        # The child's own alarm is for the case that nobody is left to kill it.
        own_timeout_s = limits.timeout_s + GRACE_S
        self._arguments = (str(folder), str(limits.max_text_bytes), str(own_timeout_s))
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process, unless it runs, and wait until it can be called."""
        if self._process is not None and self._process.returncode is None:
            return
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "paceline.router.tokenizer_child",
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                answer = await self._read()
        except TimeoutError:
            answer = _Exit(None)
        if isinstance(answer, _Exit):
            await self.end()
            raise PacelineError(
                f"a tokenizer's process did not start within {START_TIMEOUT_S} s, its exit status "
                f"is {answer.status}; the router's log has its own words"
            )
        if answer.payload != self._digest:
            await self.end()
            raise PacelineError(
                f"the tokenizer or the chat template in {self._folder} has changed since this "
                "router read it, and prompts would get other tokens. Put the old files back, or "
                "start the deployment again"
            )

    async def call(self, request: Frame) -> Frame:
        """Have a prompt tokenized."""
        await self.start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                process.stdin.write(request.encode())
                answer = await self._read()
        except TimeoutError:
            await self.end()
            raise InvalidRequestError(
                FieldViolation(
                    "prompt",
                    f"took more than router.tokenizer_timeout_s, {self._limits.timeout_s:g} s, to "
                    "tokenize; send less text",
                )
            ) from None
        if isinstance(answer, _Exit):
            raise PacelineError(
                f"a tokenizer's process ended with status {answer.status} while it worked on the "
                "prompt; the router's log has its own words"
            )
        return answer

    async def end(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        # Reads to the end, so that the pipes are closed with the process.
        await process.communicate()

    async def _read(self) -> Frame | _Exit:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        try:
            kind, length = HEADER.unpack(await process.stdout.readexactly(HEADER.size))
            return Frame(FrameKind(kind), await process.stdout.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            # It has ended, or is about to. A kill now could take its status from asyncio.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXIT_TIMEOUT_S):
                    await process.wait()
            await self.end()
            return _Exit(process.returncode)


class TokenizerPool:
    """Some children and the calls that wait for one."""

    def __init__(
        self,
        folder: Path,
        digest: bytes,
        limits: Limits,
        *,
        num_processes: int,
        max_waiting: int,
    ) -> None:
        """`digest`: of the tokenizer that the router itself has read from the folder."""
        self._children = [_Child(folder, digest, limits) for _ in range(num_processes)]
        self._idle: asyncio.Queue[_Child] = asyncio.Queue()
        for child in self._children:
            self._idle.put_nowait(child)
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._running: set[asyncio.Task[Frame]] = set()

    async def start(self) -> None:
        """Start all processes now, so that no call has to wait for one."""
        children = [await self._idle.get() for _ in self._children]
        try:
            await asyncio.gather(*(child.start() for child in children))
        finally:
            for child in children:
                self._idle.put_nowait(child)

    async def encode(self, request: Frame) -> TokenIds:
        """Tokenize a prompt; raises InvalidRequestError if that cannot be done."""
        if self._num_waiting >= self._max_waiting:
            raise QueueFullError(
                f"{self._num_waiting} prompts wait to be tokenized, more than that may not; raise "
                "router.tokenizer_processes, or send token_ids",
                retry_after_s=RETRY_AFTER_S,
            )
        self._num_waiting += 1
        try:
            child = await self._idle.get()
        finally:
            self._num_waiting -= 1
        # A client that goes away does not end the call: the child could not be called again.
        call = asyncio.create_task(self._call(child, request))
        self._running.add(call)
        call.add_done_callback(self._ended)
        answer = await asyncio.shield(call)
        if answer.kind is FrameKind.REFUSED:
            raise InvalidRequestError(FieldViolation(*json.loads(answer.payload)))
        return np.frombuffer(answer.payload, dtype=np.int32)

    async def close(self) -> None:
        """Kill the children; calls that run fail."""
        for call in self._running:
            call.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await asyncio.gather(*(child.end() for child in self._children))

    async def _call(self, child: _Child, request: Frame) -> Frame:
        try:
            return await child.call(request)
        finally:
            self._idle.put_nowait(child)

    def _ended(self, call: "asyncio.Task[Frame]") -> None:
        self._running.discard(call)
        if not call.cancelled():
            call.exception()  # whoever waited has it; if nobody did, it is no news
