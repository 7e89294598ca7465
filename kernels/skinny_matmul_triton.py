"""Linear layers for few rows on a GPU: y = x W^T + b, and what directly follows such a product.

    plain        y [M, N]   = x W^T + b
    gated        y [M, N/2] = silu(g) * u       where g, u are the halves of x W^T + b
    residual     r is added to y, last

    x [M, K], weight [N, K], bias [N], residual as y -> y; all float32, float16 or bfloat16

All of it in float32, rounded once at the end (separate operations round in between). float32
products are IEEE's, not TF32.

Reading the weight is nearly all of the time, so a program takes a tile of its rows, the programs
of all tiles of x beside each other, to find it in the L2. Where the tiles are too few to keep
every multiprocessor reading, K is split too:

    programs (rows of x, rows of weight, split):  partials[split] = x[:, part] W[:, part]^T
    the last of a tile's splits to finish:        y = partials[0] + partials[1] + ...

Splits are added in the order of K, whichever finishes last, so that a call always gives the same
bits. (Atomic additions would not.) Different batch sizes may use different tiles, so they may
differ in low bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from paceline.kernels.launch import launch
from paceline.kernels.prefetch_triton import prefetch_l2
from paceline.kernels.skinny_tiles import (
    LINE_BYTES,
    SkinnyTiles,
    SkinnyWorkspace,
    choose_tiles,
    workspace_size,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def skinny_matmul_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: SkinnyWorkspace | None = None,
    tiles: SkinnyTiles | None = None,
) -> torch.Tensor:
    """Return x W^T + b [M, N]; with `gated` silu of its first half times the second [M, N / 2].

    Rows of any stride, elements of a row beside each other. `out` may be `residual`, and neither
    may overlap anything else. A split product needs `workspace`, or allocates one, which costs a
    fill kernel. Raises ValueError for what the kernel cannot do.
    """
    _check(x, weight, bias, gated)
    num_rows, inner = x.shape
    num_outputs = weight.shape[0]
    width = num_outputs // 2 if gated else num_outputs
    if out is None:
        out = x.new_empty((num_rows, width))
    _check_like("out", out, (num_rows, width), x)
    if residual is not None:
        _check_like("residual", residual, (num_rows, width), x)
    if num_rows == 0:
        return out
    if tiles is None:
        tiles = choose_tiles(num_rows, num_outputs, inner, x.dtype, gated)
    num_partials, num_tiles = workspace_size(num_rows, num_outputs, tiles, gated)
    if workspace is None:
        workspace = SkinnyWorkspace.allocate(num_partials, num_tiles, x.device)
    _check_workspace(workspace, num_partials, num_tiles)
    grid = (
        triton.cdiv(num_rows, tiles.block_m),
        triton.cdiv(width, tiles.block_n),
        tiles.num_splits,
    )
    # Without the option's name where it is off: the interpreter and old GPUs know none.
    options: dict[str, Any] = {"launch_pdl": True} if tiles.launch_early else {}
    launch(_skinny_matmul_kernel, grid)(
        x,
        weight,
        bias,
        residual,
        out,
        workspace.partials,
        workspace.counters,
        num_rows,
        width,
        inner,
        width * weight.stride(0),
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        GATED=gated,
        NUM_SPLITS=tiles.num_splits,
        WEIGHT_FIRST=tiles.weight_first,
        EVEN=width % tiles.block_n == 0 and inner % (tiles.block_k * tiles.num_splits) == 0,
        LAUNCH_EARLY=tiles.launch_early,
        LINES=tiles.prefetch * x.element_size() // LINE_BYTES if tiles.launch_early else 0,
        # On a CPU: the interpreter's product takes the bits of bfloat16 for integers.
        WIDEN=x.is_cpu and x.dtype == torch.bfloat16,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **options,
    )
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or not x.shape[1]:
        raise ValueError(
            f"x {list(x.shape)} and weight {list(weight.shape)} must be [M, K] and [N, K], K > 0"
        )
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise ValueError(
            f"x is {x.dtype} and weight {weight.dtype}; both must be the same of {DTYPES}"
        )
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(
            f"elements of a row must lie beside each other; the strides are {x.stride()} of x and "
            f"{weight.stride()} of weight"
        )
    if gated and weight.shape[0] % 2:
        raise ValueError(f"gate and up must be of one size, got {weight.shape[0]} together")
    if bias is not None and (
        bias.shape != weight.shape[:1] or bias.dtype != x.dtype or not bias.is_contiguous()
    ):
        raise ValueError(
            f"bias must be contiguous {x.dtype} [{weight.shape[0]}], got {bias.dtype} "
            f"{list(bias.shape)} of strides {bias.stride()}"
        )


def _check_like(name: str, tensor: torch.Tensor, shape: tuple[int, int], x: torch.Tensor) -> None:
    if tensor.shape != shape or tensor.dtype != x.dtype or tensor.stride(1) != 1:
        raise ValueError(
            f"{name} must be {x.dtype} {list(shape)} with elements of a row beside each other, got "
            f"{tensor.dtype} {list(tensor.shape)} of strides {tensor.stride()}"
        )


def _check_workspace(workspace: SkinnyWorkspace, num_partials: int, num_tiles: int) -> None:
    partials, counters = workspace
    if partials.dtype != torch.float32 or counters.dtype != torch.int32:
        raise ValueError(
            f"the workspace must be float32 and int32, got {partials.dtype}, {counters.dtype}"
        )
    if not (partials.is_contiguous() and counters.is_contiguous()):
        raise ValueError("the workspace must be contiguous")
    if partials.numel() < num_partials or counters.numel() < num_tiles:
        raise ValueError(
            f"the workspace has {partials.numel()} partial sums and {counters.numel()} counters; "
            f"the product needs {num_partials} and {num_tiles}"
        )
    if num_partials >= 2**31:
        raise ValueError(f"{num_partials} partial sums are too many for 32-bit offsets")


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    accumulator, x, weight, WEIGHT_FIRST: tl.constexpr, WIDEN: tl.constexpr
):
    """Add x W^T, tiles [M, K] and [N, K], to [M, N], or its transpose to [N, M]."""
    if WIDEN:
        x = x.to(tl.float32)
        weight = weight.to(tl.float32)
    if WEIGHT_FIRST:
        accumulator = tl.dot(weight, tl.trans(x), accumulator, input_precision="ieee")
    else:
        accumulator = tl.dot(x, tl.trans(weight), accumulator, input_precision="ieee")
    return accumulator


@triton.jit
def _load_weight(places, mask, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a tile; EVEN: all of it exists."""
    if EVEN:
        tile = tl.load(places, eviction_policy="evict_first")
    else:
        tile = tl.load(places, mask=mask, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _add_splits(first, stride, mask, NUM_SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    # .cg: other multiprocessors wrote these sums, and the L1 cache would not know.
    total = tl.load(first, mask=mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, NUM_SPLITS):
        total += tl.load(first + split * stride, mask=mask, other=0.0, cache_modifier=".cg")
    return total


# Batches have any size: one kernel for all that share their tiles.
@triton.jit(do_not_specialize=["num_rows"])
def _skinny_matmul_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    residual,
    out,
    partials,
    counters,
    num_rows,
    width,
    inner,
    up_offset,
    x_stride,
    weight_stride,
    residual_stride,
    out_stride,
    GATED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    EVEN: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
    LINES: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program: BLOCK_M rows of x, BLOCK_N of the weight (with GATED of each half), one split."""
    if LAUNCH_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    steps = tl.arange(0, BLOCK_K)
    part = tl.cdiv(tl.cdiv(inner, BLOCK_K), NUM_SPLITS) * BLOCK_K
    start = split * part
    row_mask = (rows < num_rows)[:, None]
    column_mask = (columns < width)[:, None]
    x_places = x + rows.to(tl.int64)[:, None] * x_stride + steps[None, :]
    weight_places = weight + columns.to(tl.int64)[:, None] * weight_stride + steps[None, :]
    if WEIGHT_FIRST:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up_sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if LAUNCH_EARLY:
        if LINES > 0:
            line: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
            ahead = tl.minimum(start + tl.arange(0, LINES) * line, inner - line)
            own_rows = tl.minimum(columns, width - 1).to(tl.int64)[:, None] * weight_stride
            prefetch_l2(weight + own_rows + ahead[None, :])
            if GATED:
                prefetch_l2(weight + up_offset + own_rows + ahead[None, :])
        tl.extra.cuda.gdc_wait()  # x, residual and the workspace belong to the kernels ahead
    for k in range(start, tl.minimum(start + part, inner), BLOCK_K):
        inside = (k + steps < inner)[None, :]
        # The weight is read once, x by every program.
        x_mask = row_mask if EVEN else row_mask & inside
        x_tile = tl.load(x_places + k, mask=x_mask, other=0.0, eviction_policy="evict_last")
        weight_tile = _load_weight(weight_places + k, column_mask & inside, EVEN)
        sums = _multiply(sums, x_tile, weight_tile, WEIGHT_FIRST, WIDEN)
        if GATED:
            weight_tile = _load_weight(weight_places + up_offset + k, column_mask & inside, EVEN)
            up_sums = _multiply(up_sums, x_tile, weight_tile, WEIGHT_FIRST, WIDEN)
    if WEIGHT_FIRST:
        sums = tl.trans(sums)
        up_sums = tl.trans(up_sums)

    mask = row_mask & (columns < width)[None, :]
    is_last = True
    if NUM_SPLITS > 1:
        # [split, row, N]
        num_outputs = width * 2 if GATED else width
        split_stride = num_rows.to(tl.int64) * num_outputs
        first = partials + rows.to(tl.int64)[:, None] * num_outputs + columns[None, :]
        own = first + split * split_stride
        tl.store(own, sums, mask=mask)
        if GATED:
            tl.store(own + width, up_sums, mask=mask)
        # All threads have stored before one of them tells the other splits.
        tl.debug_barrier()
        counter = counters + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        num_before = tl.atomic_add(counter, 1, sem="acq_rel")
        is_last = num_before == NUM_SPLITS - 1
        if is_last:
            tl.debug_barrier()
            tl.store(counter, 0)
            sums = _add_splits(first, split_stride, mask, NUM_SPLITS)
            if GATED:
                up_sums = _add_splits(first + width, split_stride, mask, NUM_SPLITS)
    if is_last:
        if bias is not None:
            addend = tl.load(bias + columns, mask=columns < width, other=0.0)
            sums += addend.to(tl.float32)[None, :]
            if GATED:
                addend = tl.load(bias + width + columns, mask=columns < width, other=0.0)
                up_sums += addend.to(tl.float32)[None, :]
        if GATED:
            sums = sums * tl.sigmoid(sums) * up_sums
        if residual is not None:
            kept = residual + rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
            sums += tl.load(kept, mask=mask, other=0.0).to(tl.float32)
        places = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
        tl.store(places, sums.to(out.dtype.element_ty), mask=mask)
