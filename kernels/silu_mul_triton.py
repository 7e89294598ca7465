"""Gated activation in Triton: y = silu(gate) * up (reference: kernels.silu_mul).

    silu(g) = g / (1 + exp(-g))                                      Shazeer 2020, "SwiGLU"
    gate_up [T, 2 I], gate first -> y [T, I]; float32, bfloat16 or float16, rows at any stride

Computed in float32 and rounded once. A program takes a piece of one row; rows that pad a batch are
computed like any other: no row depends on another.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from paceline.kernels.launch import launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """The piece of a row that a program takes."""

    width: int
    num_warps: int


def choose_tile(num_rows: int) -> Tile:
    """Choose by the rows: few rows need small pieces to keep a whole GPU busy.

    Times with these: bench/results/kernels_h200.json. Others were not tried.
    """
    if num_rows <= 32:
        return Tile(512, 2)
    if num_rows <= 256:
        return Tile(1024, 4)
    return Tile(2048, 4)


@triton.jit
def _silu_mul_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr,
    out_ptr,
    gate_up_stride,
    out_stride,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < WIDTH
    if LAUNCH_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate_ptrs = gate_up_ptr + row * gate_up_stride + columns
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul_triton(
    gate_up: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
    launch_early: bool = False,
) -> torch.Tensor:
    """Return silu of the first half times the second half, contiguous unless `out` is given.

    launch_early: overlap with the end of the kernel ahead (programmatic dependent launch, Hopper
    and later).
    """
    if gate_up.dim() != 2 or gate_up.dtype not in DTYPES or gate_up.stride(1) != 1:
        raise ValueError(
            "gate_up must be [tokens, 2 I] of float32, bfloat16 or float16 with contiguous rows, "
            f"got {gate_up.dtype} {list(gate_up.shape)} of strides {list(gate_up.stride())}"
        )
    num_rows, both = gate_up.shape
    if both % 2:
        raise ValueError(f"gate and up must be of one size, got {both} together")
    width = both // 2
    if out is None:
        out = gate_up.new_empty(num_rows, width)
    elif list(out.shape) != [num_rows, width] or out.dtype != gate_up.dtype or out.stride(1) != 1:
        raise ValueError(
            f"out must be {gate_up.dtype} [{num_rows}, {width}] with contiguous rows, got "
            f"{out.dtype} {list(out.shape)} of strides {list(out.stride())}"
        )
    if tile is None:
        tile = choose_tile(num_rows)
    if num_rows and width:
        options = {"launch_pdl": True} if launch_early else {}
        launch(_silu_mul_kernel, (num_rows, triton.cdiv(width, tile.width)))(
            gate_up,
            out,
            gate_up.stride(0),
            out.stride(0),
            WIDTH=width,
            TILE=tile.width,
            LAUNCH_EARLY=launch_early,
            num_warps=tile.num_warps,
            **options,
        )
    return out
