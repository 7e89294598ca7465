"""What a model is made of, as it sees it: the operations of one step, whatever the device.

cpu/step_kernels    PyTorch's operators, over a plan resolved on the CPU
gpu/step_kernels    Triton kernels, over a plan resolved on the GPU
"""

from typing import Protocol

import torch


class StepKernels(Protocol):
    """Operations over the T tokens of one step, in row order. Called in the order of the layers."""

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        """Return the tokens' rows of the table, [T, hidden]."""

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        norm: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return x W^T + b, of the rows' RMS norm with this weight if there is one.

        With `residual` that is added to it in place, and it is what is returned.
        """

    def gated_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: torch.Tensor
    ) -> torch.Tensor:
        """Return silu(g) * u, where g and u are the halves of norm(x) W^T + b."""

    def attend(
        self,
        qkv: torch.Tensor,
        layer: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """Rotate queries and keys, write keys and values into the pool, attend to the contexts.

        qkv: [T, (num_heads + 2 num_kv_heads) head_dim]; may be overwritten. Returns [T, num_heads *
        head_dim].
        """

    def take_sampled(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows whose logits are sampled, [S, ...]: `x` itself if these are all rows."""


class StepModel(Protocol):
    """A model as runners see it."""

    def forward(self, kernels: StepKernels) -> torch.Tensor:
        """Write the step's keys and values; return logits [S, vocab_size]."""
