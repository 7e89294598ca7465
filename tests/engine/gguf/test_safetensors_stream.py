"""A file that was written piece by piece is read by the package safetensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paceline.engine.gguf.safetensors_stream import write_safetensors

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 4, 30])
def test_tensors_come_back_whole_however_they_were_cut(
    dtype: torch.dtype, block: int, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    values = torch.arange(30).to(dtype)
    shares = list(write_safetensors(path, SHAPES, dtype, values.split(block)))
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0
    tensors = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES
    assert torch.equal(torch.cat([tensors[name].view(-1) for name in SHAPES]), values)


@pytest.mark.parametrize("count", [0, 29, 31])
def test_too_few_or_too_many_elements_are_an_error(count: int, tmp_path: Path) -> None:
    blocks = [torch.zeros(count)]
    with pytest.raises(ValueError, match="needs 120 bytes of tensors"):
        list(write_safetensors(tmp_path / "model.safetensors", SHAPES, torch.float32, blocks))
