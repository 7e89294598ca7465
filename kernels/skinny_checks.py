"""Refuse with ValueError what `skinny_matmul_triton` cannot do."""

import torch

from paceline.kernels.normed_rows import NormedRows
from paceline.kernels.skinny_tiles import SkinnyTiles, SkinnyWorkspace

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_operands(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool
) -> None:
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


def check_like(name: str, tensor: torch.Tensor, shape: tuple[int, int], x: torch.Tensor) -> None:
    if tensor.shape != shape or tensor.dtype != x.dtype or tensor.stride(1) != 1:
        raise ValueError(
            f"{name} must be {x.dtype} {list(shape)} with elements of a row beside each other, got "
            f"{tensor.dtype} {list(tensor.shape)} of strides {tensor.stride()}"
        )


def check_norms(
    x: torch.Tensor,
    squares: torch.Tensor | None,
    out: torch.Tensor,
    norm: torch.Tensor | None,
    normed: NormedRows | None,
) -> None:
    if squares is not None and (
        squares.dtype != torch.float32
        or squares.dim() != 2
        or squares.shape[1] != x.shape[0]
        or not squares.is_contiguous()
    ):
        raise ValueError(
            f"squares must be contiguous float32 [pieces, {x.shape[0]}], got {squares.dtype} "
            f"{list(squares.shape)}"
        )
    if (norm is None) != (normed is None):
        raise ValueError("norm and normed go together: got one of them")
    if norm is None:
        return
    if norm.shape != out.shape[1:] or norm.dtype != x.dtype or not norm.is_contiguous():
        raise ValueError(
            f"norm must be contiguous {x.dtype} [{out.shape[1]}], got {norm.dtype} "
            f"{list(norm.shape)} of strides {norm.stride()}"
        )
    if x.dtype == torch.float16:
        raise ValueError("rows of float16 cannot be normed here: y * norm may be too large for it")


def check_pieces(normed: NormedRows, tiles: SkinnyTiles, num_rows: int, width: int) -> None:
    rows, squares = normed
    shape = [-(-width // tiles.block_n), num_rows]
    if (
        list(rows.shape) != [num_rows, width]
        or squares is None
        or list(squares.shape) != shape
        or not (rows.is_contiguous() and squares.is_contiguous())
    ):
        raise ValueError(
            f"normed must hold contiguous rows {[num_rows, width]} and squares {shape}, got "
            f"{list(rows.shape)} and {None if squares is None else list(squares.shape)}"
        )


def check_workspace(workspace: SkinnyWorkspace, num_partials: int, num_tiles: int) -> None:
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
