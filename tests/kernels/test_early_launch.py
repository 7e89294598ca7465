"""A chain of kernels that start while the one ahead ends gives the bits of one that does not.

Programmatic dependent launch is there on NVIDIA GPUs from Hopper on, so CI does not run this.
"""

import dataclasses

import pytest
import torch
from decode_cut import even_tiles
from triton_device import device

from paceline.kernels.decode_attention_triton import rope_decode_attention_triton
from paceline.kernels.decode_shares_triton import share_rows_triton
from paceline.kernels.decode_tiles import DecodeWorkspace
from paceline.kernels.rms_norm_triton import rms_norm_triton
from paceline.kernels.rope_kv_write_triton import rope_cos_sin
from paceline.kernels.skinny_matmul_triton import skinny_matmul_triton
from paceline.kernels.skinny_tiles import SkinnyTiles, SkinnyWorkspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        device() != "cuda" or torch.cuda.get_device_capability() < (9, 0),
        reason="needs a Hopper GPU or later",
    ),
]
HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 8, 2, 64, 16
HIDDEN, QKV, INNER = HEADS * HEAD_DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM, 1536
NUM_LAYERS, CONTEXT = 6, 300


class Chain:
    """Layers as the engine launches them, on buffers that every layer uses again."""

    def __init__(self, num_rows: int) -> None:
        torch.manual_seed(num_rows)
        self.num_rows = num_rows

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * scale

        self.norm = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.qkv = [normal(QKV, HIDDEN, scale=0.05) for _ in range(NUM_LAYERS)]
        self.o = [normal(HIDDEN, HIDDEN, scale=0.05) for _ in range(NUM_LAYERS)]
        self.gate_up = [normal(2 * INNER, HIDDEN, scale=0.05) for _ in range(NUM_LAYERS)]
        self.down = [normal(HIDDEN, INNER, scale=0.05) for _ in range(NUM_LAYERS)]
        columns = -(-CONTEXT // BLOCK_TOKENS)
        self.kv = normal(num_rows * columns, NUM_LAYERS, KV_HEADS, 2, BLOCK_TOKENS, HEAD_DIM)
        self.first_kv = self.kv.clone()
        blocks = torch.randperm(num_rows * columns, dtype=torch.int32, device="cuda")
        self.tables = blocks.view(num_rows, columns)
        self.lengths = torch.full((num_rows,), CONTEXT, dtype=torch.int32, device="cuda")
        frequencies = 1.0 / 10_000 ** (torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM)
        self.cos_sin = rope_cos_sin(CONTEXT, frequencies, 1.0)
        self.workspace = SkinnyWorkspace.allocate(4 * num_rows * 2 * INNER, 512, "cuda")
        self.attention_workspace = DecodeWorkspace.allocate(1 << 22, 1 << 10, "cuda")

    def begin(self, seed: int) -> None:
        """Set the pool and every row's length; the newest tokens are not in the pool."""
        random = torch.Generator().manual_seed(seed)
        lengths = torch.randint(
            1, CONTEXT + 1, (self.num_rows,), dtype=torch.int32, generator=random
        )
        lengths[0] = CONTEXT - seed
        self.lengths.copy_(lengths)
        self.kv.copy_(self.first_kv)
        places = (self.lengths - 1).long()
        rows = torch.arange(self.num_rows, device="cuda")
        blocks = self.tables[rows, places // BLOCK_TOKENS].long()
        self.kv[blocks, :, :, :, places % BLOCK_TOKENS] = float("nan")

    def run(
        self, x: torch.Tensor, early: bool, prefetch: int = 0, num_shares: int = 8
    ) -> torch.Tensor:
        def product(
            x: torch.Tensor,
            weight: torch.Tensor,
            residual: torch.Tensor | None = None,
            gated: bool = False,
        ) -> torch.Tensor:
            product_tiles = SkinnyTiles(
                max(16, self.num_rows), 64, 64, 1 if gated else 2, num_stages=3, weight_first=True
            )
            if early:
                product_tiles = dataclasses.replace(
                    product_tiles, launch_early=True, prefetch=prefetch
                )
            return skinny_matmul_triton(
                x,
                weight,
                gated=gated,
                residual=residual,
                out=residual,
                workspace=self.workspace,
                tiles=product_tiles,
            )

        tiles = even_tiles(16, 32, num_shares)
        shares = share_rows_triton(self.lengths, tiles, max_length=CONTEXT)
        stream = x.clone()  # not launched early: the shares are there before any attention
        for layer in range(NUM_LAYERS):
            x = rms_norm_triton(stream, self.norm, 1e-5, launch_early=early)
            qkv = product(x, self.qkv[layer])
            x = rope_decode_attention_triton(
                qkv,
                self.cos_sin,
                self.kv,
                layer,
                self.tables,
                self.lengths,
                HEAD_DIM**-0.5,
                num_heads=HEADS,
                shares=shares,
                tiles=tiles,
                workspace=self.attention_workspace,
                launch_early=early,
            ).view(self.num_rows, -1)
            product(x, self.o[layer], residual=stream)
            x = rms_norm_triton(stream, self.norm, 1e-5, launch_early=early)
            x = product(x, self.gate_up[layer], gated=True)
            product(x, self.down[layer], residual=stream)
        return stream


@pytest.mark.parametrize("num_shares", [1, 8])
@pytest.mark.parametrize("prefetch", [0, 64, 256])
@pytest.mark.parametrize("num_rows", [1, 16, 64])
def test_a_captured_chain_gives_the_same_bits_whatever_overlaps(
    num_rows: int, prefetch: int, num_shares: int
) -> None:
    chain = Chain(num_rows)
    static = torch.zeros((num_rows, HIDDEN), device="cuda", dtype=torch.bfloat16)
    chain.run(static, True, prefetch, num_shares)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain.run(static, True, prefetch, num_shares)
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn((num_rows, HIDDEN), device="cuda", dtype=torch.bfloat16)
        chain.begin(seed)
        expected, expected_kv = chain.run(x, False, num_shares=num_shares), chain.kv.clone()
        chain.begin(seed)
        static.copy_(x)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected), f"input {seed}"
        assert torch.equal(chain.kv, expected_kv), f"input {seed}"
        assert bool(expected.isfinite().all())
        assert not chain.attention_workspace.counters.any()
