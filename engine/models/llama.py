"""The Llama family: Llama, Mistral, Qwen2, Qwen3, SmolLM.

A pre-norm decoder with gated MLP and rotary positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from paceline.engine.model_config import ModelConfig
from paceline.engine.parallel import ParallelContext
from paceline.engine.rope import inverse_frequencies
from paceline.engine.step_batch import StepBatch
from paceline.kernels.decode_attention import decode_attention
from paceline.kernels.prefill_attention import prefill_attention
from paceline.kernels.rms_norm import add_rms_norm, rms_norm
from paceline.kernels.rope_kv_write import rope_kv_write, rope_tables
from paceline.kernels.silu_mul import silu_mul
from paceline.kernels.skinny_matmul import skinny_matmul


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One layer of one rank. Products are [out, in]."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    """Query heads, key heads, value heads."""
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class LlamaModel:
    """Compute logits from a StepBatch, writing the new tokens' keys and values into the pool."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        parallel: ParallelContext = ParallelContext(),  # noqa: B008 (frozen)
    ) -> None:
        """Take the tensors that `engine.weights.tensor_specs` names, sliced for this rank."""
        self._config = config
        self._parallel = parallel
        self._num_heads = parallel.share(config.num_heads, "attention heads")
        self._scale = config.head_dim**-0.5
        self._embedding = weights["model.embed_tokens.weight"]
        self._final_norm = weights["model.norm.weight"]
        self._head = weights.get("lm_head.weight", self._embedding)
        self._layers = [_layer_weights(weights, layer) for layer in range(config.num_layers)]
        self._inverse_frequencies = inverse_frequencies(config.rope, config.head_dim)
        self.windows = frozenset(config.windows)

    def forward(self, batch: StepBatch, kv: torch.Tensor) -> torch.Tensor:
        """Return the logits of the sampled positions, float32 [S, vocab_size].

        kv: the pool's view [blocks, layers, kv_heads, 2, block_tokens, head_dim]; written in place.
        """
        eps = self._config.rms_norm_eps
        residual = F.embedding(batch.token_ids, self._embedding)
        cos, sin = rope_tables(
            batch.positions,
            self._inverse_frequencies,
            self._config.rope.attention_factor,
            residual.dtype,
        )
        rows = batch.kv_rows.clone()
        rows_a_layer = 2 * kv.shape[2] * kv.shape[4]
        x = rms_norm(residual, self._layers[0].input_norm, eps)
        last = len(self._layers) - 1
        for number, layer in enumerate(self._layers):
            x = self._attention(layer, number, x, batch, cos, sin, kv, rows)
            rows += rows_a_layer
            if number == last and batch.sample_positions is not None:
                # Only the sampled tokens matter from here on.
                x = x.index_select(0, batch.sample_positions)
                residual = residual.index_select(0, batch.sample_positions)
            x = add_rms_norm(x, residual, layer.post_norm, eps)
            x = silu_mul(skinny_matmul(x, layer.gate_up, layer.gate_up_bias))
            x = self._parallel.all_reduce(skinny_matmul(x, layer.down, layer.down_bias))
            norm = self._final_norm if number == last else self._layers[number + 1].input_norm
            x = add_rms_norm(x, residual, norm, eps)
        return skinny_matmul(x, self._head).to(torch.float32)

    def _attention(
        self,
        layer: LayerWeights,
        number: int,
        x: torch.Tensor,
        batch: StepBatch,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        qkv = skinny_matmul(x, layer.qkv, layer.qkv_bias)
        q = rope_kv_write(
            qkv,
            cos,
            sin,
            kv,
            rows,
            num_heads=self._num_heads,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=self._config.rms_norm_eps,
        )
        window = self._config.windows[number]
        decode = batch.decode
        if decode is not None and decode.tokens is None:
            output = decode_attention(q, kv, number, decode.spans[window], self._scale)
        else:
            output = q.new_empty(q.shape)
            if decode is not None and decode.tokens is not None:
                output[decode.tokens] = decode_attention(
                    q[decode.tokens], kv, number, decode.spans[window], self._scale
                )
            for row in batch.prefill:
                output[row.first : row.end] = prefill_attention(
                    q[row.first : row.end], kv, number, row.contexts[window], self._scale
                )
        product = skinny_matmul(output.view(x.shape[0], -1), layer.o, layer.o_bias)
        return self._parallel.all_reduce(product)


def _layer_weights(weights: Mapping[str, torch.Tensor], number: int) -> LayerWeights:
    prefix = f"model.layers.{number}"
    return LayerWeights(
        input_norm=weights[f"{prefix}.input_layernorm.weight"],
        qkv=weights[f"{prefix}.self_attn.qkv_proj.weight"],
        qkv_bias=weights.get(f"{prefix}.self_attn.qkv_proj.bias"),
        q_norm=weights.get(f"{prefix}.self_attn.q_norm.weight"),
        k_norm=weights.get(f"{prefix}.self_attn.k_norm.weight"),
        o=weights[f"{prefix}.self_attn.o_proj.weight"],
        o_bias=weights.get(f"{prefix}.self_attn.o_proj.bias"),
        post_norm=weights[f"{prefix}.post_attention_layernorm.weight"],
        gate_up=weights[f"{prefix}.mlp.gate_up_proj.weight"],
        gate_up_bias=weights.get(f"{prefix}.mlp.gate_up_proj.bias"),
        down=weights[f"{prefix}.mlp.down_proj.weight"],
        down_bias=weights.get(f"{prefix}.mlp.down_proj.bias"),
    )
