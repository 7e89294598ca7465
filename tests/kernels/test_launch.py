"""Kernels launched within `compile_ahead` are compiled and write nothing."""

import pytest
import torch
from triton_device import device, poisoned

from paceline.kernels.launch import compile_ahead
from paceline.kernels.rms_norm import rms_norm
from paceline.kernels.rms_norm_triton import rms_norm_triton


def write_norm(x: torch.Tensor, out: torch.Tensor) -> None:
    rms_norm_triton(x, torch.ones_like(x[0]), 1e-5, out=out)


def test_what_is_compiled_ahead_is_not_launched() -> None:
    x = torch.randn(3, 64).to(device())
    out = poisoned((3, 64), torch.float32)
    compile_ahead(lambda: write_norm(x, out))
    assert out.isnan().all()
    write_norm(x, out)
    torch.testing.assert_close(out, rms_norm(x, torch.ones_like(x[0]), 1e-5))


def test_launches_after_a_failed_compilation_are_launched() -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    for _ in range(2):  # the second would find the first one's mode still on
        with pytest.raises(RuntimeError, match="no such kernel"):
            compile_ahead(fail)
    x, out = torch.randn(2, 64).to(device()), poisoned((2, 64), torch.float32)
    write_norm(x, out)
    assert not out.isnan().any()
