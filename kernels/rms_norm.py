"""Root-mean-square norm: y = x / sqrt(mean(x^2) + eps) * weight.

x, y [T, H], weight [H]; float32 or bfloat16. The mean is taken in float32.
"""

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the norm of x over its last dimension."""
    return F.rms_norm(x, weight.shape, weight, eps)
