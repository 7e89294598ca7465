"""Linear layers equal the product in float64, whatever library computes them."""

import pytest
import torch

from paceline.kernels.skinny_matmul import skinny_matmul, skinny_matmul_reference

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.3}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "inner", "outer"),
    [(0, 8, 4), (1, 576, 960), (2, 7, 3), (16, 64, 97), (65, 96, 576)],
)
def test_equals_the_product(
    tokens: int, inner: int, outer: int, has_bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(inner)
    x, weight = torch.randn(tokens, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    bias = torch.randn(outer).to(dtype) if has_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    for product in (skinny_matmul, skinny_matmul_reference):
        output = product(x, weight, bias)
        assert output.is_contiguous()
        torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=TOLERANCE[dtype])


def test_weight_that_lies_unaligned_in_memory_gives_the_same() -> None:
    """As one does that is mapped from a file."""
    memory = torch.randn(64 * 96 + 1)
    weight, x = memory[1:].view(64, 96), torch.randn(5, 96)
    torch.testing.assert_close(
        skinny_matmul(x, weight), skinny_matmul_reference(x, weight), rtol=1e-4, atol=1e-4
    )


def test_a_forgotten_bias_is_noticed() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            skinny_matmul(x, weight), skinny_matmul_reference(x, weight, bias), rtol=0.1, atol=0.1
        )
