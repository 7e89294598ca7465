"""Gated activation: y = silu(gate) * up.

gate_up [T, 2 I], gate first -> y [T, I]
"""

import torch
import torch.nn.functional as F


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu of the first half times the second half, contiguous."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up must be of one size, got {gate_up.shape[-1]} together")
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
