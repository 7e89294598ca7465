"""The operations of one step on a GPU; see `paceline.engine.step_kernels`.

Products of few rows are Triton's (reading the weight is their time), larger ones cuBLAS's. Rows of
one token that lead the step are rotated, written and attended by one kernel, since a step of such
rows takes as long as its number of kernels. The others need one to rotate and write all of their
tokens before the prefill kernel reads them.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from paceline.engine.model_config import ModelConfig
from paceline.engine.rope import inverse_frequencies
from paceline.errors import UnsupportedModelError
from paceline.kernels.decode_attention_triton import MAX_HEAD_DIM, rope_decode_attention_triton
from paceline.kernels.decode_shares_triton import DecodeShares, share_rows_triton
from paceline.kernels.decode_tiles import DecodeTiles, DecodeWorkspace
from paceline.kernels.decode_tiles import choose_tiles as choose_decode_tiles
from paceline.kernels.decode_tiles import workspace_size as decode_workspace_size
from paceline.kernels.prefill_attention_triton import prefill_attention_triton
from paceline.kernels.prefill_tiles import TileTable
from paceline.kernels.rms_norm_triton import rms_norm_triton
from paceline.kernels.rope_kv_write_triton import rope_cos_sin, rope_kv_write_triton
from paceline.kernels.silu_mul_triton import silu_mul_triton
from paceline.kernels.skinny_matmul_triton import skinny_matmul_triton
from paceline.kernels.skinny_tiles import (
    SkinnyTiles,
    SkinnyWorkspace,
    choose_prefetch,
    choose_tiles,
    workspace_size,
)

PREFETCH_BYTES = 8 << 20
"""Of a product's weight, fetched into the L2 while the kernel ahead still runs."""
MAX_SKINNY_ROWS = 64
"""Above this cuBLAS is at least as fast: bench/results/kernels_h200.json."""


@dataclass(frozen=True, slots=True, eq=False)
class GpuBatch:
    """A step's rows on the device. Rows of one token lead: decode takes them, prefill the rest."""

    token_ids: torch.Tensor
    """int32 [T]"""
    positions: torch.Tensor
    """int32 [T] within their sequences"""
    prompt_rows: torch.Tensor
    """int32 [T] rows of the tokens that do not decode; -1: no such token"""
    row_tables: torch.Tensor
    """int32 [R, columns] block ids"""
    lengths: torch.Tensor
    """int32 [R] tokens of the context, the new ones included; 0 pads"""
    offsets: torch.Tensor
    """int32 [R + 1] first token of each row"""
    decode_lengths: torch.Tensor
    """int32 [D]: lengths of the rows that decode, all of which are among the first D; 0: others"""
    decode_shares: Mapping[int | None, DecodeShares]
    """Of decode_lengths, by the layers' windows; see `KernelResources.share_rows`"""
    first_prompt: int
    """Tokens that lead the step and are of no prompt, at least"""
    prefill: TileTable | None
    """Tiles of the rows that do not decode"""
    sample_positions: torch.Tensor | None
    """int32 [S] among the T; None: every token in order"""


class KernelResources:
    """What the kernels of all steps share: rotations of every position, and workspaces."""

    def __init__(
        self,
        config: ModelConfig,
        num_heads: int,
        kv: torch.Tensor,
        *,
        max_model_len: int,
        decode_sizes: Sequence[int],
    ) -> None:
        """Raise UnsupportedModelError for a model that the kernels cannot compute.

        kv: the pool's view. decode_sizes: D that batches may have; the largest is the most.
        """
        if config.head_dim % 8 or config.head_dim > MAX_HEAD_DIM:
            raise UnsupportedModelError(
                f"head_dim is {config.head_dim}; on GPUs it must be a multiple of 8, up to "
                f"{MAX_HEAD_DIM}. Set device to cpu, or serve another model."
            )
        self.config = config
        self.kv = kv
        self.num_heads = num_heads
        self.scale = config.head_dim**-0.5
        self._max_model_len = max_model_len
        self._num_sms = _num_sms(kv.device)
        self._skinny_tiles: dict[tuple[int, int, int, bool], SkinnyTiles] = {}
        self.launch_early = _launches_early(kv.device)
        frequencies = inverse_frequencies(config.rope, config.head_dim).to(kv.device)
        self.cos_sin = rope_cos_sin(max_model_len, frequencies, config.rope.attention_factor)
        self._decode_sizes = sorted(set(decode_sizes))
        self.decode_workspace = self._allocate_decode_workspace()
        self._decode_shares = self._allocate_decode_shares()
        self.skinny_workspace = self._allocate_skinny_workspace()

    def decode_tiles(self, num_rows: int) -> DecodeTiles:
        """Return the tiles for a decode of so many rows: of the next size, which start-up ran."""
        num_kv_heads = self.kv.shape[2]
        return choose_decode_tiles(
            self._decode_sizes[bisect_left(self._decode_sizes, num_rows)],
            num_kv_heads=num_kv_heads,
            num_queries=self.num_heads // num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.kv.dtype,
            num_sms=self._num_sms,
        )

    def share_rows(self, decode_lengths: torch.Tensor) -> Mapping[int | None, DecodeShares]:
        """Launch what cuts the contexts of a step's rows for attention; good until the next step's.

        Ahead of the layers, so that a kernel that does not start early lies between.
        """
        num_rows = len(decode_lengths)
        if num_rows:
            for window, shares in self._decode_shares.items():
                share_rows_triton(
                    decode_lengths,
                    self.decode_tiles(num_rows),
                    window=window,
                    max_length=self._max_model_len,
                    shares=shares,
                )
        return self._decode_shares

    def skinny_tiles(self, num_rows: int, weight: torch.Size, gated: bool) -> SkinnyTiles:
        """Return the tiles for a product of few rows."""
        key = (num_rows, weight[0], weight[1], gated)
        tiles = self._skinny_tiles.get(key)
        if tiles is None:
            num_outputs, inner = weight
            tiles = choose_tiles(num_rows, num_outputs, inner, self.kv.dtype, gated)
            prefetch = choose_prefetch(num_outputs, inner, tiles, self.kv.dtype, PREFETCH_BYTES)
            tiles = dataclasses.replace(tiles, launch_early=self.launch_early, prefetch=prefetch)
            self._skinny_tiles[key] = tiles
        return tiles

    def _allocate_decode_workspace(self) -> DecodeWorkspace:
        num_kv_heads = self.kv.shape[2]
        needed = [
            decode_workspace_size(
                size,
                num_kv_heads=num_kv_heads,
                num_queries=self.num_heads // num_kv_heads,
                head_dim=self.config.head_dim,
                tiles=self.decode_tiles(size),
            )
            for size in self._decode_sizes
        ]
        return DecodeWorkspace.allocate(
            max(partials for partials, _ in needed),
            max(counters for _, counters in needed),
            self.kv.device,
        )

    def _allocate_decode_shares(self) -> dict[int | None, DecodeShares]:
        num_programs = max(self.decode_tiles(n).num_programs(n) for n in self._decode_sizes)
        return {
            window: DecodeShares.allocate(self._decode_sizes[-1], num_programs, self.kv.device)
            for window in set(self.config.windows)
        }

    def _allocate_skinny_workspace(self) -> SkinnyWorkspace:
        config, width = self.config, self.num_heads * self.config.head_dim
        qkv_width = width + 2 * self.kv.shape[2] * config.head_dim
        products = (
            (qkv_width, config.hidden_size, False),
            (config.hidden_size, width, False),
            (2 * config.intermediate_size, config.hidden_size, True),
            (config.hidden_size, config.intermediate_size, False),
            (config.vocab_size, config.hidden_size, False),
        )
        needed = []
        for num_outputs, inner, gated in products:
            for num_rows in range(1, MAX_SKINNY_ROWS + 1):
                tiles = choose_tiles(num_rows, num_outputs, inner, self.kv.dtype, gated)
                needed.append(workspace_size(num_rows, num_outputs, tiles, gated))
        return SkinnyWorkspace.allocate(
            max(size for size, _ in needed), max(tiles for _, tiles in needed), self.kv.device
        )


class GpuStepKernels:
    """Implements `StepKernels` for one step, or for all steps of one captured shape."""

    def __init__(self, resources: KernelResources, batch: GpuBatch) -> None:
        self._resources = resources
        self._batch = batch
        self._eps = resources.config.rms_norm_eps

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        return F.embedding(self._batch.token_ids, table)

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        norm: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if norm is not None:
            x = self._normed(x, norm)
        if x.shape[0] <= MAX_SKINNY_ROWS:
            return self._skinny(x, weight, bias, residual, gated=False)
        if residual is None:
            return F.linear(x, weight, bias)
        if bias is None:
            return residual.addmm_(x, weight.t())
        return residual.add_(F.linear(x, weight, bias))

    def gated_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: torch.Tensor
    ) -> torch.Tensor:
        x = self._normed(x, norm)
        if x.shape[0] <= MAX_SKINNY_ROWS:
            return self._skinny(x, weight, bias, None, gated=True)
        return silu_mul_triton(F.linear(x, weight, bias))

    def _skinny(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        gated: bool,
    ) -> torch.Tensor:
        resources = self._resources
        return skinny_matmul_triton(
            x,
            weight,
            bias,
            gated=gated,
            residual=residual,
            out=residual,
            workspace=resources.skinny_workspace,
            tiles=resources.skinny_tiles(x.shape[0], weight.shape, gated),
        )

    def _normed(self, x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return rms_norm_triton(x, norm, self._eps, launch_early=self._resources.launch_early)

    def attend(
        self,
        qkv: torch.Tensor,
        layer: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        resources, num_decode = self._resources, len(self._batch.decode_lengths)
        shape = (qkv.shape[0], resources.num_heads, resources.config.head_dim)
        output = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
        if num_decode:
            self._decode(qkv[:num_decode], layer, q_norm, k_norm, output[:num_decode])
        if self._batch.prefill is not None:
            self._prefill(qkv, layer, q_norm, k_norm, self._batch.prefill, output)
        return output.view(qkv.shape[0], -1)

    def _decode(
        self,
        qkv: torch.Tensor,
        layer: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Attend those tokens of qkv, one of each of the rows that lead the step, that decode."""
        resources, batch = self._resources, self._batch
        window = resources.config.windows[layer]
        rope_decode_attention_triton(
            qkv,
            resources.cos_sin,
            resources.kv,
            layer,
            batch.row_tables[: len(batch.decode_lengths)],
            batch.decode_lengths,
            resources.scale,
            num_heads=resources.num_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=self._eps,
            window=window,
            shares=batch.decode_shares[window],
            out=output,
            workspace=resources.decode_workspace,
            tiles=resources.decode_tiles(len(batch.decode_lengths)),
            launch_early=resources.launch_early,
        )

    def _prefill(
        self,
        qkv: torch.Tensor,
        layer: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        table: TileTable,
        output: torch.Tensor,
    ) -> None:
        """Attend the tokens that do not decode; of both, output and the tiles count all."""
        resources, batch = self._resources, self._batch
        first = batch.first_prompt
        rope_kv_write_triton(
            qkv[first:],
            resources.cos_sin,
            batch.positions[first:],
            batch.prompt_rows[first:],
            batch.row_tables,
            resources.kv,
            layer,
            num_heads=resources.num_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=self._eps,
            launch_early=resources.launch_early,
        )
        num_heads, head_dim = output.shape[1:]
        prefill_attention_triton(
            qkv[:, : num_heads * head_dim].view(output.shape),
            resources.kv,
            layer,
            batch.row_tables,
            batch.lengths,
            batch.offsets,
            table,
            resources.scale,
            window=resources.config.windows[layer],
            out=output,
        )

    def take_sampled(self, x: torch.Tensor) -> torch.Tensor:
        positions = self._batch.sample_positions
        return x if positions is None else x.index_select(0, positions)


def _num_sms(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1  # the interpreter runs one program after another


def _launches_early(device: torch.device) -> bool:
    """Whether kernels may start while the one ahead ends: programmatic launch, from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
