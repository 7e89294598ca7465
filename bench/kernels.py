"""Time the GPU's kernels at Llama-3-8B's shapes: `python -m paceline.bench.kernels [--output
FILE]`.

Every time is of a CUDA graph with many calls on rotating inputs, larger together than the L2 cache,
divided by the number of calls; the median of several replays. Beside each stand its floor, from the
read and matrix rates that the same run measures, and PyTorch's own operator where there is one,
replayed in turn with it.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from paceline.bench.environment import write_result
from paceline.bench.gpu_rates import Calls, Rates, measure_rates, random_bf16, seconds_in_turn

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 32, 8, 128, 16
PRODUCTS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""N, K of x [M, K] times w [N, K] transposed."""
NUM_ROTATED_BYTES = 512 << 20
"""Several times the L2 cache: no input is still there when its turn comes again."""


def measure_product(name: str, num_rows: int, rates: Rates) -> dict[str, Any]:
    from paceline.kernels.skinny_matmul_triton import skinny_matmul_triton
    from paceline.kernels.skinny_tiles import SkinnyWorkspace, choose_tiles, workspace_size

    num_outputs, inner = PRODUCTS[name]
    num_weights = max(2, NUM_ROTATED_BYTES // (2 * num_outputs * inner))
    weights = [random_bf16(num_outputs, inner) for _ in range(num_weights)]
    x, out = random_bf16(num_rows, inner), random_bf16(num_rows, num_outputs)
    tiles = choose_tiles(num_rows, num_outputs, inner, x.dtype)
    size = workspace_size(num_rows, num_outputs, tiles)
    workspace = SkinnyWorkspace.allocate(*size, device="cuda")

    def ours(weight: torch.Tensor) -> object:
        return skinny_matmul_triton(x, weight, out=out, workspace=workspace, tiles=tiles)

    num_bytes = 2 * (num_outputs * inner + num_rows * (inner + num_outputs))
    return compared(
        [partial(ours, weight) for weight in weights],
        [partial(F.linear, x, weight) for weight in weights],
        rates.floor_s(num_bytes, 2 * num_rows * num_outputs * inner),
    )


def measure_decode_attention(contexts: Sequence[int], rates: Rates) -> Any:
    from paceline.kernels.decode_attention_triton import decode_attention_triton
    from paceline.kernels.decode_shares_triton import share_rows_triton
    from paceline.kernels.decode_tiles import DecodeWorkspace, choose_tiles, workspace_size

    batch, longest = len(contexts), max(contexts)
    num_columns = -(-longest // BLOCK_TOKENS)
    num_bytes = sum(contexts) * 2 * 2 * NUM_KV_HEADS * HEAD_DIM
    num_layers = max(2, NUM_ROTATED_BYTES // num_bytes)
    kv = random_bf16(batch * num_columns, num_layers, NUM_KV_HEADS, 2, BLOCK_TOKENS, HEAD_DIM)
    order = torch.randperm(batch * num_columns, device="cuda", dtype=torch.int32)
    tables = order.view(batch, num_columns)
    lengths = torch.tensor(contexts, device="cuda", dtype=torch.int32)
    q = random_bf16(batch, 1, NUM_HEADS, HEAD_DIM)
    out = torch.empty_like(q)
    tiles = choose_tiles(
        batch,
        num_kv_heads=NUM_KV_HEADS,
        num_queries=NUM_HEADS // NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=q.dtype,
        num_sms=torch.cuda.get_device_properties(0).multi_processor_count,
    )
    size = workspace_size(
        batch,
        num_kv_heads=NUM_KV_HEADS,
        num_queries=NUM_HEADS // NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        tiles=tiles,
    )
    workspace = DecodeWorkspace.allocate(*size, device="cuda")
    shares = share_rows_triton(lengths, tiles, max_length=longest)

    def call(layer: int) -> Callable[[], object]:
        return lambda: decode_attention_triton(
            q,
            kv,
            layer,
            tables,
            lengths,
            HEAD_DIM**-0.5,
            shares=shares,
            out=out,
            workspace=workspace,
            tiles=tiles,
        )

    calls = [call(layer) for layer in range(num_layers)]
    return compared(calls, None, num_bytes / rates.read_bytes_per_s)


def mixed_contexts(batch: int) -> list[int]:
    """Lengths as different as those of a conversation trace: a thousand on average, up to 4,200."""
    lengths = np.random.default_rng(0).lognormal(np.log(740), 0.9, batch)
    return [int(length) for length in lengths.clip(16, 4200)]


def measure_prefill_attention(num_tokens: int, rates: Rates) -> Any:
    from paceline.kernels.prefill_attention_triton import prefill_attention_triton
    from paceline.kernels.prefill_tiles import (
        choose_tiles,
        is_faster_specialized,
        make_tile_table,
        why_not_specialized,
    )

    num_blocks = num_tokens // BLOCK_TOKENS
    kv = random_bf16(num_blocks, 2, NUM_KV_HEADS, 2, BLOCK_TOKENS, HEAD_DIM)
    tables = torch.randperm(num_blocks, device="cuda", dtype=torch.int32).view(1, -1)
    lengths = torch.tensor([num_tokens], device="cuda", dtype=torch.int32)
    offsets = torch.tensor([0, num_tokens], device="cuda", dtype=torch.int32)
    q = random_bf16(num_tokens, NUM_HEADS, HEAD_DIM)
    out = torch.empty_like(q)
    tiles = choose_tiles(
        NUM_HEADS,
        NUM_KV_HEADS,
        HEAD_DIM,
        q.dtype,
        num_tokens,
        specialized=why_not_specialized(kv) is None
        and is_faster_specialized(num_tokens, num_tokens),
    )
    planned = make_tile_table(np.zeros(1, np.int32), np.array([num_tokens], np.int32), tiles)
    table = planned._replace(entries=planned.entries.to("cuda"))
    k = random_bf16(1, NUM_HEADS, num_tokens, HEAD_DIM)

    def ours() -> object:
        return prefill_attention_triton(
            q, kv, 0, tables, lengths, offsets, table, HEAD_DIM**-0.5, out=out
        )

    def theirs() -> object:
        return F.scaled_dot_product_attention(k, k, k, is_causal=True)

    flops = 2.0 * NUM_HEADS * HEAD_DIM * num_tokens**2
    result = compared([ours] * 10, [theirs] * 10, flops / rates.matrix_flop_per_s)
    return result | {"tflop_per_s": flops / result["us"] / 1e6}


def measure_small_kernels(rates: Rates) -> dict[str, Any]:
    from paceline.bench.small_kernels import Shape, small_kernel_cases

    results = {}
    for name, make in small_kernel_cases(Shape(), (1, 8, 64, 1024, 8192), (1, 8, 64, 256), "cuda"):
        case = make()
        results[name] = compared(case.ours, case.theirs, rates.floor_s(case.num_bytes, 0))
        del case
        torch.cuda.empty_cache()
    return results


def compared(ours: Calls, theirs: Calls | None, floor_s: float) -> dict[str, Any]:
    """Time both in turn, if there is another side."""
    seconds, *torch_seconds = seconds_in_turn(ours, theirs) if theirs else seconds_in_turn(ours)
    return {
        "us": 1e6 * seconds,
        "torch_us": 1e6 * torch_seconds[0] if torch_seconds else None,
        "floor_us": 1e6 * floor_s,
        "over_floor": seconds / floor_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="file to write; default: standard output")
    options = parser.parse_args()
    torch.manual_seed(0)
    rates = measure_rates()
    points = [(1, 1024), (8, 1024), (64, 1024), (256, 1024), (1, 8192), (8, 8192), (64, 8192)]
    contexts = {f"{batch} x {context}": [context] * batch for batch, context in points}
    contexts |= {f"{batch} x mixed": mixed_contexts(batch) for batch in (16, 64, 128)}
    contexts["64 x one of 8K"] = [500] * 63 + [8192]
    result = {
        "gpu": torch.cuda.get_device_name(),
        **rates._asdict(),
        "products": {
            f"M={m}": {name: measure_product(name, m, rates) for name in PRODUCTS}
            for m in (1, 8, 16, 64)
        },
        "decode_attention": {
            name: measure_decode_attention(lengths, rates) for name, lengths in contexts.items()
        },
        "prefill_attention": {
            str(n): measure_prefill_attention(n, rates) for n in (1024, 2048, 8192, 32768)
        },
        "small": measure_small_kernels(rates),
    }
    write_result(options.output, "kernels", {"block_tokens": BLOCK_TOKENS, "seed": 0}, result)


if __name__ == "__main__":
    main()
