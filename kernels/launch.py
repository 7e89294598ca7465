"""Launch kernels, or only compile them, many side by side.

Triton compiles a kernel within its first launch, one after another: the forty of a cold start take
that many seconds of a CPU.
"""

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

_compiled: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
    "compiled", default=None
)
"""Where kernels go that are compiled and not launched"""


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., object]:
    """Return what launches a kernel over `grid`, to be called with the kernel's arguments."""
    compiled = _compiled.get()
    if compiled is not None:
        return lambda *args, **kwargs: compiled.append(kernel.warmup(*args, grid=grid, **kwargs))
    launcher: Callable[..., object] = kernel[grid]
    return launcher


def compile_ahead(run: Callable[[], None]) -> None:
    """Compile and load the kernels that `run` launches, and launch none: their outputs stay as they
    are.

    Takes some threads more than there are CPUs. Raises the first error of a compilation, when all
    have ended.
    """

    def only_compile() -> None:
        compiled: list[Any] = []
        _compiled.set(compiled)
        with _threads() as threads:
            with triton.AsyncCompileMode(threads):
                run()
            list(threads.map(_load, {id(kernel): kernel for kernel in compiled}.values()))

    # In a context of its own, so that no error leaves this one compiling only.
    contextvars.copy_context().run(only_compile)


def _threads() -> ThreadPoolExecutor:
    """Start threads that have this one's GPU."""
    if not torch.cuda.is_available():
        return ThreadPoolExecutor()
    device = torch.cuda.current_device()
    return ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,))


def _load(kernel: Any) -> None:
    """Do what else a first launch would do: build its launcher, which takes a C compiler."""
    if kernel is not None:  # as the interpreter gives
        getattr(kernel.result() if hasattr(kernel, "result") else kernel, "run")  # noqa: B009
