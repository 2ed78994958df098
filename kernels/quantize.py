"""Casts to FP8 and back, memory-bound: each value is read once and written once.

Bits equal `reference/casts.py`'s: quotients are correctly rounded (see `_divide`; `/` is not; BF16 takes the shorter
way of `tiles.py`), and the hardware's cast rounds to nearest even and saturates, which is what clamping first means.
Letters and layouts as there.

Instructions are as scarce as bytes: at the speed of a copy a multiprocessor has 22 of them for a BF16 value, and 15 for
an FP8 one that is cast again. So a division is three of them, and what belongs to a tile is computed once or twice and
not by every thread that has a value of it. Neighbouring programs take neighbouring tiles of a row: whole
pages of memory.

The transposing casts (`_retile_kernel`) read a tile's columns from shared memory as `columns.py` says: 16 rows of a
column a thread. In `quantize_tile_both` 64 registers make room for four programs. Tiles without rows, of which many
experts make many, are only filled. FP8 is cast again in `requantize.py`.

H200, 4096 and 32768 rows of 2048 to 18432, in the time of a copy of as many bytes: `quantize_tile` 0.92 to 1.00,
`quantize_tile_t` 0.93 to 0.95, `quantize_tile_both` 0.89 to 0.93; `quantize_tile_t` of 32768 rows in 256 groups 0.85.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsv3c.kernels.columns import (
    column_layout,
    divide_words,
    halves,
    largest,
    load_words,
    of_columns,
    pack_rows,
    quarters,
    shared_layout,
    store_columns,
)
from dsv3c.kernels.groups import find_tile, groups_of
from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import BF16, F32, FP8, I32, Variant
from dsv3c.kernels.tiles import divide, reciprocal
from dsv3c.numerics import TILE, ceil_div

ROWS = 32  # of a program of `quantize_tile`


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _scale_inv(amax, amax_floor, POW2: tl.constexpr, LARGEST: tl.constexpr = 448):
    """max(amax, amax_floor)/LARGEST, correctly rounded: a product, corrected by the exact remainder."""
    amax = _maximum(amax, amax_floor)
    reciprocal: tl.constexpr = 1 / LARGEST
    quotient = amax * reciprocal
    scale_inv = tl.fma(tl.fma(quotient, -LARGEST, amax), reciprocal, quotient)
    if POW2:  # the next power of two: carry a nonzero mantissa into the exponent, then clear it
        bits = (scale_inv.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale_inv = bits.to(tl.float32, bitcast=True)
    return tl.where(amax < float("inf"), scale_inv, amax)


@triton.jit
def _reciprocal(x):
    """1/x, correctly rounded: the hardware's approximation and a step of Newton's. Equal for all 2^23 significands."""
    near = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.fma(tl.fma(-x, near, 1.0), near, near)


@triton.jit
def _divide(x, scale_inv, reciprocal):
    """x / scale_inv, correctly rounded: the product with the reciprocal, and one correction by the exact remainder.

    Compared with division for all 2^23 significands of scale_inv, at every x around every tie of E4M3: no difference.
    The remainder is exact down to scale_inv = 2^-93, far below what `MIN_AMAX_FLOOR` allows. It is taken as
    quotient·scale_inv − x, so that −0 stays −0.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 quotient, remainder;
        mul.rn.f32 quotient, $1, $3;
        neg.f32 remainder, $1;
        fma.rn.f32 remainder, quotient, $2, remainder;
        neg.f32 remainder, remainder;
        fma.rn.f32 $0, remainder, $3, quotient;
        }""",
        "=f,f,f,f",
        [x, scale_inv, reciprocal],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _reciprocal_and_rest(x):
    """1/x rounded down, and what is missing: `tiles.divide` by them gives the E4M3 number that `_divide` gives.

    Equal for every float32 dividend: its error, 2^-44, matters where a quotient comes that close to where rounding to
    float32 leaves a tie of E4M3. That takes an x within 64 units of a multiple of 2^20 of them, and each has been
    compared. What is missing is never negative, so that -0 stays -0. Beyond x = 2^100 it is subnormal, and less exact.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 near, minus, rest;
        neg.f32 minus, $2;
        rcp.approx.ftz.f32 near, $2;
        fma.rn.f32 rest, minus, near, 0f3F800000;
        fma.rm.f32 near, near, rest, near;
        fma.rn.f32 rest, minus, near, 0f3F800000;
        fma.rp.f32 rest, rest, rest, rest;
        mul.rz.f32 $1, rest, near;
        mov.f32 $0, near;
        }""",
        "=f,=f,f",
        [x],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@launched
@triton.jit(do_not_specialize=["R"])  # numbers of tokens: each would otherwise be compiled anew
def _quantize_tile_kernel(
    x_ptr, q_ptr, scale_inv_ptr, R, K, x_stride, amax_floor, POW2: tl.constexpr, ROWS: tl.constexpr
):
    tile, block = tl.program_id(0) % tl.cdiv(K, 128), tl.program_id(0) // tl.cdiv(K, 128)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tile * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < R) & (columns[None, :] < K)
    offsets = rows[:, None].to(tl.int64)
    x = tl.load(x_ptr + offsets * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    scale_inv = _scale_inv(tl.reduce(tl.abs(x), 1, _maximum), amax_floor, POW2)
    q = _divide(x, scale_inv[:, None], _reciprocal(scale_inv)[:, None]).to(tl.float8e4nv)
    tl.store(q_ptr + offsets * K + columns[None, :], q, mask=inside)
    tl.store(scale_inv_ptr + tile.to(tl.int64) * R + rows, scale_inv, mask=rows < R)


@gluon.jit
def _store_quarters(
    x0, x1, x2, x3, mine, t_ptr, t_scale_inv_ptr, columns, P_words, amax_floor, POW2: gl.constexpr
):  # fmt: skip
    """Float32 numbers, to rows of t as `store_columns` takes them; zero if the tile is no group's."""
    amax = _maximum(_maximum(gl.abs(x0), gl.abs(x1)), _maximum(gl.abs(x2), gl.abs(x3)))
    amax = of_columns(gl.reduce(gl.reduce(halves(amax), 1, _maximum), 0, _maximum), x0)
    scale_inv = _scale_inv(gl.where(mine, amax, 0.0), amax_floor, POW2)
    first, second = _reciprocal_and_rest(scale_inv)
    first, second = first[None, :], second[None, :]
    words = pack_rows(
        divide(x0, first, second), divide(x1, first, second), divide(x2, first, second), divide(x3, first, second)
    )
    store_columns(gl.where(mine, words, 0), scale_inv, t_ptr, t_scale_inv_ptr, columns, P_words)


@gluon.jit
def store_nothing(COLUMNS: gl.constexpr, t_ptr, t_scale_inv_ptr, columns, P_words, amax_floor, POW2: gl.constexpr):
    """A tile of rows that no group has."""
    WORDS: gl.constexpr = gl.BlockedLayout([4, 1], [8, 4], [1, gl.num_warps()], [0, 1])
    words = gl.full([32, COLUMNS], 0, gl.int32, WORDS)
    scale_inv = _scale_inv(gl.full([COLUMNS], 0.0, gl.float32, gl.SliceLayout(0, WORDS)), amax_floor, POW2)
    store_columns(words, scale_inv, t_ptr, t_scale_inv_ptr, columns, P_words)


@gluon.jit
def _store_transposed(shared, mine, t_ptr, t_scale_inv_ptr, columns, P_words, amax_floor, POW2: gl.constexpr):
    """A tile in shared memory, cast along its rows, transposed."""
    C: gl.constexpr = shared.shape[1]
    if shared.dtype == gl.bfloat16:
        words, others = load_words(shared)
        scale_inv = _scale_inv(gl.where(mine, largest(words, others), 0.0), amax_floor, POW2)
        first, second = reciprocal(scale_inv)
        words = gl.where(mine, divide_words(words, others, first[None, :], second[None, :]), 0)
        store_columns(words, scale_inv, t_ptr, t_scale_inv_ptr, columns, P_words)
    else:
        x0, x1, x2, x3 = quarters(shared.load(column_layout(C, gl.num_warps())).to(gl.float32))
        _store_quarters(x0, x1, x2, x3, mine, t_ptr, t_scale_inv_ptr, columns, P_words, amax_floor, POW2)


@launched
@gluon.jit(do_not_specialize=["R"])
def _retile_kernel(
    x_ptr, q_ptr, scale_inv_ptr, t_ptr, t_scale_inv_ptr, offs_ptr, R, K, x_stride, P_words, E, amax_floor,
    POW2: gl.constexpr, ROWWISE: gl.constexpr, GROUPS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """One program: 128 rows of a group × COLUMNS columns, cast along the rows, transposed (t), and as is (q).

    Tiles that no group has are zero in t; those of them that are needed have the rows of no group for q.
    """
    WARPS: gl.constexpr = gl.num_warps()
    BITS: gl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth
    VECTOR: gl.constexpr = 128 // BITS  # columns a thread loads
    LANES: gl.constexpr = COLUMNS // VECTOR if COLUMNS // VECTOR < 8 else 8
    LOAD: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    tile, first_column = gl.program_id(1), gl.program_id(0) * COLUMNS
    start = tile * 128
    rows = R - start
    mine = True
    if GROUPS:
        start, rows, tiles = find_tile(offs_ptr, tile, E, 128, GROUPS)
        mine = tile < tiles
        if ROWWISE:
            start = gl.where(mine, start, gl.load(offs_ptr + E - 1) + (tile - tiles) * 128)
            rows = gl.where(mine, rows, R - start)
    columns = K - first_column
    t_ptr += first_column.to(gl.int64) * P_words + tile * 32
    t_scale_inv_ptr += tile.to(gl.int64) * K + first_column
    if rows <= 0:
        store_nothing(COLUMNS, t_ptr, t_scale_inv_ptr, columns, P_words, amax_floor, POW2)
        return
    if not ROWWISE:
        mine = True  # or it would have no rows
    row = gl.arange(0, 128, gl.SliceLayout(1, LOAD))
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, LOAD))
    x_ptr += start.to(gl.int64) * x_stride + first_column
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    x = gl.load(x_ptr + (row[:, None] * x_stride + column[None, :]), mask=inside, other=0.0)
    shared = gl.allocate_shared_memory(x.dtype, (128, COLUMNS), shared_layout(COLUMNS, BITS), x)
    if ROWWISE:
        wide = shared.load(LOAD).to(gl.float32)  # again: kept until here, registers would spill
        scale_inv = _scale_inv(gl.reduce(gl.abs(wide), 1, _maximum), amax_floor, POW2)
        if x_ptr.dtype.element_ty == gl.bfloat16:
            first, second = reciprocal(scale_inv)
            q = divide(wide, first[:, None], second[:, None]).to(gl.float8e4nv)
        else:
            q = _divide(wide, scale_inv[:, None], _reciprocal(scale_inv)[:, None]).to(gl.float8e4nv)
        gl.store(q_ptr + start.to(gl.int64) * K + first_column + (row[:, None] * K + column[None, :]), q, mask=inside)
        scale_inv_ptr += gl.program_id(0).to(gl.int64) * R + start
        gl.store(scale_inv_ptr + row, scale_inv, mask=row < rows)
    _store_transposed(shared, mine, t_ptr, t_scale_inv_ptr, columns, P_words, amax_floor, POW2)


@launched
@triton.jit
def _quantize_block_kernel(w_ptr, q_ptr, scale_inv_ptr, N, K, amax_floor, POW2: tl.constexpr):
    batch = tl.program_id(2)
    rows = tl.program_id(1) * 128 + tl.arange(0, 128)
    columns = tl.program_id(0) * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    offsets = (batch.to(tl.int64) * N + rows[:, None]) * K + columns[None, :]
    w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale_inv = _scale_inv(tl.reduce(tl.reduce(tl.abs(w), 1, _maximum), 0, _maximum), amax_floor, POW2)
    q = _divide(w, scale_inv, _reciprocal(scale_inv)).to(tl.float8e4nv)
    tl.store(q_ptr + offsets, q, mask=inside)
    block = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(scale_inv_ptr + block, scale_inv)


@launched
@triton.jit
def _dequantize_block_kernel(q_ptr, scale_inv_ptr, w_ptr, N, K):
    batch = tl.program_id(2)
    rows = tl.program_id(1) * 128 + tl.arange(0, 128)
    columns = tl.program_id(0) * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    offsets = (batch.to(tl.int64) * N + rows[:, None]) * K + columns[None, :]
    block = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    wide: tl.constexpr = tl.float64 if w_ptr.dtype.element_ty == tl.float64 else tl.float32
    w = tl.load(q_ptr + offsets, mask=inside, other=0.0).to(tl.float32).to(wide) * tl.load(scale_inv_ptr + block).to(
        wide
    )
    tl.store(w_ptr + offsets, w.to(w_ptr.dtype.element_ty), mask=inside)


def _readable(x: Tensor) -> Tensor:
    """x with contiguous rows, in a dtype that converts to float32 exactly (float64 is rounded to it first)."""
    x = x.float() if x.dtype == torch.float64 else x
    return x if x.stride(-1) == 1 else x.contiguous()


def quantize_tile(x_RK: Tensor, amax_floor: float, pow2: bool, out: tuple[Tensor, Tensor]) -> None:
    """Launcher of `dsv3c::quantize_tile`."""
    x_RK = _readable(x_RK)
    R, K = x_RK.shape
    if x_RK.numel():
        grid = (ceil_div(R, ROWS) * ceil_div(K, TILE),)
        _quantize_tile_kernel[grid](x_RK, *out, R, K, x_RK.stride(0), amax_floor, pow2, ROWS)


def quantize_tile_t(
    x_RK: Tensor, offs: Tensor | None, amax_floor: float, pow2: bool, out: tuple[Tensor, Tensor]
) -> None:
    """Launcher of `dsv3c::quantize_tile_t`."""
    _retile(_readable(x_RK), offs, amax_floor, pow2, None, out)


def quantize_tile_both(
    x_RK: Tensor, offs: Tensor | None, amax_floor: float, pow2: bool, out: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Launcher of `dsv3c::quantize_tile_both`."""
    _retile(_readable(x_RK), offs, amax_floor, pow2, out[:2], out[2:])


def _retile(x_RK, offs, amax_floor, pow2, rowwise, transposed) -> None:
    R, K = x_RK.shape
    t_KP, t_scale_inv = transposed
    P = t_KP.shape[1]
    if t_KP.numel() == 0:
        return
    E, offs = (0, None) if offs is None else (len(offs), offs.contiguous())
    columns, options = _program(rowwise is not None)
    _retile_kernel[(ceil_div(K, columns), P // TILE)](
        x_RK, *(rowwise or (None, None)), t_KP.view(torch.int32), t_scale_inv, offs, R, K, x_RK.stride(0), P // 4, E,
        amax_floor, pow2, rowwise is not None, groups_of(offs), columns, **options,
    )  # fmt: skip


def _program(rowwise: bool) -> tuple[int, dict[str, int]]:
    """Columns and warps of a program of `_retile_kernel`; a tile along the rows takes 128 columns."""
    return (128, {"num_warps": 8, "maxnreg": 64}) if rowwise else (64, {"num_warps": 8})


def quantize_block(w_NK: Tensor, amax_floor: float, pow2: bool, out: tuple[Tensor, Tensor]) -> None:
    """Launcher of `dsv3c::quantize_block`."""
    w_NK = _readable(w_NK).contiguous()
    if w_NK.numel():
        _quantize_block_kernel[_blocks(w_NK)](w_NK, *out, *w_NK.shape[-2:], amax_floor, pow2)


def dequantize_block(w_fp8_NK: Tensor, w_scale_inv: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Launcher of `dsv3c::dequantize_block`."""
    w_fp8_NK = w_fp8_NK.contiguous()
    if out.numel():
        _dequantize_block_kernel[_blocks(out)](w_fp8_NK, w_scale_inv.contiguous(), out, *out.shape[-2:], num_warps=8)


def _blocks(w: Tensor) -> tuple[int, int, int]:
    N, K = w.shape[-2:]
    return ceil_div(K, TILE), ceil_div(N, TILE), w.numel() // (N * K)


def column_major(scale_inv: Tensor) -> Tensor:
    """scale_inv of 1×128 tiles with strides (1, rows), as the operators make it and the kernels read it."""
    return scale_inv if scale_inv.stride(0) == 1 else scale_inv.t().contiguous().t()


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it, 16-byte aligned and contiguous, with the strides of its shape even where a size is 1."""
    x = x.contiguous().view(-1).view(x.shape)
    return x.clone() if x.data_ptr() % 16 else x


def packed(scale_inv: Tensor) -> Tensor:
    """`column_major`, and `dense`: the strides are (1, rows)."""
    return dense(scale_inv.t()).t()


def variants() -> Iterator[Variant]:
    quantized = {"q_ptr": FP8, "scale_inv_ptr": F32, "amax_floor": "fp32"}
    for x in (BF16, F32):
        yield Variant(_quantize_tile_kernel, {"x_ptr": x} | quantized, {"POW2": False, "ROWS": ROWS})
        yield Variant(_quantize_block_kernel, {"w_ptr": x} | quantized, {"POW2": False})
        block = {"q_ptr": FP8, "scale_inv_ptr": F32, "w_ptr": x}
        yield Variant(_dequantize_block_kernel, block, {}, num_warps=8)
    for x, rowwise in ((BF16, False), (F32, False), (BF16, True)):
        for groups in (0, 32):
            pointers = {"x_ptr": x, "t_ptr": I32, "t_scale_inv_ptr": F32}
            pointers |= {"q_ptr": FP8, "scale_inv_ptr": F32} if rowwise else {}
            pointers |= {"offs_ptr": I32} if groups else {}
            columns, options = _program(rowwise)
            flags = {"POW2": False, "ROWWISE": rowwise, "GROUPS": groups, "COLUMNS": columns}
            absent = {n: None for n in _retile_kernel.arg_names if n.endswith("_ptr") and n not in pointers}
            yield Variant(_retile_kernel, pointers | {"amax_floor": "fp32"}, flags | absent, **options)
