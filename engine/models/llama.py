"""The Llama family: Llama, Mistral, Qwen2, Qwen3, SmolLM.

A pre-norm decoder with gated MLP and rotary positions.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from paceline.engine.model_config import ModelConfig
from paceline.engine.parallel import ParallelContext
from paceline.engine.step_kernels import StepKernels


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
    """Compute logits, writing the new tokens' keys and values into the pool."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        parallel: ParallelContext = ParallelContext(),  # noqa: B008 (frozen)
    ) -> None:
        """Take the tensors that `engine.weights.tensor_specs` names, sliced for this rank."""
        parallel.share(config.num_heads, "attention heads")
        self._parallel = parallel
        self._embedding = weights["model.embed_tokens.weight"]
        self._final_norm = weights["model.norm.weight"]
        self._head = weights.get("lm_head.weight", self._embedding)
        self._layers = [_layer_weights(weights, layer) for layer in range(config.num_layers)]

    def shortened(self, num_layers: int) -> "LlamaModel":
        """Return a model of the first layers, on the same weights."""
        short = copy.copy(self)
        short._layers = self._layers[:num_layers]
        return short

    def forward(self, kernels: StepKernels) -> torch.Tensor:
        """Return the logits of the sampled positions, [S, vocab_size], in the weights' dtype."""
        stream = kernels.embed(self._embedding)
        last = len(self._layers) - 1
        for number, layer in enumerate(self._layers):
            qkv = kernels.linear(stream, layer.qkv, layer.qkv_bias, norm=layer.input_norm)
            x = kernels.attend(qkv, number, layer.q_norm, layer.k_norm)
            if number == last:  # only the sampled tokens matter from here on
                x, stream = kernels.take_sampled(x), kernels.take_sampled(stream)
            stream = self._add(kernels, stream, x, layer.o, layer.o_bias)
            x = kernels.gated_linear(stream, layer.gate_up, layer.gate_up_bias, layer.post_norm)
            stream = self._add(kernels, stream, x, layer.down, layer.down_bias)
        return kernels.linear(stream, self._head, None, norm=self._final_norm)

    def _add(
        self,
        kernels: StepKernels,
        stream: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Add a product, of which each rank has a part, to the residual stream."""
        if self._parallel.size == 1:
            return kernels.linear(x, weight, bias, residual=stream)
        return stream.add_(self._parallel.all_reduce(kernels.linear(x, weight, bias)))


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
