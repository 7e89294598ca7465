"""The operations of one step with PyTorch's operators; see `paceline.engine.step_kernels`."""

import torch
import torch.nn.functional as F

from paceline.engine.cpu.step_batch import StepBatch
from paceline.engine.model_config import ModelConfig
from paceline.engine.rope import inverse_frequencies
from paceline.kernels.decode_attention import decode_attention
from paceline.kernels.prefill_attention import prefill_attention
from paceline.kernels.rms_norm import rms_norm
from paceline.kernels.rope_kv_write import rope_kv_write, rope_tables
from paceline.kernels.silu_mul import silu_mul
from paceline.kernels.skinny_matmul import skinny_matmul


class CpuStepKernels:
    """Implements `StepKernels` for one step; `attend` is called once a layer, in their order."""

    def __init__(self, config: ModelConfig, batch: StepBatch, kv: torch.Tensor) -> None:
        """kv: the pool's view [blocks, layers, kv_heads, 2, block_tokens, head_dim]."""
        self._config = config
        self._batch = batch
        self._kv = kv
        self._scale = config.head_dim**-0.5
        self._cos, self._sin = rope_tables(
            batch.positions,
            inverse_frequencies(config.rope, config.head_dim),
            config.rope.attention_factor,
            kv.dtype,
        )
        # Of the layer that attends next.
        self._kv_rows = batch.kv_rows.clone()
        self._kv_rows_a_layer = 2 * kv.shape[2] * kv.shape[4]

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
            x = rms_norm(x, norm, self._config.rms_norm_eps)
        y = skinny_matmul(x, weight, bias)
        return y if residual is None else residual.add_(y)

    def gated_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: torch.Tensor
    ) -> torch.Tensor:
        return silu_mul(self.linear(x, weight, bias, norm=norm))

    def attend(
        self,
        qkv: torch.Tensor,
        layer: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        _, _, num_kv_heads, _, _, head_dim = self._kv.shape
        q = rope_kv_write(
            qkv,
            self._cos,
            self._sin,
            self._kv,
            self._kv_rows,
            num_heads=qkv.shape[1] // head_dim - 2 * num_kv_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=self._config.rms_norm_eps,
        )
        self._kv_rows += self._kv_rows_a_layer
        window = self._config.windows[layer]
        decode = self._batch.decode
        if decode is not None and decode.tokens is None:
            output = decode_attention(q, self._kv, layer, decode.spans[window], self._scale)
            return output.view(qkv.shape[0], -1)
        output = q.new_empty(q.shape)
        if decode is not None and decode.tokens is not None:
            output[decode.tokens] = decode_attention(
                q[decode.tokens], self._kv, layer, decode.spans[window], self._scale
            )
        for row in self._batch.prefill:
            output[row.first : row.end] = prefill_attention(
                q[row.first : row.end], self._kv, layer, row.contexts[window], self._scale
            )
        return output.view(qkv.shape[0], -1)

    def take_sampled(self, x: torch.Tensor) -> torch.Tensor:
        positions = self._batch.sample_positions
        return x if positions is None else x.index_select(0, positions)
