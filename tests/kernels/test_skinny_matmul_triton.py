"""Products for few rows equal those in float64, however they are cut, and never change."""

import pytest
import torch
import torch.nn.functional as F
from triton_device import device, poisoned

from paceline.kernels.skinny_matmul_triton import skinny_matmul_triton
from paceline.kernels.skinny_tiles import (
    SkinnyTiles,
    SkinnyWorkspace,
    choose_tiles,
    workspace_size,
)

# Outputs are near 1, summed in float32 and rounded once: half a unit in the last place of the
# dtype (2**-9 of bfloat16, 2**-12 of float16), and for float32 the rounding of its sums.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# gated, bias, residual
EPILOGUES = [(False, False, True), (False, True, False), (True, True, True), (True, False, False)]


def make_operands(
    num_rows: int, num_outputs: int, inner: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random x, weight and bias whose product has a variance of about 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, inner, generator=generator)
    weight = torch.randn(num_outputs, inner, generator=generator) / inner**0.5
    bias = torch.randn(num_outputs, generator=generator)
    x, weight, bias = (tensor.to(device(), dtype) for tensor in (x, weight, bias))
    return x, weight, bias


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    result = x.double() @ weight.double().T
    if bias is not None:
        result += bias.double()
    if gated:
        gate, up = result.chunk(2, dim=-1)
        result = F.silu(gate) * up
    if residual is not None:
        result += residual.double()
    return result


def assert_near(output: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[output.dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def small_tiles(num_splits: int, weight_first: bool = False) -> SkinnyTiles:
    return SkinnyTiles(16, 32, 32, num_splits, num_stages=2, weight_first=weight_first)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "inner"),
    [(0, 8, 16), (1, 1, 1), (1, 320, 320), (3, 97, 200), (17, 130, 65), (65, 96, 150)],
)
def test_equals_the_product(
    num_rows: int, num_outputs: int, inner: int, dtype: torch.dtype
) -> None:
    x, weight, bias = make_operands(num_rows, num_outputs, inner, dtype)
    for with_bias in (None, bias):
        output = skinny_matmul_triton(x, weight, with_bias)
        assert output.is_contiguous()
        assert_near(output, reference(x, weight, with_bias))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("num_splits", [1, 2, 4])
@pytest.mark.parametrize("weight_first", [False, True])
def test_every_cut_and_epilogue_gives_the_product(
    num_splits: int, weight_first: bool, dtype: torch.dtype
) -> None:
    x, weight, bias = make_operands(18, 70, 140, dtype)
    tiles = small_tiles(num_splits, weight_first)
    for gated, with_bias, with_residual in EPILOGUES:
        width = 35 if gated else 70
        residual = torch.randn(18, width).to(device(), dtype) if with_residual else None
        partials, counters = workspace_size(18, 70, tiles, gated)
        workspace = SkinnyWorkspace(
            poisoned((partials,), torch.float32),
            torch.zeros(counters, dtype=torch.int32, device=device()),
        )
        out = poisoned((18, width), dtype)
        given = bias if with_bias else None
        skinny_matmul_triton(
            x,
            weight,
            given,
            gated=gated,
            residual=residual,
            out=out,
            workspace=workspace,
            tiles=tiles,
        )
        assert_near(out, reference(x, weight, given, gated, residual))
        assert not workspace.counters.any()


def test_more_splits_than_steps_leave_some_empty() -> None:
    x, weight, bias = make_operands(2, 33, 40, torch.float32)
    output = skinny_matmul_triton(x, weight, bias, tiles=small_tiles(4))
    assert_near(output, reference(x, weight, bias))


def test_rows_of_any_stride_and_a_residual_written_over() -> None:
    x, weight, _ = make_operands(5, 48, 64, torch.bfloat16)
    wide_x, wide_weight = x.repeat(1, 2), torch.cat([weight, weight + 1], dim=1)
    wide_out = poisoned((5, 100), torch.bfloat16)
    out = wide_out[:, 20:68]
    out.copy_(torch.randn(5, 48))
    expected = reference(x, weight, residual=out.clone())
    skinny_matmul_triton(
        wide_x[:, :64], wide_weight[:, :64], residual=out, out=out, tiles=small_tiles(2)
    )
    assert_near(out, expected)
    assert wide_out[:, :20].isnan().all()
    assert wide_out[:, 68:].isnan().all()


def test_split_product_gives_the_same_bits_again_in_a_used_workspace() -> None:
    x, weight, bias = make_operands(20, 64, 256, torch.float32)
    tiles = small_tiles(4)
    workspace = SkinnyWorkspace.allocate(*workspace_size(20, 64, tiles), device())
    first, again = (
        skinny_matmul_triton(x, weight, bias, workspace=workspace, tiles=tiles) for _ in range(2)
    )
    assert torch.equal(first, again)


def test_splits_are_added_in_the_order_of_k() -> None:
    # Only in that order do the large numbers cancel before the small one is added.
    x = torch.zeros(1, 128, device=device())
    x[0, 0], x[0, 32], x[0, 64] = 1e9, -1e9, 1.0
    weight = torch.ones(1, 128, device=device())
    assert skinny_matmul_triton(x, weight, tiles=small_tiles(4)).item() == 1.0


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("num_outputs", "inner"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (64, 64)]
)
def test_chosen_tiles_fit_into_shared_memory(
    num_outputs: int, inner: int, gated: bool, dtype: torch.dtype
) -> None:
    for num_rows in (1, 16, 33, 64, 256):
        tiles = choose_tiles(num_rows, num_outputs, inner, dtype, gated)
        weight_rows = tiles.block_n * (2 if gated else 1)
        stage_bytes = (tiles.block_m + weight_rows) * tiles.block_k * dtype.itemsize
        assert tiles.num_stages * stage_bytes <= 227 * 1024
        assert tiles.num_splits == 1 or inner >= 4 * tiles.block_k * tiles.num_splits


def test_few_steps_have_few_stages() -> None:
    large = choose_tiles(1, 6144, 4096, torch.bfloat16)
    small = choose_tiles(1, 960, 576, torch.bfloat16)
    assert large.num_stages == 6
    assert small.num_stages == 3  # five steps in two splits


def test_a_weight_one_row_off_is_noticed() -> None:
    x, weight, bias = make_operands(3, 40, 64, torch.bfloat16)
    wrong = skinny_matmul_triton(x, weight.roll(1, 0), bias)
    with pytest.raises(AssertionError):
        assert_near(wrong, reference(x, weight, bias))


def test_what_the_kernel_cannot_do_is_refused() -> None:
    x, weight, bias = make_operands(3, 40, 64, torch.float32)
    refused = [
        ("must be \\[M, K\\]", lambda: skinny_matmul_triton(x[:, :32], weight)),
        ("must be the same", lambda: skinny_matmul_triton(x, weight.half())),
        ("must be the same", lambda: skinny_matmul_triton(x.double(), weight.double())),
        ("beside each other", lambda: skinny_matmul_triton(x, weight.T.contiguous().T)),
        ("of one size", lambda: skinny_matmul_triton(x, weight[:39], gated=True)),
        ("bias must be", lambda: skinny_matmul_triton(x, weight, bias[:39])),
        ("out must be", lambda: skinny_matmul_triton(x, weight, out=x)),
        ("residual must be", lambda: skinny_matmul_triton(x, weight, residual=x)),
        (
            "the product needs 240 and 2",
            lambda: skinny_matmul_triton(
                x,
                weight,
                tiles=small_tiles(2),
                workspace=SkinnyWorkspace.allocate(240, 1, device()),
            ),
        ),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()
