"""Count what a call executes, so that a test can say that its cost does not grow."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def num_opcodes(call: Callable[[], object]) -> int:
    """Count the bytecode instructions that a call executes, in every Python function under it.

    Unlike a time, it is the same in each run and on each machine.
    """
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count
