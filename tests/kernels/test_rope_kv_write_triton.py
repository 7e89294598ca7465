"""Rotation, norm and pool of the Triton kernel equal the formulas in float64."""

from typing import NamedTuple

import pytest
import torch
from triton_device import device, poisoned

from paceline.kernels.rope_kv_write import rope_kv_write, rope_tables
from paceline.kernels.rope_kv_write_triton import Tile, rope_cos_sin, rope_kv_write_triton

# One rounding of the result, half a step of its dtype at most, and float32's own error. The
# interpreter cuts bfloat16 instead of rounding it: a whole step.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 2**-8 if device() == "cuda" else 2**-7,
    torch.float16: 2**-10,
}
EARLY = [False] if device() == "cpu" else [False, True]
EPS = 1e-6
LAYER, NUM_LAYERS, NUM_COLUMNS = 1, 3, 5


class Case(NamedTuple):
    """A step's tokens of several sequences, each in a row of the tables."""

    qkv: torch.Tensor
    heads: int
    kv: torch.Tensor
    """[blocks, layers, kv_heads, 2, block_tokens, head_dim], poisoned"""
    tables: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    frequencies: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor

    @property
    def num_positions(self) -> int:
        return NUM_COLUMNS * self.kv.shape[4]

    @property
    def kept(self) -> torch.Tensor:
        """Tokens that do not pad."""
        return (self.rows >= 0).nonzero().flatten()


def make_case(
    dtype: torch.dtype,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_tokens: int = 16,
    rows: tuple[int, ...] = (0, -1, 2, 2, 1, -1),
) -> Case:
    torch.manual_seed(heads * head_dim + len(rows))
    num_rows = max(rows) + 1
    num_blocks = num_rows * NUM_COLUMNS + 2
    order = torch.randperm(num_blocks)[: num_rows * NUM_COLUMNS].to(torch.int32)
    positions = torch.randperm(NUM_COLUMNS * block_tokens)[: len(rows)]
    half = torch.arange(0, head_dim, 2) / head_dim
    case = Case(
        qkv=torch.randn(len(rows), (heads + 2 * kv_heads) * head_dim).to(dtype),
        heads=heads,
        kv=poisoned((num_blocks, NUM_LAYERS, kv_heads, 2, block_tokens, head_dim), dtype),
        tables=order.view(num_rows, NUM_COLUMNS),
        rows=torch.tensor(rows, dtype=torch.int32),
        positions=positions,
        frequencies=1.0 / 1000.0**half,
        q_norm=(0.5 + torch.rand(head_dim)).to(dtype),
        k_norm=(0.5 + torch.rand(head_dim)).to(dtype),
    )
    return Case(*(v.to(device()) if isinstance(v, torch.Tensor) else v for v in case))


def launch(
    case: Case,
    *,
    scale: float = 1.0,
    norm: bool = False,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
    launch_early: bool = False,
) -> torch.Tensor:
    return rope_kv_write_triton(
        case.qkv,
        rope_cos_sin(case.num_positions, case.frequencies, scale),
        case.positions,
        case.rows,
        case.tables,
        case.kv,
        LAYER,
        num_heads=case.heads,
        q_norm=case.q_norm if norm else None,
        k_norm=case.k_norm if norm else None,
        eps=EPS,
        out=out,
        tile=tile,
        launch_early=launch_early,
    )


def expected(
    case: Case, scale: float, norm: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries, rotated keys and values, [T, heads, head_dim], in float64."""
    kv_heads, head_dim = case.kv.shape[2], case.kv.shape[5]
    parts = case.qkv.view(len(case.qkv), -1, head_dim).split([case.heads, kv_heads, kv_heads], 1)
    q, k, v = (part.double() for part in parts)
    if norm:
        q = q * (q.square().mean(-1, keepdim=True) + EPS).rsqrt() * case.q_norm.double()
        k = k * (k.square().mean(-1, keepdim=True) + EPS).rsqrt() * case.k_norm.double()
    angles = torch.outer(case.positions.float(), case.frequencies).double().unsqueeze(1)
    cos, sin = angles.cos() * scale, angles.sin() * scale

    def rotated(x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)

    return rotated(q), rotated(k), v


def slots_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and offsets of the kept tokens."""
    rows, positions = case.rows[case.kept].long(), case.positions[case.kept]
    block_tokens = case.kv.shape[4]
    return case.tables[rows, positions // block_tokens].long(), positions % block_tokens


def check(case: Case, queries: torch.Tensor, scale: float = 1.0, norm: bool = False) -> None:
    """Compare a case that ran on clones of qkv: it must still hold the input."""
    q, k, v = (part[case.kept] for part in expected(case, scale, norm))
    close = {"rtol": TOLERANCE[case.qkv.dtype], "atol": 1e-5}
    torch.testing.assert_close(queries[case.kept].double(), q, **close)
    blocks, offsets = slots_of(case)
    written = case.kv[blocks, LAYER, :, :, offsets]
    torch.testing.assert_close(written[:, :, 0].double(), k, **close)
    assert torch.equal(written[:, :, 1].double(), v)
    case.kv[blocks, LAYER, :, :, offsets] = float("nan")
    assert case.kv.isnan().all(), "something else was written"


SHAPES = [
    {"heads": 4, "kv_heads": 2, "head_dim": 64, "block_tokens": 16},
    {"heads": 3, "kv_heads": 3, "head_dim": 96, "block_tokens": 32},
    {"heads": 16, "kv_heads": 1, "head_dim": 128, "block_tokens": 64},
    {"heads": 5, "kv_heads": 1, "head_dim": 256, "block_tokens": 16},
    {"heads": 2, "kv_heads": 1, "head_dim": 10, "block_tokens": 3},
]


@pytest.mark.parametrize("launch_early", EARLY)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formulas_and_leaves_padded_tokens_alone(
    shape: dict[str, int], norm: bool, dtype: torch.dtype, launch_early: bool
) -> None:
    case = make_case(dtype, **shape)
    before = case.qkv.clone()
    out = poisoned((len(case.rows), case.heads, shape["head_dim"]), dtype)
    queries = launch(case, scale=1.3, norm=norm, out=out, launch_early=launch_early)
    assert queries is out
    assert out[case.rows < 0].isnan().all()
    assert torch.equal(case.qkv, before)
    check(case, queries, 1.3, norm)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_queries_are_rotated_in_place(dtype: torch.dtype) -> None:
    case = make_case(dtype)
    before = case.qkv.clone()
    queries = launch(case, norm=True)
    assert queries.data_ptr() == case.qkv.data_ptr()
    size = queries.shape[1] * queries.shape[2]
    assert torch.equal(case.qkv[:, size:], before[:, size:])
    assert torch.equal(case.qkv[case.rows < 0], before[case.rows < 0])
    queries = queries.clone()
    case.qkv.copy_(before)
    check(case, queries, norm=True)


@pytest.mark.parametrize("tile", [Tile(1, 1), Tile(4, 2), Tile(16, 4)])
def test_every_tile_gives_the_formulas(tile: Tile) -> None:
    case = make_case(torch.float32, heads=6, kv_heads=2)
    out = poisoned((len(case.rows), 6, 64), torch.float32)
    check(case, launch(case, norm=True, out=out, tile=tile), norm=True)


def test_strides_of_pool_tables_and_rows_are_followed() -> None:
    case = make_case(torch.float32)
    layer_major = case.kv.permute(1, 3, 0, 4, 2, 5).contiguous().permute(2, 0, 4, 1, 3, 5)
    tables = torch.full((len(case.tables), NUM_COLUMNS + 3), -5, dtype=torch.int32)
    tables = tables.to(device())[:, :NUM_COLUMNS]
    tables.copy_(case.tables)
    qkv = poisoned((len(case.qkv), case.qkv.shape[1] + 8), torch.float32)[:, 8:]
    qkv.copy_(case.qkv)
    case = case._replace(kv=layer_major, tables=tables)
    queries = launch(case._replace(qkv=qkv))
    check(case, queries)


def test_positions_past_the_columns_or_the_angles_write_nothing() -> None:
    case = make_case(torch.float32, rows=(0, 1, 0))
    before = case.qkv.clone()
    case.positions.copy_(torch.tensor([case.num_positions, case.num_positions + 7, 1 << 40]))
    launch(case)
    assert torch.equal(case.qkv, before)
    assert case.kv.isnan().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_equals_the_reference_kernel(dtype: torch.dtype) -> None:
    case = make_case(dtype, rows=(1, 0, 0, 2))
    kv = torch.zeros_like(case.kv)
    blocks, offsets = slots_of(case)
    kv_heads, block_tokens = kv.shape[2], kv.shape[4]
    runs = (blocks * NUM_LAYERS + LAYER)[:, None, None] * kv_heads
    runs = (runs + torch.arange(kv_heads, device=device())) * 2
    runs = runs + torch.arange(2, device=device())[:, None]
    rows = (runs * block_tokens + offsets[:, None, None]).reshape(-1)
    cos, sin = rope_tables(case.positions, case.frequencies, 1.0, dtype)
    queries = rope_kv_write(case.qkv.clone(), cos, sin, kv, rows, num_heads=case.heads)
    case.kv.zero_()
    # The reference rounds cos, sin and both products, each of values up to about 4.
    tolerance = 4 * TOLERANCE[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(launch(case), queries, **close)
    torch.testing.assert_close(case.kv, kv, **close)


@pytest.mark.parametrize("wrong", ["position one off", "another sequence's block", "no norm"])
def test_a_mistake_is_noticed(wrong: str) -> None:
    case = make_case(torch.bfloat16)
    out = poisoned((len(case.rows), case.heads, 64), torch.bfloat16)
    given = case
    if wrong == "position one off":
        given = case._replace(positions=case.positions.clone())
        given.positions[2] ^= 1
    elif wrong == "another sequence's block":
        given = case._replace(tables=case.tables.roll(1, dims=0))
    queries = launch(given, norm=wrong != "no norm", out=out)
    with pytest.raises(AssertionError):
        check(case, queries, norm=True)


def test_inputs_that_do_not_fit_are_refused() -> None:
    case = make_case(torch.float32)
    refused = [
        (case._replace(qkv=case.qkv[:, :-1]), r"qkv must be \[6, 512\] .* got \[6, 511\]"),
        (case._replace(qkv=case.qkv.bfloat16()), "torch.bfloat16 and torch.float32"),
        (case._replace(positions=case.positions[:5]), r"positions must be .* \[6\], got .* \[5\]"),
        (case._replace(rows=case.rows.float()), "row_of_token must be .* got torch.float32"),
        (case._replace(tables=case.tables.long()), "tables must be int32 .* got torch.int64"),
        (case._replace(kv=case.kv[:, :1]), "layer 1 is outside the pool of 1 layers"),
        (case._replace(frequencies=case.frequencies[1:]), r"cos_sin must be .* 64\] .* 62\]"),
    ]
    for wrong, message in refused:
        with pytest.raises(ValueError, match=message):
            launch(wrong)
    with pytest.raises(ValueError, match=r"out must be .* \[6, 4, 64\] .* \[6, 3, 64\]"):
        launch(case, out=poisoned((6, 3, 64), torch.float32))
    with pytest.raises(ValueError, match=r"norm weights must be contiguous \[64\], got \[63\]"):
        launch(case._replace(k_norm=case.k_norm[:63]), norm=True)
    assert case.kv.isnan().all()
