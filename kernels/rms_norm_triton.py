"""Root-mean-square norm in Triton (reference: kernels.rms_norm).

    y = x / sqrt(mean(x^2) + eps) * weight                           Zhang and Sennrich 2019
    x, y [T, H], weight [H]; float32, bfloat16 or float16, rows at any stride

A program takes a row and holds it in registers, so each value is read once; sums are float32. Rows
that pad a batch are normed like any other: no row depends on another.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from paceline.kernels.launch import launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 65536
"""A wider row would not stay in the registers of one program."""


class Tile(NamedTuple):
    """How a row is cut."""

    width: int
    num_warps: int


def choose_tile(width: int) -> Tile:
    """Choose by the row's width. Times: bench/results/kernels_h200.json; others were not tried."""
    padded = triton.next_power_of_2(width)
    for limit, num_warps in ((1024, 4), (4096, 8)):
        if padded <= limit:
            return Tile(padded, num_warps)
    return Tile(padded, 16)


@triton.jit
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    out_stride,
    eps,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    inside = columns < WIDTH
    # The weight is older than any kernel that may still be running.
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if LAUNCH_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    mean_square = tl.sum(x * x, axis=0) / WIDTH
    y = x * tl.rsqrt(mean_square + eps) * weight
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
    launch_early: bool = False,
) -> torch.Tensor:
    """Return the norm of x's rows.

    out: where it goes, may be x itself. launch_early: overlap with the end of the kernel ahead
    (programmatic dependent launch, Hopper and later).
    """
    if x.dim() != 2 or x.dtype not in DTYPES or x.stride(1) != 1:
        raise ValueError(
            "x must be [tokens, width] of float32, bfloat16 or float16 with contiguous rows, got "
            f"{x.dtype} {list(x.shape)} of strides {list(x.stride())}"
        )
    num_rows, width = x.shape
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"rows must be 1 to {MAX_WIDTH} wide, got {width}")
    if list(weight.shape) != [width] or weight.stride(0) != 1:
        raise ValueError(f"weight must be contiguous [{width}], got {list(weight.shape)}")
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.shape != x.shape or out.dtype != x.dtype or out.stride(1) != 1:
        raise ValueError(
            f"out must be {x.dtype} {list(x.shape)} with contiguous rows, got {out.dtype} "
            f"{list(out.shape)} of strides {list(out.stride())}"
        )
    if tile is None:
        tile = choose_tile(width)
    if tile.width < width:
        raise ValueError(f"a tile of {tile.width} does not hold rows of {width}")
    if num_rows:
        options = {"launch_pdl": True} if launch_early else {}
        launch(_rms_norm_kernel, (num_rows,))(
            x,
            weight,
            out,
            x.stride(0),
            out.stride(0),
            eps,
            WIDTH=width,
            TILE=tile.width,
            LAUNCH_EARLY=launch_early,
            num_warps=tile.num_warps,
            **options,
        )
    return out
