"""Root-mean-square norm, with the residual stream: h += x, y = h / sqrt(mean(h^2) + eps) * weight.

x, residual [T, H], weight [H]; float32 or bfloat16. The mean is taken in float32.
"""

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the norm of x over its last dimension."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add x to `residual` in place and return the sum's norm."""
    residual.add_(x)
    return F.rms_norm(residual, weight.shape, weight, eps)
