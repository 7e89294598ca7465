"""Decode attention that rotates and writes the newest tokens equals the two operations in turn."""

import numpy as np
import pytest
import torch
from decode_cut import even_tiles
from paged_context import LAYER, NUM_LAYERS, make_paged
from triton_device import device, poisoned

from paceline.kernels.decode_attention import decode_attention, plan_spans
from paceline.kernels.decode_attention_triton import (
    decode_attention_triton,
    rope_decode_attention_triton,
)
from paceline.kernels.decode_tiles import DecodeTiles, DecodeWorkspace, workspace_size
from paceline.kernels.rope_kv_write import rope_kv_write, rope_tables
from paceline.kernels.rope_kv_write_triton import rope_cos_sin, rope_kv_write_triton

SCALE, EPS = 0.2, 1e-6
TOLERANCE = {
    torch.float32: 2e-5,  # sums in another order
    torch.float16: 4e-3,  # queries, keys, weights and the output are rounded to 11 bits
    torch.bfloat16: 4e-2,  # the same, to 8 bits; the interpreter cuts bits off instead
}
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class Case:
    """Sequences in a pool but for their newest tokens; every other slot is NaN."""

    def __init__(
        self,
        lengths: list[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        block_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
        norm: bool = False,
        max_length: int | None = None,
    ) -> None:
        paged = make_paged(
            lengths, kv_heads=kv_heads, head_dim=head_dim, block_tokens=block_tokens, dtype=dtype
        )
        self.num_heads, self.norm = heads, norm
        self.kv = paged.kv.masked_fill(paged.kv > 5000, float("nan")).to(device())
        self.tables = torch.from_numpy(paged.tables).to(device())
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device())
        self.rows = [row for row, length in enumerate(lengths) if length]
        for block, offset in self.slots():
            self.kv[block, LAYER, :, :, offset] = float("nan")
        width = (heads + 2 * kv_heads) * head_dim
        self.qkv = torch.randn(len(lengths), width).to(dtype).to(device())
        self.frequencies = 1.0 / 1000.0 ** (
            torch.arange(0, head_dim, 2, device=device()) / head_dim
        )
        self.cos_sin = rope_cos_sin(max_length or max(lengths), self.frequencies, 1.3)
        self.norms: dict[str, torch.Tensor] = {}
        if norm:
            weights = (0.5 + torch.rand(2, head_dim)).to(dtype).to(device())
            self.norms = {"q_norm": weights[0], "k_norm": weights[1]}

    def slots(self) -> list[tuple[int, int]]:
        """Block and offset of each newest token."""
        block_tokens = self.kv.shape[4]
        positions = [(row, int(self.lengths[row]) - 1) for row in self.rows]
        return [
            (int(self.tables[row, position // block_tokens]), position % block_tokens)
            for row, position in positions
        ]

    def workspace(self, tiles: DecodeTiles) -> DecodeWorkspace:
        num_kv_heads, head_dim = self.kv.shape[2], self.kv.shape[5]
        size = workspace_size(
            len(self.lengths),
            num_kv_heads=num_kv_heads,
            num_queries=self.num_heads // num_kv_heads,
            head_dim=head_dim,
            tiles=tiles,
        )
        workspace = DecodeWorkspace.allocate(*size, device())
        workspace.partials.fill_(float("nan"))
        return workspace

    def out(self) -> torch.Tensor:
        return poisoned((len(self.lengths), self.num_heads, self.kv.shape[5]), self.kv.dtype)

    def run(self, **changes: object) -> torch.Tensor:
        arguments = {
            "qkv": self.qkv,
            "cos_sin": self.cos_sin,
            "kv": self.kv,
            "layer": LAYER,
            "tables": self.tables,
            "lengths": self.lengths,
            "scale": SCALE,
            "num_heads": self.num_heads,
            "eps": EPS,
            "out": self.out(),
        }
        return rope_decode_attention_triton(**(arguments | self.norms | changes))  # type: ignore[arg-type]

    def run_in_turn(self, kv: torch.Tensor, tiles: DecodeTiles, window: int | None) -> torch.Tensor:
        """Run the two kernels, one after the other, on `kv`."""
        q = rope_kv_write_triton(
            self.qkv.clone(),
            self.cos_sin,
            self.lengths - 1,
            torch.where(self.lengths > 0, torch.arange(len(self.lengths), device=device()), -1),
            self.tables,
            kv,
            LAYER,
            num_heads=self.num_heads,
            eps=EPS,
            **self.norms,
        )
        return decode_attention_triton(
            q,
            kv,
            LAYER,
            self.tables,
            self.lengths,
            SCALE,
            window=window,
            tiles=tiles,
            out=self.out(),
        )

    def expected(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of the rows that are not padding, and the pool, both float32."""
        kv = self.kv.cpu().float().nan_to_num()
        num_kv_heads, block_tokens = kv.shape[2], kv.shape[4]
        places = np.array(self.slots(), dtype=np.int64)
        runs = (places[:, :1, None] * NUM_LAYERS + LAYER) * num_kv_heads + np.arange(num_kv_heads)
        runs = runs * 2 + np.arange(2)[:, None]
        rows = torch.from_numpy(runs * block_tokens + places[:, 1:, None]).reshape(-1)
        lengths = self.lengths[self.rows].cpu()
        cos, sin = rope_tables(lengths - 1, self.frequencies.cpu(), 1.3, torch.float32)
        norms = {name: weight.cpu().float() for name, weight in self.norms.items()}
        qkv = self.qkv[self.rows].cpu().float()
        q = rope_kv_write(qkv, cos, sin, kv, rows, num_heads=self.num_heads, eps=EPS, **norms)
        spans = plan_spans(self.tables[self.rows].cpu().numpy(), lengths.numpy(), kv, window)
        return decode_attention(q, kv, LAYER, spans, SCALE), kv

    def check(
        self,
        output: torch.Tensor,
        expected: tuple[torch.Tensor, torch.Tensor],
        before: torch.Tensor,
    ) -> None:
        """Compare with what `expected` gave; nothing but the newest slots may have changed."""
        tolerance = TOLERANCE[self.kv.dtype]
        close = {"rtol": tolerance, "atol": tolerance}
        assert output.dtype is self.kv.dtype
        torch.testing.assert_close(output[self.rows].cpu().float(), expected[0], **close)
        after = self.kv.clone()
        for block, offset in self.slots():
            new, wanted = (
                pool[block, LAYER, :, :, offset].cpu().float() for pool in (after, expected[1])
            )
            torch.testing.assert_close(new[:, 0], wanted[:, 0], **close)
            assert torch.equal(new[:, 1], wanted[:, 1])
            after[block, LAYER, :, :, offset] = before[block, LAYER, :, :, offset]
        assert torch.equal(bits(after), bits(before)), "something else was written"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return what torch.equal can compare where there are NaNs."""
    return tensor.view(INTEGERS[tensor.dtype])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens", "dtype", "window", "num_shares"),
    [
        (2, 2, 64, 16, torch.float32, None, 1),
        (6, 3, 64, 32, torch.float32, 20, 4),
        (7, 1, 96, 16, torch.float32, None, 2),
        (10, 2, 128, 64, torch.float32, 1, 1),
        (16, 1, 256, 16, torch.float32, None, 8),
        (3, 3, 24, 32, torch.float32, None, 1),
        (9, 3, 64, 64, torch.bfloat16, None, 4),
        (16, 1, 96, 32, torch.bfloat16, None, 1),
        (8, 2, 128, 16, torch.bfloat16, 33, 2),
        (2, 1, 256, 64, torch.bfloat16, None, 4),
        (13, 1, 64, 16, torch.float16, None, 8),
        (12, 2, 96, 64, torch.float16, 16, 1),
        (4, 1, 128, 32, torch.float16, None, 4),
        (5, 1, 256, 16, torch.float16, None, 1),
    ],
)
def test_equals_the_references_in_turn(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    window: int | None,
    num_shares: int,
    norm: bool,
) -> None:
    case = Case(
        [100, 0, 1, 33, 64, 65],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        dtype=dtype,
        norm=norm,
    )
    expected, before, qkv = case.expected(window), case.kv.clone(), case.qkv.clone()
    tiles = even_tiles(16, 16, num_shares)
    workspace = case.workspace(tiles)
    output = case.run(window=window, tiles=tiles, workspace=workspace)
    case.check(output, expected, before)
    assert output[1].isnan().all()
    assert torch.equal(case.qkv, qkv)
    assert not workspace.counters.any()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("heads", "head_dim", "window", "tiles"),
    [
        (8, 64, None, even_tiles(16, 32, 1)),
        (8, 96, None, even_tiles(16, 16, 8)),
        (6, 128, 40, even_tiles(16, 32, 4)),
        (40, 64, None, even_tiles(16, 32, 4)),  # 20 queries of a kv head: two tiles of them
        (40, 64, None, even_tiles(32, 32, 16)),
    ],
)
def test_gives_the_bits_of_the_two_kernels_in_turn(
    heads: int,
    head_dim: int,
    window: int | None,
    tiles: DecodeTiles,
    dtype: torch.dtype,
    norm: bool,
) -> None:
    case = Case([130, 17, 0, 16, 1], heads=heads, head_dim=head_dim, dtype=dtype, norm=norm)
    kv = case.kv.clone()
    expected = case.run_in_turn(kv, tiles, window)
    output = case.run(tiles=tiles, window=window)
    if norm:  # the squares are added in another order
        tolerance = TOLERANCE[dtype] / 4
        close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
        torch.testing.assert_close(output, expected, **close)
        torch.testing.assert_close(case.kv, kv, **close)
        return
    assert torch.equal(bits(case.kv), bits(kv))
    if device() == "cpu":  # a compiler may choose products to round in one of them only
        assert torch.equal(bits(output), bits(expected))
    else:
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_tiles_chosen_from_the_shape_give_the_same() -> None:
    case = Case([100, 31, 7], heads=6)
    expected, before = case.expected(None), case.kv.clone()
    case.check(case.run(out=None), expected, before)


@pytest.mark.parametrize("num_shares", [1, 8])
def test_tokens_one_after_another_see_each_other(num_shares: int) -> None:
    """Steps on the same buffers: across a block's border, and from one share to two."""
    case = Case([14, 47, 0, 80], max_length=100, dtype=torch.float16)
    columns = torch.arange(24, dtype=torch.int32, device=device()).view(4, 6)
    pool = poisoned((24, *case.kv.shape[1:]), torch.float16)
    for row in case.rows:
        blocks = -(-int(case.lengths[row]) // 16)
        pool[columns[row, :blocks].long()] = case.kv[case.tables[row, :blocks].long()]
    case.kv, case.tables = pool, columns
    tiles = even_tiles(16, 16, num_shares)
    workspace = case.workspace(tiles)
    for _ in range(5):
        expected, before = case.expected(None), case.kv.clone()
        case.check(case.run(tiles=tiles, workspace=workspace), expected, before)
        assert not workspace.counters.any()
        case.lengths[case.rows] += 1
        case.qkv.normal_()


@pytest.mark.parametrize("num_shares", [1, 4])
@pytest.mark.parametrize("length", [0, -1, 49])
def test_rows_that_pad_or_lie_past_the_angles_do_nothing(length: int, num_shares: int) -> None:
    case = Case([40, 20, 33], max_length=48)
    case.lengths[1] = length
    case.rows = [0, 2]
    case.tables[1] = 2**30  # any use of these would leave the pool
    expected, before = case.expected(None), case.kv.clone()
    tiles = even_tiles(16, 16, num_shares)
    workspace = case.workspace(tiles)
    output = case.run(tiles=tiles, workspace=workspace)
    case.check(output, expected, before)
    assert output[1].isnan().all()


def test_a_row_past_its_table_does_nothing() -> None:
    case = Case([20, 30], max_length=200)
    case.lengths[0] = 33  # the tables have two columns
    case.rows = [1]
    expected, before = case.expected(None), case.kv.clone()
    output = case.run()
    case.check(output, expected, before)
    assert output[0].isnan().all()


def test_strides_of_pool_products_outputs_and_tables_are_followed() -> None:
    case = Case([70, 33])
    expected = case.expected(None)
    case.kv = case.kv.permute(1, 0, 3, 4, 2, 5).contiguous().permute(1, 0, 4, 2, 3, 5)
    qkv = poisoned((2, case.qkv.shape[1] + 24), torch.float32)
    qkv[:, 8:-16] = case.qkv
    tables = torch.full((2, 9), 2**30, dtype=torch.int32, device=device())
    tables[:, : case.tables.shape[1]] = case.tables
    out = poisoned((2, 6, 64), torch.float32)
    for tiles in (even_tiles(16, 16, 1), even_tiles(16, 16, 4)):
        before = case.kv.clone()
        result = case.run(qkv=qkv[:, 8:-16], tables=tables, out=out[:, 1:5], tiles=tiles)
        case.check(result, expected, before)
        assert out[:, [0, 5]].isnan().all()


MISTAKES = ["position", "halves", "swapped block", "no norm", "key for value", "row of the next"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: str) -> None:
    case = Case([50, 50], heads=2, kv_heads=1, norm=True)
    expected, before = case.expected(None), case.kv.clone()
    changes: dict[str, object] = {"tiles": even_tiles(16, 16, 4)}
    if mistake == "position":
        changes["cos_sin"] = case.cos_sin.roll(1, dims=0)
    elif mistake == "halves":
        changes["cos_sin"] = case.cos_sin.roll(32, dims=1)
    elif mistake == "swapped block":
        changes["tables"] = case.tables[[1, 0]]
    elif mistake == "no norm":
        changes |= {"q_norm": None, "k_norm": None}
    elif mistake == "key for value":
        parts = case.qkv.split([128, 64, 64], dim=1)
        changes["qkv"] = torch.cat((parts[0], parts[2], parts[1]), dim=1)
    else:
        changes["qkv"] = case.qkv.roll(1, dims=0)
    output = case.run(**changes)
    with pytest.raises(AssertionError):
        case.check(output, expected, before)


def test_a_token_that_is_not_written_before_it_is_read_is_noticed() -> None:
    """The newest slot holds NaN: an order of the kernel's own that is wrong cannot go unseen."""
    case = Case([50, 16])
    q = case.qkv[:, : 4 * 64].view(2, 4, 64)
    output = decode_attention_triton(q, case.kv, LAYER, case.tables, case.lengths, SCALE)
    assert output.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 511)}, r"qkv must be \[rows, 512\]"),
        ({"qkv": torch.zeros(3, 512)}, "number of rows"),
        ({"qkv": torch.zeros(2, 512, dtype=torch.bfloat16)}, "bfloat16"),
        ({"qkv": torch.zeros(512, 2).T}, "strides"),
        ({"cos_sin": torch.zeros(20, 62)}, "cos_sin must be"),
        ({"q_norm": torch.zeros(64)}, "go together"),
        ({"num_heads": 3, "qkv": torch.zeros(2, 448)}, "3 query heads cannot share 2"),
        ({"layer": 2}, "no layer 2"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"out": torch.zeros(2, 1, 4, 64)}, "out must be"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    case = Case([20, 20])
    before = case.kv.clone()
    moved = {
        name: value.to(device()) if isinstance(value, torch.Tensor) else value
        for name, value in change.items()
    }
    with pytest.raises(ValueError, match=message):
        case.run(**moved)
    assert torch.equal(bits(case.kv), bits(before))
