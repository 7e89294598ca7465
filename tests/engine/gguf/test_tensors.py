"""Values of tensors: every type that gguf expands, in blocks of any size."""

from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from gguf_files import write_gguf

from paceline.engine.gguf import tensors
from paceline.engine.gguf.reader import read_gguf
from paceline.engine.gguf.tensors import Source, expand

Kind = gguf.GGMLQuantizationType
WIDTH = 256
NUM_ROWS = 8
# Bytes of each block that are floating-point numbers, where random bits might be no number.
SCALES: dict[gguf.GGMLQuantizationType, tuple[int, ...]] = {
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.Q4_1: (0, 2),
    Kind.Q5_1: (0, 2),
    Kind.TQ1_0: (52,),
    Kind.TQ2_0: (64,),
}
KINDS = [
    *(Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4),
    *(Kind.IQ1_S, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S),
    *(Kind.IQ4_NL, Kind.IQ4_XS),
]


def random_rows(kind: gguf.GGMLQuantizationType) -> np.ndarray:
    if kind in (Kind.F16, Kind.BF16):
        values = np.random.default_rng(0).normal(size=(NUM_ROWS, WIDTH)).astype(np.float32)
        return gguf.quants.quantize(values, kind).view(np.uint8).reshape(NUM_ROWS, -1)
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_blocks = NUM_ROWS * WIDTH // block_elements
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
    for offset in SCALES.get(kind, (0,)):
        scales = draw.uniform(1e-3, 2e-3, num_blocks).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind is Kind.MXFP4:
        blocks[:, 0] = draw.integers(118, 124, num_blocks)  # an exponent of 8 bits
    return blocks.reshape(NUM_ROWS, -1)


@pytest.mark.parametrize("rows_at_once", [1, 3, NUM_ROWS])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_of_every_type_have_the_values_that_gguf_gives_them(
    kind: gguf.GGMLQuantizationType,
    rows_at_once: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", rows_at_once * WIDTH)
    raw = random_rows(kind)
    file = read_gguf(write_gguf(tmp_path / "model.gguf", {}, {"x": raw}, kind=kind))
    tensor = file.tensors["x"]
    assert tensor.shape == (NUM_ROWS, WIDTH)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    assert expected.std() > 0
    blocks = list(expand(file, Source(tensor, None), torch.float32))
    assert [len(block) for block in blocks[:-1]] == [rows_at_once] * (len(blocks) - 1)
    assert torch.equal(torch.cat(blocks), expected)
    order = np.random.default_rng(1).permutation(NUM_ROWS)
    shuffled = torch.cat(list(expand(file, Source(tensor, order), torch.float32)))
    assert torch.equal(shuffled, expected[order])
