"""Launch kernels, or only compile them, many side by side.

Triton compiles a kernel within its first launch, one after another: the thirty of a cold start
take that many seconds of a CPU.
"""

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton

_only_compiles = contextvars.ContextVar("only_compiles", default=False)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., object]:
    """Return what launches a kernel over `grid`, to be called with the kernel's arguments."""
    if _only_compiles.get():
        return lambda *args, **kwargs: kernel.warmup(*args, grid=grid, **kwargs)
    launcher: Callable[..., object] = kernel[grid]
    return launcher


def compile_ahead(run: Callable[[], None]) -> None:
    """Compile the kernels that `run` launches, and launch none: their outputs stay as they are.

    Takes a thread for each CPU. Raises the first error of a compilation, when all have ended.
    """

    def only_compile() -> None:
        _only_compiles.set(True)
        with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):
            run()

    # In a context of its own, so that no error leaves this one compiling only.
    contextvars.copy_context().run(only_compile)
