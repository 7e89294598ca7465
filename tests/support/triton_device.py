"""Where a test of a Triton kernel runs: on the GPU, or in Triton's interpreter on the CPU.

Import this before anything that imports triton. The interpreter is chosen when a kernel's decorator
runs, Triton's own library included, so the variable has to be there first.
"""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # transformers, in another test, imports a Triton that compiles: its library functions are
    # decorated already. Forget them, so that they are decorated again; the C++ part loads once.
    loaded = sys.modules.get("triton.language")
    if loaded is not None and type(loaded.sum).__name__ != "InterpretedFunction":
        for name in list(sys.modules):
            parts = name.split(".")
            if parts[0] == "triton" and parts[1:2] != ["_C"]:
                del sys.modules[name]

pytest.importorskip("triton", reason="Triton is not installed")


def device() -> str:
    """Return "cuda", or "cpu" where the interpreter runs the kernels."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an output full of NaN, so that an element that a kernel leaves out is seen."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device())
