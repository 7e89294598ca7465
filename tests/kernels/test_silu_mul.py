"""The gated activation equals its formula in float64."""

import pytest
import torch

from paceline.kernels.silu_mul import silu_mul

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def formula(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.double() * torch.sigmoid(gate.double()) * up.double()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("tokens", "width"), [(1, 5), (17, 1536)])
def test_equals_the_formula(tokens: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    both = torch.randn(tokens, 2 * width).to(dtype)
    before = both.clone()
    output = silu_mul(both)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(output.double(), formula(*both.chunk(2, dim=-1)), **close)
    assert output.is_contiguous()
    assert torch.equal(both, before)


def test_gate_and_up_exchanged_is_noticed() -> None:
    gate, up = torch.randn(2, 3, 8)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            silu_mul(torch.cat((up, gate), dim=-1)).double(), formula(gate, up), rtol=0.1, atol=0.1
        )


def test_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="got 7 together"):
        silu_mul(torch.randn(2, 7))
