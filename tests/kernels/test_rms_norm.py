"""RMS norm equals its formula in float64."""

import pytest
import torch

from paceline.kernels.rms_norm import rms_norm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("tokens", "width"), [(1, 7), (5, 64), (130, 576)])
def test_equals_the_formula(tokens: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    x, weight = torch.randn(tokens, width).to(dtype), torch.rand(width).to(dtype)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5).double(), formula(x, weight, 1e-5), **close
    )


def test_a_forgotten_weight_is_noticed() -> None:
    x, weight = torch.randn(3, 64), torch.rand(64)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            rms_norm(x, torch.ones(64), 1e-5).double(), formula(x, weight, 1e-5), rtol=0.1, atol=0.1
        )
