"""Write a safetensors file piece by piece, so that memory never holds the model.

The format: https://github.com/huggingface/safetensors#format. The package safetensors writes from a
dict of all tensors.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

ALIGNMENT = 8
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    blocks: Iterable[torch.Tensor],
) -> Iterator[float]:
    """Write all tensors in the order of `shapes`; yield the share that is written.

    blocks: their elements in that order, cut anywhere. Raises ValueError if their number is wrong.
    """
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    written = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            written += file.write(block.contiguous().view(-1).view(torch.uint8).numpy().data)
            yield written / end
    if written != end:
        raise ValueError(f"{path.name} needs {end} bytes of tensors, and was given {written}")
