"""The Triton RMS norm equals its formula in float64."""

import pytest
import torch
from triton_device import device, poisoned

from paceline.kernels.rms_norm_triton import Tile, rms_norm_triton

# One rounding of the result, half a step of its dtype at most, and float32's own error. The
# interpreter cuts bfloat16 instead of rounding it: a whole step.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 2**-8 if device() == "cuda" else 2**-7,
    torch.float16: 2**-10,
}
EARLY = [False] if device() == "cpu" else [False, True]


def formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def make_inputs(tokens: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(width)
    x = torch.randn(tokens, width, device=device()).to(dtype)
    return x, torch.rand(width, device=device()).to(dtype)


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output.double(), expected, rtol=TOLERANCE[output.dtype], atol=1e-5)


@pytest.mark.parametrize("launch_early", EARLY)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 7), (5, 64), (2, 577), (2, 4097)])
def test_equals_the_formula(
    tokens: int, width: int, dtype: torch.dtype, launch_early: bool
) -> None:
    x, weight = make_inputs(tokens, width, dtype)
    before = x.clone()
    out = poisoned((tokens, width), dtype)
    output = rms_norm_triton(x, weight, 1e-5, out=out, launch_early=launch_early)
    assert output is out
    assert_close(output, formula(x, weight, 1e-5))
    assert torch.equal(x, before)


def test_rows_at_a_stride_are_normed_and_their_neighbours_left_alone() -> None:
    x, weight = make_inputs(4, 33, torch.float32)
    wide = poisoned((4, 50), torch.float32)
    wide[:, :33] = x
    out = poisoned((4, 40), torch.float32)
    rms_norm_triton(wide[:, :33], weight, 1e-5, out=out[:, :33])
    assert_close(out[:, :33], formula(x, weight, 1e-5))
    assert out[:, 33:].isnan().all()


def test_the_output_may_be_the_input() -> None:
    x, weight = make_inputs(3, 100, torch.bfloat16)
    expected = formula(x, weight, 1e-6)
    assert_close(rms_norm_triton(x, weight, 1e-6, out=x), expected)


def test_every_tile_gives_the_formula() -> None:
    x, weight = make_inputs(2, 65, torch.float32)
    for tile in (Tile(128, 1), Tile(256, 8)):
        assert_close(rms_norm_triton(x, weight, 1e-5, tile=tile), formula(x, weight, 1e-5))


def test_no_rows_are_nothing_to_do() -> None:
    x, weight = make_inputs(0, 8, torch.float32)
    assert list(rms_norm_triton(x, weight, 1e-5).shape) == [0, 8]


def test_a_forgotten_weight_is_noticed() -> None:
    x, weight = make_inputs(3, 64, torch.float32)
    output = rms_norm_triton(x, torch.ones_like(weight), 1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(output.double(), formula(x, weight, 1e-5), rtol=0.1, atol=0.1)


def test_inputs_that_do_not_fit_are_refused() -> None:
    x, weight = make_inputs(3, 64, torch.float32)
    with pytest.raises(ValueError, match=r"weight must be contiguous \[64\], got \[63\]"):
        rms_norm_triton(x, weight[:63], 1e-5)
    with pytest.raises(ValueError, match=r"out must be torch.float32 \[3, 64\]"):
        rms_norm_triton(x, weight, 1e-5, out=x[:2])
    with pytest.raises(ValueError, match=r"contiguous rows, got .* of strides \[1, 3\]"):
        rms_norm_triton(weight.expand(3, 64).t().contiguous().t(), weight, 1e-5)
    with pytest.raises(ValueError, match="1 to 65536 wide, got 65537"):
        rms_norm_triton(torch.empty(1, 65537), weight, 1e-5)
    with pytest.raises(ValueError, match="a tile of 32 does not hold rows of 64"):
        rms_norm_triton(x, weight, 1e-5, tile=Tile(32, 1))
