"""Rows after an RMS norm, whose factors may still be missing.

    y = x * f * weight, f = 1 / sqrt(mean(x^2) + eps)      a row's f needs all of the row

What makes a row in pieces, one program each, can multiply it by the norm's weight at once and leave
the squares of each piece; a product of the rows applies f last: (x * weight) W^T * f.
"""

from typing import NamedTuple

import torch


class NormedRows(NamedTuple):
    """M rows of width N."""

    rows: torch.Tensor
    """[M, N]; without their factors if there are `squares`"""
    squares: torch.Tensor | None
    """float32 [pieces, M], contiguous: what each piece adds to the sum of a row's squares"""
