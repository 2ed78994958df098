"""Casts, bit for bit, against E4M3 written down in numpy from its definition."""

from fractions import Fraction

import numpy as np
import pytest
import torch

import dsv3c.operators  # noqa: F401
from dsv3c.numerics import Recipe, cast_bound
from dsv3c.operators.define import OperatorError

ops = torch.ops.dsv3c
FLOOR = Recipe().amax_floor
SHAPES = [(1, 1), (3, 127), (5, 128), (130, 257), (256, 384)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def e4m3(v: np.ndarray) -> np.ndarray:
    """Nearest of ±{0, 2^-9 .. 448}: 3 mantissa bits, exponents from -6, ties to even, saturating."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(v), 2.0**-40))), -6)
    spacing = np.exp2(exponent - 3)
    return np.clip(np.rint(v / spacing) * spacing, -448, 448)


def scale_of(tile: np.ndarray, floor: float, pow2: bool) -> np.float32:
    scale_inv = max(np.abs(tile).max(initial=0), np.float32(floor)) / np.float32(448)
    mantissa, exponent = np.frexp(scale_inv)
    return np.float32(np.ldexp(1.0, exponent - (mantissa == 0.5))) if pow2 else scale_inv


def quantize(x: torch.Tensor, rows: int, floor: float, pow2: bool) -> tuple[np.ndarray, np.ndarray]:
    """Groups of rows×128 values, one at a time, in IEEE float32."""
    x = x.float().numpy()
    R, K = x.shape
    q, scale_inv = np.empty((R, K)), np.empty((-(-R // rows), -(-K // 128)), np.float32)
    for r in range(scale_inv.shape[0]):
        for g in range(scale_inv.shape[1]):
            at = np.s_[r * rows : (r + 1) * rows, g * 128 : (g + 1) * 128]
            scale_inv[r, g] = scale_of(x[at], floor, pow2)
            q[at] = e4m3((x[at] / scale_inv[r, g]).astype(np.float64))
    return q, scale_inv


def assert_same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[np.ndarray, np.ndarray]) -> None:
    q, scale_inv = found
    np.testing.assert_array_equal(scale_inv.numpy(), expected[1])
    np.testing.assert_array_equal(q.float().numpy(), expected[0])
    np.testing.assert_array_equal(np.signbit(q.float().numpy()), np.signbit(expected[0]))


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_tile(check, shape, dtype, pow2):
    x = check.varied(*shape, dtype)
    q, scale_inv = ops.quantize_tile(x, FLOOR, pow2)
    assert_same((q, scale_inv), quantize(x, 1, FLOOR, pow2))
    assert (q.stride(), scale_inv.stride()) == ((shape[1], 1), (1, shape[0]))


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_block(check, shape, pow2):
    w = torch.stack([check.varied(*shape), check.varied(*shape)])
    q, scale_inv = ops.quantize_block(w, FLOOR, pow2)
    for e in range(2):
        assert_same((q[e], scale_inv[e]), quantize(w[e], 128, FLOOR, pow2))
    assert q.is_contiguous()
    assert scale_inv.is_contiguous()
    flat_q, flat_scale_inv = ops.quantize_block(w[0], FLOOR, pow2)
    assert_same((flat_q, flat_scale_inv), quantize(w[0], 128, FLOOR, pow2))


@pytest.mark.parametrize("sizes", [None, [5, 0, 128, 129], [0, 0, 300, 0], [262, 0, 0, 0]])
def test_quantize_tile_t(check, sizes):
    x = check.varied(262 if sizes is None else sum(sizes) + 7, 130)  # 7 rows of no group
    offs = None if sizes is None else check.ends(sizes)
    q, scale_inv = ops.quantize_tile_t(x, offs, FLOOR, False)
    groups = [len(x)] if sizes is None else sizes
    columns = -(-len(x) // 128) * 128 + (0 if sizes is None else 128 * len(sizes))
    padded = torch.zeros(130, columns)
    start = first = 0
    for n in groups:
        padded[:, first : first + n] = x[start : start + n].T
        start, first = start + n, first + -(-n // 128) * 128
    assert_same((q, scale_inv), quantize(padded, 1, FLOOR, False))
    assert scale_inv.stride() == (1, 130)


@pytest.mark.parametrize("sizes", [None, [5, 0, 128, 129]])
def test_requantize_t(check, sizes):
    """The saved FP8 activation, dequantised in float32, then as `quantize_tile_t`."""
    offs = None if sizes is None else check.ends(sizes)
    x, x_scale_inv = ops.quantize_tile(check.varied(262, 200), FLOOR, False)
    dequantized = x.float() * x_scale_inv.repeat_interleave(128, 1)[:, :200]
    found = ops.requantize_t(x, x_scale_inv, offs, FLOOR, True)
    expected = ops.quantize_tile_t(dequantized, offs, FLOOR, True)
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(found[1], expected[1])
    assert found[1].stride() == expected[1].stride()


@pytest.mark.parametrize("sizes", [None, [5, 0, 128, 129]])
def test_both_casts_are_the_two(check, sizes):
    x = check.varied(270, 200)
    offs = None if sizes is None else check.ends(sizes)
    expected = (*ops.quantize_tile(x, FLOOR, True), *ops.quantize_tile_t(x, offs, FLOOR, True))
    for f, e in zip(ops.quantize_tile_both(x, offs, FLOOR, True), expected, strict=True):
        assert torch.equal(f.contiguous().view(torch.uint8), e.contiguous().view(torch.uint8))
        assert f.stride() == e.stride()


def e5m6(v: np.ndarray) -> np.ndarray:
    """Nearest of ±{0, 2^-20 .. 65024}: 6 mantissa bits, exponents from -14, ties to even."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(v), 2.0**-40))), -14)
    return np.rint(v / np.exp2(exponent - 6)) * np.exp2(exponent - 6)


@pytest.mark.parametrize("shape", [(1, 8), (3, 120), (130, 264)])
def test_e5m6(check, shape):
    x = check.varied(*shape) * torch.exp2(torch.randint(-25, 5, shape).float())
    x[0, :8] = torch.tensor([0.0, -0.0, 1 + 2**-7, 1 + 3 * 2**-7, -(2.0**-21), 2.0**-20, 65024.0, -(2.0**-14)])
    packed, scale_inv = ops.quantize_e5m6(x, FLOOR)
    assert packed.shape == (shape[0], shape[1] // 2 * 3)
    assert scale_inv.stride() == (1, shape[0])
    scales = scale_inv.repeat_interleave(128, 1)[:, : shape[1]]
    assert bool((torch.frexp(scales).mantissa == 0.5).all())  # powers of two, the least that hold the tile
    tiles = torch.nn.functional.pad(x.abs(), (0, -shape[1] % 128)).unflatten(1, (-1, 128)).amax(-1).clamp(min=FLOOR)
    assert bool((tiles <= 65024 * scale_inv).all())
    assert bool((2 * tiles > 65024 * scale_inv).all())
    expected = e5m6((x.double() / scales.double()).numpy()) * scales.double().numpy()
    back = ops.dequantize_e5m6(packed, scale_inv, torch.float32).numpy()
    np.testing.assert_array_equal(back, expected)
    np.testing.assert_array_equal(np.signbit(back), np.signbit(x.numpy()))


def test_every_tie_of_e5m6(check):
    x = check.e5m6_ties()
    packed, scale_inv = ops.quantize_e5m6(x, FLOOR)
    assert bool((scale_inv == 1).all())
    back = ops.dequantize_e5m6(packed, scale_inv, torch.float32).numpy()
    np.testing.assert_array_equal(back, e5m6(x.double().numpy()))
    np.testing.assert_array_equal(np.signbit(back), np.signbit(x.numpy()))


def test_e5m6_is_two_values_in_three_bytes():
    x = torch.zeros(1, 8)
    x[0, :3] = torch.tensor([65024.0, -1.0, 2.0**-20])
    packed, scale_inv = ops.quantize_e5m6(x, FLOOR)
    assert scale_inv.tolist() == [[1.0]]
    assert packed[0, :6].tolist() == [0xBF, 0x07, 0xBC, 0x01, 0x00, 0x00]  # 0x7BF, 0xBC0; 0x001, 0x000


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_e5m6_does_not_hide_nan(bad):
    x = torch.ones(1, 256)
    x[0, 130] = bad
    back = ops.dequantize_e5m6(*ops.quantize_e5m6(x, FLOOR), torch.float32)
    assert bool(back[0, 130].isnan())
    assert bool((back[0, :128] == 1).all())


def test_e5m6_refuses_what_does_not_fill_words():
    with pytest.raises(OperatorError, match="multiple of 8"):
        ops.quantize_e5m6(torch.ones(2, 132), FLOOR)


def test_special_values():
    """Ties go to even, ±448 stays, what is below half the smallest subnormal keeps only its sign, zero stays zero."""
    tile = torch.zeros(3, 128)
    tile[0, :8] = torch.tensor([448.0, -448.0, 17.0, 19.0, 2**-9, 2**-10, -(2**-11), 3 * 2**-10])
    tile[2, :] = 1e-30
    q, scale_inv = ops.quantize_tile(tile, FLOOR, False)
    assert scale_inv[0, 0] == 1
    assert q[0, :8].float().tolist() == [448.0, -448.0, 16.0, 20.0, 2**-9, 0.0, -0.0, 2**-8]
    assert bool(torch.signbit(q[0, 6].float()))
    assert scale_inv[1, 0] == np.float32(FLOOR) / np.float32(448)
    assert not q[1:].float().any()


def test_gradients_have_their_own_floor():
    dy = torch.full((1, 128), 1e-10)
    assert not ops.quantize_tile(dy, Recipe().amax_floor, False)[0].float().any()
    assert bool((ops.quantize_tile(dy, Recipe().gradient_amax_floor, False)[0].float() == 448).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_is_not_hidden(bad):
    """One bad value makes its tile NaN once dequantised, and no other tile."""
    x = torch.ones(2, 256)
    x[1, 130] = bad
    q, scale_inv = ops.quantize_tile(x, FLOOR, False)
    back = q.float() * scale_inv.repeat_interleave(128, 1)
    assert bool(back[1, 128:].isnan().all())
    assert not back[0].isnan().any()
    assert not back[1, :128].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_block(check, shape, dtype):
    w = check.varied(*shape)
    q, scale_inv = ops.quantize_block(w, FLOOR, False)
    each = scale_inv.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    back = ops.dequantize_block(q, scale_inv, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(back, (q.to(compute) * each.to(compute)).to(dtype))
    error = (q.double() * each.double() - w.double()).abs()
    assert bool((error <= cast_bound(w, each)).all())


def test_float64_is_rounded_to_float32_first(check):
    x = check.varied(4, 256, torch.float64) + 1e-12
    assert_same(ops.quantize_tile(x, FLOOR, False), quantize(x.float(), 1, FLOOR, False))


def test_quantized_values_are_a_fixed_point(check):
    q, scale_inv = ops.quantize_tile(check.varied(64, 256), FLOOR, True)
    again = ops.quantize_tile(q.float() * scale_inv.repeat_interleave(128, 1), FLOOR, True)
    assert torch.equal(
        again[0].float() * again[1].repeat_interleave(128, 1), q.float() * scale_inv.repeat_interleave(128, 1)
    )


@pytest.mark.parametrize(("columns", "bits"), [(16, 16), (32, 16), (64, 16), (128, 16)])
def test_columns_are_read_without_bank_conflicts(columns, bits):
    """Nor written with any: the eight chunks of a matrix lie in different banks, and those that eight threads write; a
    shared tile has each element once, and eight threads have a column of 128 rows, which is a line."""
    layouts = pytest.importorskip("dsv3c.kernels.columns", reason="needs Triton")
    requantize = pytest.importorskip("dsv3c.kernels.requantize", reason="needs Triton")
    shared = requantize._part_layout.fn() if columns == 16 else layouts.shared_layout.fn(columns, bits)
    bases = shared.offset_bases
    places = {}
    for offset in range(128 * columns):
        row = column = 0
        for i, (r, c) in enumerate(bases):
            if offset >> i & 1:
                row, column = row ^ r, column ^ c
        places[row, column] = offset * bits // 8
    assert len(places) == 128 * columns
    layout = layouts.column_layout.fn(columns, 4)
    lanes = layout.lane_bases
    assert sorted(row for row, _ in lanes + layout.reg_bases if row) == [1, 2, 4, 8, 16, 32, 64]
    if columns == 16:  # sixteen threads write 8 bytes each
        writers = [(r, 4 * i) for r in (0, 1, 64, 65) for i in range(4)]
        assert len({places[writer] % 128 // 8 for writer in writers}) == 16
    else:
        writers = [(0, 8 * i) for i in range(8)] if columns > 32 else [(r, 8 * i) for r in (0, 1) for i in range(4)]
        assert len({places[writer] % 128 // 16 for writer in writers}) == 8
    if columns == 128:  # and where a thread has 16 of a row
        assert len({places[0, 16 * i] % 128 // 16 for i in range(8)}) == 8
    matrix = [(a * lanes[0][0] ^ b * lanes[1][0]) + c for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    for first_row in (0, 2, 12):
        for chunk in range(0, columns, 4):
            starts = [places[first_row + row, chunk] for row in matrix]
            assert len({start % 128 // 16 for start in starts}) == 8
            for row, start in zip(
                matrix, starts, strict=True
            ):  # 16 bytes: four columns of a row, and of the row 64 below
                assert [places[first_row + row + r, chunk + c] - start for r in (0, 64) for c in range(4)] == [
                    *range(0, 16, 2)
                ]


@pytest.mark.parametrize("place", ["whole", "odd address", "odd rows", "columns first", "half a tile", "no rows"])
def test_words_of_rows_wherever_they_are(place):
    """What `requantize.py` reads begins at 16 bytes and has whole tiles; it is x itself if that is so already."""
    requantize = pytest.importorskip("dsv3c.kernels.requantize", reason="needs Triton")
    x = torch.randint(256, (6, 256), dtype=torch.uint8)
    x = {
        "whole": x,
        "odd address": torch.cat([x.flatten(), x[0]])[1:1537].view(6, 256),
        "odd rows": torch.cat([x, x[:, :7]], 1)[:, :256],
        "columns first": x.T.contiguous().T,
        "half a tile": x[:, :192],
        "no rows": x[:0, :200],
    }[place].view(torch.float8_e4m3fn)
    words = requantize._words(x)
    assert (words.data_ptr() == x.data_ptr()) == (place in ("whole", "no rows"))
    assert words.data_ptr() % 16 == words.stride(0) % 8 == words.shape[1] % 64 == 0
    assert torch.equal(words.view(torch.uint8)[:, : x.shape[1]], x.view(torch.uint8))


def float32(x: Fraction, up: bool | None = None) -> Fraction:
    """The nearest of 24 bits, ties to even; or the next one that is not smaller, or not larger. x is not negative."""
    if x == 0:
        return x
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    spacing = Fraction(2) ** (exponent - 23 - (Fraction(2) ** exponent > x))
    whole = x / spacing
    return spacing * (round(whole) if up is None else -(-whole // 1) if up else whole // 1)


def test_two_products_divide_as_division_does(check):
    """`quantize._reciprocal_and_rest`, in exact arithmetic. What they give is within 2^-44 of the quotient, so only one
    that comes that close to where rounding to float32 begins to give a tie could fall on its other side."""
    sides = set()
    for x, divisor, tie in check.near_ties():
        x, divisor, tie = map(Fraction, (x, divisor, tie))
        first = float32(1 / divisor, up=False)
        rest = 1 - divisor * first
        assert rest >= 0  # or -0 would become 0
        assert rest == float32(rest)
        second = float32(float32(rest * rest + rest, up=True) * first, up=False)
        assert abs((first + second) * divisor - 1) <= Fraction(1, 1 << 45)
        found, expected = float32(x * first + float32(x * second)), float32(x / divisor)
        assert ((found > tie) - (found < tie)) == ((expected > tie) - (expected < tie))
        sides.add((expected > tie) - (expected < tie))
    assert sides == {-1, 0, 1}
