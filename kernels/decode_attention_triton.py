"""Attention of each row's newest tokens over its paged context, on a GPU (decode, verification).

    y[r, t, h] = softmax(q[r, t, h] K_r[:e]^T scale) V_r[:e]        e = lengths[r] - T + 1 + t
    q, y [R, T, num_heads, head_dim], T the same for all rows: 1, or 1 + drafts to be verified
    pool kv [blocks, layers, kv_heads, 2, block_tokens, head_dim], at any strides
    tables int32 [R, columns] of block ids, lengths int32 [R], the new tokens included

float32 (IEEE products), bfloat16 or float16; sums in float32. With a window, token e - 1 sees
itself and the window - 1 before it. A row of length 0 pads the batch: nothing of it is read or
written. A query before the start of its sequence (length < T) gives 0. Reference:
kernels.decode_attention.

One program would read a long context alone while the other multiprocessors wait, so contexts are
split (flash-decoding: Dao, Haziza, Massa and Sizov, 2023), each part with a running softmax
(Milakov and Gimelshein, 2018):

    programs (kv head, row, split)        queries of the kv head: a tile [T * group, head_dim]
      row 0  |split 0|split 1|split 2|    keys: tiles of `block_n` tokens, each token's block id
      row 1  |sp 0|sp 1|sp 2|             looked up in the table, so a tile spans any blocks
      row 2  |0|                          short rows leave their later programs without work
    programs (row, query):                y = sum(2^(s_i - m) y_i) / sum(2^(s_i - m)), m = max(s_i)

where y_i is the softmax over split i alone and s_i the log2 of its sum. How a row is cut follows
from its length on the device: a captured launch stays right while contexts grow.
"""

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_SPLITS = 128
LOG2_E = 1.4426950408889634

_LARGE_TILE_BYTES = 64 * 1024
"""Of keys and values together, for launches with fewer programs than would hide each other's waits.
"""
_SMALL_TILE_BYTES = 32 * 1024
"""For launches that fill every multiprocessor several times over."""


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeTiles:
    """How a launch is cut. All but the last two are powers of 2."""

    block_m: int
    """Queries of a kv head in a program, at least 16 (the matrix unit's tile)"""
    block_n: int
    """Tokens of context in a step of the loop, at least 16"""
    num_splits: int
    """Parts that a row's context is cut into at most; 1 needs no merging"""
    min_tiles: int = 1
    """Tiles of block_n tokens that a split has at least"""
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        for name, least in (("block_m", 16), ("block_n", 16), ("num_splits", 1), ("min_tiles", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name} must be a power of 2 of at least {least}, got {value}")
        if self.num_splits > MAX_SPLITS:
            raise ValueError(f"num_splits must be at most {MAX_SPLITS}, got {self.num_splits}")

    def workspace_elements(self, num_rows: int, num_queries: int, head_dim: int) -> int:
        """Return the float32 elements that partial results need; num_queries is T * num_heads."""
        if self.num_splits == 1:
            return 0
        return num_rows * self.num_splits * num_queries * (head_dim + 1)


def choose_tiles(
    num_rows: int,
    *,
    num_kv_heads: int,
    num_queries: int,
    head_dim: int,
    dtype: torch.dtype,
    max_context: int,
    num_sms: int,
) -> DecodeTiles:
    """Return the tiles for a launch.

    num_queries: T * group, of one kv head. max_context: tokens that a row may attend to, at most;
    a longer one is computed as well, only in larger parts. For bf16, head dim 128 and groups of 4
    these were within 3 % of the best of a sweep on an H200 whose other tiles are not kept; times
    with these: bench/results/kernels_h200.json. The other sizes fit in registers and shared memory
    by the compiler's report for sm_90 and are not timed.
    """
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    if dtype is torch.float32:  # without matrix units, products are unrolled in registers
        most = 16
    else:
        most = 64 if padded_dim <= 128 else 32
    block_m = min(most, max(16, triton.next_power_of_2(num_queries)))
    programs = max(1, num_rows * num_kv_heads * triton.cdiv(num_queries, block_m))
    fills_the_card = programs >= 2 * num_sms
    if dtype is torch.float32:
        tile_bytes, num_warps, num_stages = _SMALL_TILE_BYTES, 8, 3
    elif fills_the_card or block_m == 64 or padded_dim > 128:
        tile_bytes, num_warps, num_stages = _SMALL_TILE_BYTES, (2 if block_m == 16 else 4), 3
    else:
        tile_bytes, num_warps, num_stages = _LARGE_TILE_BYTES, 4, 5
    block_n = min(128, max(16, tile_bytes // (2 * padded_dim * dtype.itemsize)))
    num_splits = 1
    while (
        num_splits < MAX_SPLITS
        and 2 * num_splits * programs <= num_sms
        and num_splits * block_n < max_context
    ):
        num_splits *= 2
    return DecodeTiles(block_m, block_n, num_splits, num_warps=num_warps, num_stages=num_stages)


@triton.jit
def _cut(  # type: ignore[no-untyped-def]
    length,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """Return the first token that any query of the row sees, and the tokens of a split."""
    low = length * 0
    if WINDOW is not None:
        low = tl.maximum(length - TOKENS + 1 - WINDOW, 0)
    num_tiles = tl.cdiv(length - low, BLOCK_N)
    return low, tl.maximum(tl.cdiv(num_tiles, SPLITS), MIN_TILES) * BLOCK_N


@triton.jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    kv_ptr,
    tables_ptr,
    lengths_ptr,
    out_ptr,
    partials_ptr,
    log_sums_ptr,
    scale_log2,
    num_kv_heads,
    q_row,
    q_token,
    q_head,
    out_row,
    out_token,
    out_head,
    kv_block,
    kv_head_stride,
    kv_plane,
    kv_token,
    table_row,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """A program: up to BLOCK_M queries of one kv head of a row, one split of its context."""
    QUERIES: tl.constexpr = TOKENS * GROUP
    M_TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(0) // M_TILES
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    if LAUNCH_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    length = tl.load(lengths_ptr + row)
    low, split_tokens = _cut(length, TOKENS, WINDOW, BLOCK_N, SPLITS, MIN_TILES)
    begin = low + split * split_tokens
    if begin >= length:  # of a row of length 0, every split
        return
    end = tl.minimum(begin + split_tokens, length)

    # Tile row m is token m // GROUP, query head m % GROUP of this kv head.
    query = (tl.program_id(0) % M_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    token = query // GROUP
    head = kv_head * GROUP + query % GROUP
    wanted = (query < QUERIES)[:, None] & (dim < HEAD_DIM)[None, :]
    q_offsets = row * q_row + token * q_token + head * q_head
    q = tl.load(q_ptr + q_offsets[:, None] + dim[None, :], mask=wanted, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    limit = tl.where(query < QUERIES, length - TOKENS + 1 + token, 0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table_ptr = tables_ptr + row * table_row
    head_ptr = kv_ptr + kv_head.to(tl.int64) * kv_head_stride
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        inside = position < end
        block = tl.load(table_ptr + position // BLOCK_TOKENS, mask=inside, other=0)
        token_offsets = block.to(tl.int64) * kv_block + (position % BLOCK_TOKENS) * kv_token
        k_ptrs = head_ptr + token_offsets[:, None] + dim[None, :]
        # Slots past the length hold anything, NaN too: a weight of 0 would not silence them.
        held = inside[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_ptrs, mask=held, other=0.0)
        v = tl.load(k_ptrs + kv_plane, mask=held, other=0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        visible = position[None, :] < limit[:, None]
        if WINDOW is not None:
            visible &= position[None, :] >= limit[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Until a query sees its first token, its maximum is -inf: subtract 0, never -inf.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        weights = weights.to(kv_ptr.dtype.element_ty)
        if WIDEN:
            weights = weights.to(tl.float32)
        values = tl.dot(weights, v, values * shrink[:, None], input_precision="ieee")
        top = new_top

    divisor = tl.where(total == 0.0, 1.0, total)
    values = values / divisor[:, None]
    if SPLITS == 1:
        out_offsets = row * out_row + token * out_token + head * out_head
        out_ptrs = out_ptr + out_offsets[:, None] + dim[None, :]
        tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=wanted)
    else:
        slot = ((row * num_kv_heads + kv_head) * SPLITS + split) * QUERIES + query
        tl.store(partials_ptr + slot[:, None] * HEAD_DIM + dim[None, :], values, mask=wanted)
        log_sum = tl.where(total == 0.0, float("-inf"), top + tl.log2(divisor))
        tl.store(log_sums_ptr + slot, log_sum, mask=query < QUERIES)


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    partials_ptr,
    log_sums_ptr,
    lengths_ptr,
    out_ptr,
    num_kv_heads,
    out_row,
    out_token,
    out_head,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """A program: one query; STEP splits at a time."""
    QUERIES: tl.constexpr = TOKENS * GROUP
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1) // QUERIES
    query = tl.program_id(1) % QUERIES
    if LAUNCH_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    length = tl.load(lengths_ptr + row)
    if length <= 0:
        return
    low, split_tokens = _cut(length, TOKENS, WINDOW, BLOCK_N, SPLITS, MIN_TILES)
    num_used = tl.cdiv(length - low, split_tokens)

    first = (row * num_kv_heads + kv_head) * SPLITS * QUERIES + query
    log_sums_ptr += first
    every = tl.arange(0, SPLITS)
    log_sums = tl.load(log_sums_ptr + every * QUERIES, mask=every < num_used, other=float("-inf"))
    top = tl.max(log_sums, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(log_sums - top), 0)

    dim = tl.arange(0, BLOCK_D)
    value = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_used, STEP):
        split = start + tl.arange(0, STEP)
        used = split < num_used
        log_sum = tl.load(log_sums_ptr + split * QUERIES, mask=used, other=float("-inf"))
        offsets = (first + split * QUERIES) * HEAD_DIM
        parts = tl.load(
            partials_ptr + offsets[:, None] + dim[None, :],
            mask=used[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        value += tl.sum(tl.exp2(log_sum - top)[:, None] * parts, 0)
    value = value / tl.where(total == 0.0, 1.0, total)
    out_offset = row * out_row + (query // GROUP) * out_token
    out_offset += (kv_head * GROUP + query % GROUP) * out_head
    tl.store(out_ptr + out_offset + dim, value.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


def decode_attention_triton(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    max_context: int | None = None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    tiles: DecodeTiles | None = None,
    launch_early: bool = False,
) -> torch.Tensor:
    """Return the attention output, of q's shape and dtype.

    The new tokens' own keys and values must be in the pool already, and every row's table must
    cover its length.

    q: [R, T, num_heads, head_dim] or, with rows one after another, [R * T, num_heads, head_dim];
    only the last dimension must be contiguous. max_context: the longest that lengths are expected
    to be; None takes what the tables can hold. workspace: float32, at least
    `tiles.workspace_elements(R, T * num_heads, head_dim)` of them; launches that follow each other
    on a stream can share it. launch_early: overlap with the end of the kernel ahead (programmatic
    dependent launch, Hopper and later).
    """
    num_rows = _check_rows(q, tables, lengths)
    _check_pool(q, kv, layer, window)
    num_heads, head_dim = q.shape[-2], q.shape[-1]
    num_kv_heads, block_tokens = kv.shape[2], kv.shape[4]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if out.shape != q.shape or out.dtype != q.dtype or out.stride(-1) != 1:
        raise ValueError(
            f"out must be {q.dtype} {list(q.shape)} with contiguous heads, got {out.dtype} "
            f"{list(out.shape)} of strides {list(out.stride())}"
        )
    if q.numel() == 0:
        return out
    queries = q if q.dim() == 4 else q.view(num_rows, -1, num_heads, head_dim)
    outputs = out if out.dim() == 4 else out.view(num_rows, -1, num_heads, head_dim)
    num_tokens, group = queries.shape[1], num_heads // num_kv_heads
    if tiles is None:
        context = max_context or tables.shape[1] * block_tokens
        tiles = choose_tiles(
            num_rows,
            num_kv_heads=num_kv_heads,
            num_queries=num_tokens * group,
            head_dim=head_dim,
            dtype=q.dtype,
            max_context=context if window is None else min(context, window + num_tokens - 1),
            num_sms=_num_sms(q.device),
        )
    workspace = _check_workspace(workspace, tiles, queries)
    partials = workspace[: workspace.numel() - workspace.numel() // (head_dim + 1)]
    log_sums = workspace[partials.numel() :]
    pool = kv.select(1, layer)
    cut: dict[str, Any] = {
        "TOKENS": num_tokens,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "WINDOW": window,
        "SPLITS": tiles.num_splits,
        "MIN_TILES": tiles.min_tiles,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "LAUNCH_EARLY": launch_early,
    }
    options = {"launch_pdl": True} if launch_early else {}
    num_m_tiles = triton.cdiv(num_tokens * group, tiles.block_m)
    _attend_kernel[(num_kv_heads * num_m_tiles, num_rows, tiles.num_splits)](
        queries,
        pool,
        tables,
        lengths,
        outputs,
        partials,
        log_sums,
        scale * LOG2_E,
        num_kv_heads,
        *queries.stride()[:3],
        *outputs.stride()[:3],
        *pool.stride()[:4],
        tables.stride(0),
        BLOCK_TOKENS=block_tokens,
        BLOCK_M=tiles.block_m,
        WIDEN=q.is_cpu and q.dtype is torch.bfloat16,  # the interpreter's product has no bfloat16
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **cut,
        **options,
    )
    if tiles.num_splits > 1:
        _merge_kernel[(num_rows, num_heads * num_tokens)](
            partials,
            log_sums,
            lengths,
            outputs,
            num_kv_heads,
            *outputs.stride()[:3],
            STEP=min(tiles.num_splits, 16),
            num_warps=4,
            **cut,
            **options,
        )
    return out


def _check_rows(q: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor) -> int:
    """Return R."""
    if q.dim() not in (3, 4) or q.dtype not in DTYPES or q.stride(-1) != 1:
        raise ValueError(
            "q must be [rows, tokens, heads, head_dim] or [rows * tokens, heads, head_dim] of "
            "float32, bfloat16 or float16 with contiguous heads, got "
            f"{q.dtype} {list(q.shape)} of strides {list(q.stride())}"
        )
    for name, tensor, dims in (("tables", tables, 2), ("lengths", lengths, 1)):
        if tensor.dtype is not torch.int32 or tensor.dim() != dims or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be int32 of {dims} dimensions, the last contiguous, got "
                f"{tensor.dtype} {list(tensor.shape)} of strides {list(tensor.stride())}"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {tensor.device}")
    num_rows = lengths.shape[0]
    fits = q.shape[0] == num_rows if q.dim() == 4 else q.shape[0] % max(1, num_rows) == 0
    if tables.shape[0] != num_rows or not fits or (num_rows == 0 and q.shape[0] > 0):
        raise ValueError(
            f"q {list(q.shape)}, tables {list(tables.shape)} and lengths [{num_rows}] disagree "
            "about the number of rows"
        )
    return num_rows


def _check_pool(q: torch.Tensor, kv: torch.Tensor, layer: int, window: int | None) -> None:
    num_heads, head_dim = q.shape[-2], q.shape[-1]
    if kv.dim() != 6 or kv.shape[3] != 2 or kv.shape[5] != head_dim or kv.stride(5) != 1:
        raise ValueError(
            f"the pool must be [blocks, layers, kv_heads, 2, block_tokens, {head_dim}] with "
            f"contiguous heads, got {list(kv.shape)} of strides {list(kv.stride())}"
        )
    if kv.dtype != q.dtype or kv.device != q.device:
        raise ValueError(f"q is {q.dtype} on {q.device}, but the pool is {kv.dtype} on {kv.device}")
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if not 0 <= layer < kv.shape[1]:
        raise ValueError(f"the pool has {kv.shape[1]} layers, so there is no layer {layer}")
    if num_heads % kv.shape[2]:
        raise ValueError(f"{num_heads} query heads cannot share {kv.shape[2]} key-value heads")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")


def _check_workspace(
    workspace: torch.Tensor | None, tiles: DecodeTiles, queries: torch.Tensor
) -> torch.Tensor:
    """Return the part of the workspace that is used."""
    num_rows, num_tokens, num_heads, head_dim = queries.shape
    needed = tiles.workspace_elements(num_rows, num_tokens * num_heads, head_dim)
    if workspace is None:
        return torch.empty(needed, dtype=torch.float32, device=queries.device)
    if (
        workspace.dtype is not torch.float32
        or workspace.dim() != 1
        or not workspace.is_contiguous()
        or workspace.numel() < needed
        or workspace.device != queries.device
    ):
        raise ValueError(
            f"workspace must be contiguous float32 [{needed}] or longer on {queries.device}, got "
            f"{workspace.dtype} {list(workspace.shape)} on {workspace.device}"
        )
    return workspace[:needed]


def _num_sms(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1  # the interpreter runs one program after another
