"""Linear layers for few rows on a GPU: y = x W^T + b, and what directly follows such a product.

    plain        y [M, N]   = x W^T + b
    gated        y [M, N/2] = silu(g) * u       where g, u are the halves of x W^T + b
    residual     r is added to y, last
    norm         y times the weight of the norm that follows goes to a place of its own, with the
                 squares of each tile: see `paceline.kernels.normed_rows`
    squares      those of x, whose rows are without their factors: x W^T is multiplied by them

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

from paceline.kernels.normed_rows import NormedRows
from paceline.kernels.prefetch_triton import prefetch_l2
from paceline.kernels.skinny_checks import (
    check_like,
    check_norms,
    check_operands,
    check_pieces,
    check_workspace,
)
from paceline.kernels.skinny_tiles import (
    LINE_BYTES,
    SkinnyTiles,
    SkinnyWorkspace,
    choose_tiles,
    workspace_size,
)


def skinny_matmul_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
    eps: float = 0.0,
    norm: torch.Tensor | None = None,
    normed: NormedRows | None = None,
    workspace: SkinnyWorkspace | None = None,
    tiles: SkinnyTiles | None = None,
) -> torch.Tensor:
    """Return x W^T + b [M, N]; with `gated` silu of its first half times the second [M, N / 2].

    Rows of any stride, elements of a row beside each other. `out` may be `residual`, and neither
    may overlap anything else. A split product needs `workspace`, or allocates one, which costs a
    fill kernel. Raises ValueError for what the kernel cannot do.

    squares, eps: of the norm of x. norm: weight [N] of the norm that follows, written to `normed`,
    which `allocate_normed` makes; float16 is refused, since y times it may be too large.
    """
    check_operands(x, weight, bias, gated)
    num_rows, inner = x.shape
    num_outputs = weight.shape[0]
    width = num_outputs // 2 if gated else num_outputs
    if out is None:
        out = x.new_empty((num_rows, width))
    check_like("out", out, (num_rows, width), x)
    if residual is not None:
        check_like("residual", residual, (num_rows, width), x)
    check_norms(x, squares, out, norm, normed)
    if num_rows == 0:
        return out
    if tiles is None:
        tiles = choose_tiles(num_rows, num_outputs, inner, x.dtype, gated)
    num_partials, num_tiles = workspace_size(num_rows, num_outputs, tiles, gated)
    if workspace is None:
        workspace = SkinnyWorkspace.allocate(num_partials, num_tiles, x.device)
    check_workspace(workspace, num_partials, num_tiles)
    if normed is not None:
        check_pieces(normed, tiles, num_rows, width)
    grid = (
        triton.cdiv(num_rows, tiles.block_m),
        triton.cdiv(width, tiles.block_n),
        tiles.num_splits,
    )
    # Without the option's name where it is off: the interpreter and old GPUs know none.
    options: dict[str, Any] = {"launch_pdl": True} if tiles.launch_early else {}
    _skinny_matmul_kernel[grid](
        x,
        weight,
        bias,
        residual,
        out,
        squares,
        norm,
        None if normed is None else normed.rows,
        None if normed is None else normed.squares,
        workspace.partials,
        workspace.counters,
        num_rows,
        width,
        inner,
        width * weight.stride(0),
        eps,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        GATED=gated,
        NUM_SQUARES=0 if squares is None else squares.shape[0],
        SQUARES_BLOCK=1 if squares is None else triton.next_power_of_2(squares.shape[0]),
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


def allocate_normed(out: torch.Tensor, tiles: SkinnyTiles) -> NormedRows:
    """Allocate for the normed rows of a product that writes `out`."""
    num_rows, width = out.shape
    num_pieces = triton.cdiv(width, tiles.block_n)
    squares = torch.empty((num_pieces, num_rows), dtype=torch.float32, device=out.device)
    return NormedRows(torch.empty_like(out, memory_format=torch.contiguous_format), squares)


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
    squares,
    norm,
    normed,
    normed_squares,
    partials,
    counters,
    num_rows,
    width,
    inner,
    up_offset,
    eps,
    x_stride,
    weight_stride,
    residual_stride,
    out_stride,
    GATED: tl.constexpr,
    NUM_SQUARES: tl.constexpr,
    SQUARES_BLOCK: tl.constexpr,
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
    pieces = tl.arange(0, SQUARES_BLOCK)
    piece_squares = tl.zeros((SQUARES_BLOCK, BLOCK_M), tl.float32)
    if squares is not None:  # needed at the end, so that nothing waits for them there
        exists = (pieces < NUM_SQUARES)[:, None] & (rows < num_rows)[None, :]
        square_places = squares + pieces[:, None] * num_rows + rows[None, :]
        piece_squares = tl.load(square_places, mask=exists, other=0.0)
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
        if squares is not None:
            factors = tl.rsqrt(tl.sum(piece_squares, axis=0) / inner + eps)[:, None]
            sums *= factors
            up_sums *= factors
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
        rounded = sums.to(out.dtype.element_ty)
        tl.store(places, rounded, mask=mask)
        if norm is not None:
            wide = tl.where(mask, rounded.to(tl.float32), 0.0)
            scale = tl.load(norm + columns, mask=columns < width, other=0.0).to(tl.float32)
            normed_places = normed + rows.to(tl.int64)[:, None] * width + columns[None, :]
            tl.store(normed_places, (wide * scale[None, :]).to(out.dtype.element_ty), mask=mask)
            piece = normed_squares + tl.program_id(1) * num_rows + rows
            tl.store(piece, tl.sum(wide * wide, axis=1), mask=rows < num_rows)
