"""Launch the kernel of `paceline.kernels.decode_attention_kernel`: with rotation or without it."""

from typing import Any

import torch
import triton

from paceline.kernels.decode_attention_kernel import attend_kernel
from paceline.kernels.decode_shares_triton import DecodeShares, check_shares, share_rows_triton
from paceline.kernels.decode_tiles import (
    DecodeTiles,
    DecodeWorkspace,
    choose_tiles,
    workspace_size,
)
from paceline.kernels.launch import launch
from paceline.kernels.rope_kv_write_triton import check_rotation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
LOG2_E = 1.4426950408889634


def decode_attention_triton(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    shares: DecodeShares | None = None,
    out: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    tiles: DecodeTiles | None = None,
    launch_early: bool = False,
) -> torch.Tensor:
    """Return the attention output, of q's shape and dtype.

    The new tokens' own keys and values must be in the pool already, and every row's table must
    cover its length.

    q: [R, T, num_heads, head_dim] or, with rows one after another, [R * T, num_heads, head_dim];
    only the last dimension must be contiguous. shares: of these lengths, with the same tiles and
    window; None has another kernel make them, and this one wait for it. workspace: None allocates
    one, which costs a fill kernel. launch_early: overlap with the end of the kernels ahead
    (programmatic dependent launch, Hopper and later); neither the one directly ahead nor one that
    was itself launched early may write `lengths`, `tables` or `shares`.
    """
    num_rows = _check_rows(q, tables, lengths)
    _check_pool(q, kv, layer, window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    _check_out(q, out)
    if q.numel() == 0:
        return out
    num_heads = q.shape[-2]
    _launch(
        q if q.dim() == 4 else q.view(num_rows, -1, num_heads, q.shape[-1]),
        kv,
        layer,
        tables,
        lengths,
        scale,
        window=window,
        shares=shares,
        out=out if out.dim() == 4 else out.view(num_rows, -1, num_heads, q.shape[-1]),
        workspace=workspace,
        tiles=tiles,
        launch_early=launch_early,
    )
    return out


def rope_decode_attention_triton(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    window: int | None = None,
    shares: DecodeShares | None = None,
    out: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    tiles: DecodeTiles | None = None,
    launch_early: bool = False,
) -> torch.Tensor:
    """Write each row's newest token into the pool; return its attention [R, num_heads, head_dim].

    qkv: [R, (num_heads + 2 num_kv_heads) * head_dim], the products of the tokens lengths - 1; read
    only. cos_sin: of `rope_cos_sin`. A row that is longer than cos_sin or than its table does
    nothing, as one of length 0: `shares` must have been made with that `max_length`. No two rows
    may write to one block. The rest is as in `decode_attention_triton`.
    """
    num_kv_heads, head_dim = kv.shape[2], kv.shape[5]
    num_rows, width = qkv.shape[0], (num_heads + 2 * num_kv_heads) * head_dim
    if list(qkv.shape) != [num_rows, width] or qkv.stride(1) != 1 or head_dim % 2:
        raise ValueError(
            f"qkv must be [rows, {width}] with contiguous rows of heads of an even size, got "
            f"{list(qkv.shape)} of strides {list(qkv.stride())} for heads of {head_dim}"
        )
    q = qkv[:, : num_heads * head_dim].view(num_rows, 1, num_heads, head_dim)
    _check_rows(q, tables, lengths)
    _check_pool(q, kv, layer, window)
    check_rotation(head_dim, cos_sin, q_norm, k_norm)
    if out is None:
        out = torch.empty((num_rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    _check_out(q.squeeze(1), out)
    if num_rows:
        _launch(
            q,
            kv,
            layer,
            tables,
            lengths,
            scale,
            cos_sin=cos_sin,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            window=window,
            shares=shares,
            out=out.unsqueeze(1),
            workspace=workspace,
            tiles=tiles,
            launch_early=launch_early,
        )
    return out


def _launch(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    cos_sin: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    window: int | None,
    shares: DecodeShares | None,
    out: torch.Tensor,
    workspace: DecodeWorkspace | None,
    tiles: DecodeTiles | None,
    launch_early: bool,
) -> None:
    """Launch for checked q and out, [R, T, num_heads, head_dim]."""
    num_rows, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_tokens = kv.shape[2], kv.shape[4]
    num_queries = num_tokens * (num_heads // num_kv_heads)
    max_length = tables.shape[1] * block_tokens
    if cos_sin is not None:
        max_length = min(max_length, cos_sin.shape[0])
    if tiles is None:
        tiles = choose_tiles(
            num_rows,
            num_kv_heads=num_kv_heads,
            num_queries=num_queries,
            head_dim=head_dim,
            dtype=q.dtype,
            num_sms=_num_sms(q.device),
        )
    if shares is None:
        launch_early = False  # it would begin to read them before they are there
        shares = share_rows_triton(
            lengths, tiles, num_tokens=num_tokens, window=window, max_length=max_length
        )
    num_programs = tiles.num_programs(num_rows)
    check_shares(shares, num_rows, num_programs, q.device)
    num_partials, num_counters = workspace_size(
        num_rows,
        num_kv_heads=num_kv_heads,
        num_queries=num_queries,
        head_dim=head_dim,
        tiles=tiles,
    )
    if workspace is None:
        workspace = DecodeWorkspace.allocate(num_partials, num_counters, q.device)
    _check_workspace(workspace, num_partials, num_counters, q.device)
    num_values = num_partials - num_partials // (head_dim + 1)
    pool = kv.select(1, layer)
    block_d = max(16, triton.next_power_of_2(head_dim))
    # Without the option's name where it is off: the interpreter and old GPUs know none.
    options: dict[str, Any] = {"launch_pdl": True} if launch_early else {}
    grid = (num_kv_heads * tiles.num_m_tiles(num_queries), num_programs)
    launch(attend_kernel, grid)(
        q,
        pool,
        tables,
        lengths,
        *shares,
        out,
        workspace.partials,
        workspace.partials[num_values:],
        workspace.counters,
        cos_sin,
        q_norm,
        k_norm,
        eps,
        0 if cos_sin is None else cos_sin.stride(0),
        scale * LOG2_E,
        num_kv_heads,
        *q.stride()[:3],
        *out.stride()[:3],
        *pool.stride()[:4],
        tables.stride(0),
        TOKENS=num_tokens,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=block_tokens,
        WINDOW=window,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_D=block_d,
        WIDEN=q.is_cpu and q.dtype is torch.bfloat16,  # the interpreter's product has no bfloat16
        LAUNCH_EARLY=launch_early,
        # Launches of many programs hide each other's waits.
        PREFETCH=launch_early and grid[0] * grid[1] <= _num_sms(q.device),
        ONE_ROW=tiles.one_row,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **_merge_sizes(tiles, num_queries, block_d),
        **options,
    )


def _merge_sizes(tiles: DecodeTiles, num_queries: int, block_d: int) -> dict[str, int]:
    """Return how many queries and parts a merge loads at once: 128 registers of each thread."""
    kept = tiles.kept_queries(num_queries)
    step = max(1, 128 * 32 * tiles.num_warps // (kept * block_d))
    return {"KEPT": kept, "MERGE_STEP": min(triton.next_power_of_2(tiles.num_shares), step)}


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


def _check_out(q: torch.Tensor, out: torch.Tensor) -> None:
    if out.shape != q.shape or out.dtype != q.dtype or out.stride(-1) != 1:
        raise ValueError(
            f"out must be {q.dtype} {list(q.shape)} with contiguous heads, got {out.dtype} "
            f"{list(out.shape)} of strides {list(out.stride())}"
        )


def _check_workspace(
    workspace: DecodeWorkspace, num_partials: int, num_counters: int, device: torch.device
) -> None:
    for name, tensor, dtype, needed in (
        ("partials", workspace.partials, torch.float32, num_partials),
        ("counters", workspace.counters, torch.int32, num_counters),
    ):
        if (
            tensor.dtype is not dtype
            or tensor.dim() != 1
            or not tensor.is_contiguous()
            or tensor.numel() < needed
            or tensor.device != device
        ):
            raise ValueError(
                f"the workspace's {name} must be contiguous {dtype} [{needed}] or longer on "
                f"{device}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def _num_sms(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1  # the interpreter runs one program after another
