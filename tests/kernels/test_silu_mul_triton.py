"""The Triton gated activation equals its formula in float64."""

import pytest
import torch
from triton_device import device, poisoned

from paceline.kernels.silu_mul_triton import Tile, silu_mul_triton

# One rounding of the result, half a step of its dtype at most, and float32's own error. The
# interpreter cuts bfloat16 instead of rounding it: a whole step.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 2**-8 if device() == "cuda" else 2**-7,
    torch.float16: 2**-10,
}
EARLY = [False] if device() == "cpu" else [False, True]


def formula(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.double() * torch.sigmoid(gate.double()) * up.double()


def make_input(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(width)
    return torch.randn(tokens, 2 * width, device=device()).to(dtype)


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output.double(), expected, rtol=TOLERANCE[output.dtype], atol=1e-5)


@pytest.mark.parametrize("launch_early", EARLY)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 1), (1, 5), (3, 513), (2, 1536), (40, 33), (260, 9)]
)
def test_equals_the_formula(
    tokens: int, width: int, dtype: torch.dtype, launch_early: bool
) -> None:
    both = make_input(tokens, width, dtype)
    before = both.clone()
    out = poisoned((tokens, width), dtype)
    assert silu_mul_triton(both, out=out, launch_early=launch_early) is out
    assert_close(out, formula(*both.chunk(2, dim=-1)))
    assert torch.equal(both, before)


def test_large_gates_neither_overflow_nor_vanish() -> None:
    gate = torch.tensor([[-1e4, -100.0, -30.0, 0.0, 30.0, 1e4]], device=device())
    up = torch.full_like(gate, 2.0)
    output = silu_mul_triton(torch.cat((gate, up), dim=-1))
    assert_close(output, formula(gate, up))


def test_rows_at_a_stride_are_read_and_written_where_they_lie() -> None:
    both = make_input(4, 30, torch.float32)
    wide = poisoned((4, 64), torch.float32)
    wide[:, :60] = both
    out = poisoned((4, 40), torch.float32)
    silu_mul_triton(wide[:, :60], out=out[:, :30], tile=Tile(16, 1))
    assert_close(out[:, :30], formula(*both.chunk(2, dim=-1)))
    assert out[:, 30:].isnan().all()


def test_no_rows_are_nothing_to_do() -> None:
    assert list(silu_mul_triton(make_input(0, 4, torch.float32)).shape) == [0, 4]


def test_gate_and_up_exchanged_is_noticed() -> None:
    gate, up = make_input(3, 8, torch.float32).chunk(2, dim=-1)
    output = silu_mul_triton(torch.cat((up, gate), dim=-1))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(output.double(), formula(gate, up), rtol=0.1, atol=0.1)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="got 7 together"):
        silu_mul_triton(torch.randn(2, 7, device=device()))
    with pytest.raises(ValueError, match=r"out must be torch.float32 \[2, 4\]"):
        silu_mul_triton(make_input(2, 4, torch.float32), out=poisoned((2, 5), torch.float32))
    with pytest.raises(ValueError, match=r"got torch.int64 \[2, 4\]"):
        silu_mul_triton(torch.ones(2, 4, dtype=torch.int64))
