"""Move whole KV blocks in Triton: copy, gather, scatter (reference: kernels.block_copy).

    block_copy_triton      into[targets[k]] = blocks[sources[k]]     copy-on-write, pool to pool
    block_gather_triton    staging[k] = blocks[ids[k]]               before a transfer
    block_scatter_triton   blocks[ids[k]] = staging[k]               after one
    k < count; blocks, into, staging uint8 [n, num_bytes]; ids int32 or int64 [K]

`blocks` may be a slice of a pool's columns, a range of layers say: rows lie at any stride. `count`
is a tensor on the device, so that one captured launch serves any number of blocks up to K.

    block 0 |chunk 0|chunk 1|..|   a fixed number of programs shares out the chunks of all `count`
    block 1 |chunk n|..        |   blocks: program p takes chunks p, p + programs, p + 2 programs ..
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from paceline.kernels.launch import launch

WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16))
"""Widest first; a thread moves two or more at once where addresses allow it."""


class Tile(NamedTuple):
    """How the work is cut."""

    chunk_words: int
    num_warps: int
    num_programs: int


def choose_tile(device: torch.device, row_words: int) -> Tile:
    """Choose by the device and a block's size. Times: bench/results/kernels_h200.json.

    A transfer that should leave the GPU to others can be given fewer programs.
    """
    if device.type != "cuda":
        return Tile(min(1024, triton.next_power_of_2(row_words)), 4, 4)
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Tile(min(2048, triton.next_power_of_2(row_words)), 8, 4 * num_processors)


@triton.jit(do_not_specialize=["num_ids"])
def _move_blocks_kernel(  # type: ignore[no-untyped-def]
    source_ptr,
    target_ptr,
    source_ids_ptr,
    target_ids_ptr,
    count_ptr,
    num_ids,
    source_stride,
    target_stride,
    row_words,
    HAS_SOURCE_IDS: tl.constexpr,
    HAS_TARGET_IDS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunks = tl.cdiv(row_words, CHUNK)
    count = num_ids
    if HAS_COUNT:
        count = tl.minimum(tl.load(count_ptr).to(tl.int32), num_ids)
    for piece in range(tl.program_id(0), count * chunks, tl.num_programs(0)):
        block = piece // chunks
        words = (piece % chunks) * CHUNK + tl.arange(0, CHUNK)
        inside = words < row_words
        source = block.to(tl.int64)
        if HAS_SOURCE_IDS:
            source = tl.load(source_ids_ptr + block).to(tl.int64)
        target = block.to(tl.int64)
        if HAS_TARGET_IDS:
            target = tl.load(target_ids_ptr + block).to(tl.int64)
        values = tl.load(source_ptr + source * source_stride + words, mask=inside)
        tl.store(target_ptr + target * target_stride + words, values, mask=inside)


def block_copy_triton(
    blocks: torch.Tensor,
    sources: torch.Tensor,
    targets: torch.Tensor,
    *,
    into: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Copy blocks within `blocks`, or to another pool `into`.

    No block may be a target twice, nor both source and target: the order of copies is open.
    count: int32 or int64 of one element, how many ids to take; None: all.
    """
    if sources.shape != targets.shape:
        raise ValueError(
            f"sources {list(sources.shape)} and targets {list(targets.shape)} must be of one length"
        )
    target = blocks if into is None else into
    _launch(blocks, target, sources, targets, count, sources.shape[0], tile)


def block_gather_triton(
    blocks: torch.Tensor,
    ids: torch.Tensor,
    staging: torch.Tensor,
    *,
    count: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Fill staging's first rows with the blocks named; `count` as in `block_copy_triton`."""
    _check_room(staging, ids)
    _launch(blocks, staging, ids, None, count, ids.shape[0], tile)


def block_scatter_triton(
    staging: torch.Tensor,
    blocks: torch.Tensor,
    ids: torch.Tensor,
    *,
    count: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Write staging's first rows to the blocks named, each at most once; `count` as in
    `block_copy_triton`.
    """
    _check_room(staging, ids)
    _launch(staging, blocks, None, ids, count, ids.shape[0], tile)


def _check_room(staging: torch.Tensor, ids: torch.Tensor) -> None:
    if staging.shape[0] < ids.shape[0]:
        raise ValueError(f"staging has {staging.shape[0]} rows for {ids.shape[0]} block ids")


def _launch(
    source: torch.Tensor,
    target: torch.Tensor,
    source_ids: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    count: torch.Tensor | None,
    num_ids: int,
    tile: Tile | None,
) -> None:
    for name, tensor in (("source", source), ("target", target)):
        if tensor.dtype is not torch.uint8 or tensor.dim() != 2 or tensor.stride(1) != 1:
            raise ValueError(
                f"{name} must be uint8 [n, num_bytes] with contiguous rows, got {tensor.dtype} "
                f"{list(tensor.shape)} of strides {list(tensor.stride())}"
            )
    if source.shape[1] != target.shape[1]:
        raise ValueError(
            f"a source block of {source.shape[1]} bytes cannot fill a target of {target.shape[1]}"
        )
    for ids in (source_ids, target_ids):
        if ids is not None and (
            ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 1 or not ids.is_contiguous()
        ):
            raise ValueError(
                f"block ids must be contiguous int32 or int64 [K], got {ids.dtype} "
                f"{list(ids.shape)} of strides {list(ids.stride())}"
            )
    if count is not None and (count.numel() != 1 or count.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"count must be one int32 or int64, got {count.dtype} {list(count.shape)}")
    source, target = _as_words(source, target)
    row_words = source.shape[1]
    if num_ids == 0 or row_words == 0:
        return
    if tile is None:
        tile = choose_tile(source.device, row_words)
    num_pieces = num_ids * triton.cdiv(row_words, tile.chunk_words)
    if num_pieces > 1 << 30:
        raise ValueError(
            f"{num_ids} blocks in chunks of {tile.chunk_words} words are {num_pieces} pieces, and "
            "one launch takes at most 2^30. Move fewer blocks at once."
        )
    launch(_move_blocks_kernel, (min(tile.num_programs, num_pieces),))(
        source,
        target,
        source_ids,
        target_ids,
        count,
        num_ids,
        source.stride(0),
        target.stride(0),
        row_words,
        HAS_SOURCE_IDS=source_ids is not None,
        HAS_TARGET_IDS=target_ids is not None,
        HAS_COUNT=count is not None,
        CHUNK=tile.chunk_words,
        num_warps=tile.num_warps,
    )


def _as_words(source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """View both as the widest words that their addresses, strides and width allow."""
    places = [source.shape[1]]
    for tensor in (source, target):
        places += [tensor.data_ptr(), tensor.stride(0), int(tensor.storage_offset())]
    for width, dtype in WORDS:
        if all(place % width == 0 for place in places):
            return source.view(dtype), target.view(dtype)
    return source, target
