"""Casts to FP8 and back, memory-bound: each value is read once and written once.

Bits equal `reference/casts.py`'s: quotients are correctly rounded (see `_divide`; `/` is not), and the hardware's cast
rounds to nearest even and saturates, which is what clamping first means. Letters and layouts as there.

Instructions are as scarce as bytes: at the speed of a copy a multiprocessor has 22 of them for a BF16 value, and 15 for
an FP8 one that is cast again. So a division is three of them, and what belongs to a tile is computed once or twice and
not by every thread that has a value of it. Neighbouring programs take neighbouring tiles of a row: whole
pages of memory.

The transposing casts (`_retile_kernel`) are in Gluon, which lets a thread have four columns of 16 rows: four scales to
compute for 64 values. The tile waits in shared memory meanwhile and is read from there once for the maxima and once
for the values, so that few registers are taken and enough programs are in flight. Moving single bytes would be the next
bottleneck, so four rows of a column are packed into a word before they are transposed. Many small programs matter more
than few instructions: with all values in registers, 11 instructions a value instead of 13 but programs of 8 warps,
`requantize_t` was a third slower. Tiles without rows, of which many experts make many, are only filled.

H200, 4096 and 32768 rows of 2048 to 24576, in the time of a copy of as many bytes: `quantize_tile` 0.95 to 1.00,
`quantize_tile_t` 0.82 to 0.92, `requantize_t` 0.69 to 0.81, `quantize_tile_both`, 1.5 times as fast as the two casts,
0.79 to 0.86.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsv3c.kernels.groups import tile_map
from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import BF16, F32, FP8, I32, Variant
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


@triton.jit
def _pack(x0, x1, x2, x3):
    """E4M3 of four numbers in one 32-bit word, the first in the lowest byte."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [x0, x1, x2, x3],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _load_tile(shared, row_scales, LAYOUT: gl.constexpr, SCALED: gl.constexpr):
    x = shared.load(LAYOUT).to(gl.float32)
    if SCALED:
        x *= row_scales.load(gl.SliceLayout(1, LAYOUT))[:, None]
    return x


@gluon.jit
def _quarters(x):
    """Rows 4i, 4i + 1, 4i + 2 and 4i + 3 of x [128, C], as four tensors [32, C]; nothing moves."""
    C: gl.constexpr = x.shape[1]
    x = gl.reshape(gl.permute(gl.reshape(x, (32, 2, 2, C)), (0, 3, 1, 2)), (32, C, 2, 2))
    x02, x13 = gl.split(x)
    x0, x2 = gl.split(x02)
    x1, x3 = gl.split(x13)
    return x0, x1, x2, x3


@gluon.jit
def _store_transposed(words, scale_inv, t_ptr, t_scale_inv_ptr, columns, P_words):
    C: gl.constexpr = words.shape[0]
    column = gl.arange(0, C, gl.SliceLayout(1, words.type.layout))[:, None]
    word = gl.arange(0, 32, gl.SliceLayout(0, words.type.layout))[None, :]
    gl.store(t_ptr + (column * P_words + word), words, mask=column < columns)
    column = gl.arange(0, C, scale_inv.type.layout)
    gl.store(t_scale_inv_ptr + column, scale_inv, mask=column < columns)


@launched
@gluon.jit(do_not_specialize=["R", "scale_stride", "E", "bound"])
def _retile_kernel(
    x_ptr, x_scale_inv_ptr, q_ptr, scale_inv_ptr, t_ptr, t_scale_inv_ptr, offs_ptr, tiles_ptr, first_ptr, R, K,
    x_stride, scale_stride, P_words, E, bound, amax_floor, POW2: gl.constexpr, DEQUANTIZE: gl.constexpr,
    ROWWISE: gl.constexpr, GROUPED: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """One program: 128 rows of one group × COLUMNS columns, cast along the rows, transposed (t), and as they are (q).

    Tiles that no group has are zero in t; those of them that are needed have the rows of no group for q.
    """
    WARPS: gl.constexpr = gl.num_warps()
    VECTOR: gl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth  # columns a thread loads
    LOAD: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 * VECTOR // COLUMNS, COLUMNS // VECTOR], [WARPS, 1], [1, 0])
    MAXIMUM: gl.constexpr = gl.BlockedLayout([1, 4], [128 // COLUMNS, COLUMNS // 4], [WARPS, 1], [1, 0])
    DIVIDE: gl.constexpr = gl.BlockedLayout([4, 4], [128 // COLUMNS, COLUMNS // 4], [WARPS, 1], [1, 0])
    STORE: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])  # 16 rows a thread
    column_tile, tile = gl.program_id(0), gl.program_id(1)
    start = tile * 128
    end = R
    row_end = R
    if GROUPED:
        others = tile - gl.load(first_ptr + E)
        mine = others < 0
        start = gl.load(tiles_ptr + bound + tile, mask=mine, other=0)
        end = gl.load(tiles_ptr + 2 * bound + tile, mask=mine, other=0)
        row_end = end
        if ROWWISE:
            start = gl.where(mine, start, gl.load(offs_ptr + E - 1) + others * 128)
            row_end = gl.where(mine, end, R)
    t_ptr += column_tile.to(gl.int64) * COLUMNS * P_words + tile * 32
    t_scale_inv_ptr += tile.to(gl.int64) * K + column_tile * COLUMNS
    if start >= row_end:  # a tile without rows
        nothing = _scale_inv(gl.full([COLUMNS], 0.0, gl.float32, gl.SliceLayout(0, MAXIMUM)), amax_floor, POW2)
        words = gl.full([COLUMNS, 32], 0, gl.int32, STORE)
        _store_transposed(words, nothing, t_ptr, t_scale_inv_ptr, K - column_tile * COLUMNS, P_words)
        return
    row = start + gl.arange(0, 128, gl.SliceLayout(1, LOAD))
    columns = column_tile * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, LOAD))
    row_64 = row[:, None].to(gl.int64)
    inside = (row[:, None] < row_end) & (columns[None, :] < K)
    x = gl.load(x_ptr + row_64 * x_stride + columns[None, :], mask=inside, other=0.0)
    shared = gl.allocate_shared_memory(x.dtype, (128, COLUMNS), gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    row_scales = gl.allocate_shared_memory(gl.float32, (128,), gl.SwizzledSharedLayout(1, 1, 1, [0]))
    shared.store(x)
    if DEQUANTIZE:
        scaled = start + gl.arange(0, 128, gl.BlockedLayout([1], [32], [WARPS], [0]))
        x_scale_inv_ptr += column_tile * COLUMNS // 128 * scale_stride
        row_scales.store(gl.load(x_scale_inv_ptr + scaled, mask=scaled < end, other=0.0))
    if ROWWISE:  # in quarters, which take few registers
        ROW: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
        columns = column_tile * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, ROW))
        for first_row in gl.static_range(0, 128, 32):
            row = start + first_row + gl.arange(0, 32, gl.SliceLayout(1, ROW))
            wide = shared.slice(first_row, 32).load(ROW).to(gl.float32)
            scale_inv = _scale_inv(gl.reduce(gl.abs(wide), 1, _maximum), amax_floor, POW2)
            q = _divide(wide, scale_inv[:, None], _reciprocal(scale_inv)[:, None]).to(gl.float8e4nv)
            inside = (row[:, None] < row_end) & (columns[None, :] < K)
            gl.store(q_ptr + row[:, None].to(gl.int64) * K + columns[None, :], q, mask=inside)
            gl.store(scale_inv_ptr + column_tile.to(gl.int64) * R + row, scale_inv, mask=row < row_end)
    # The same values twice, in two layouts: one would keep them in registers from the maximum to the division.
    amax = gl.reduce(gl.abs(_load_tile(shared, row_scales, MAXIMUM, DEQUANTIZE)), 0, _maximum)
    if ROWWISE and GROUPED:
        amax = gl.where(mine, amax, 0.0)
    scale_inv = _scale_inv(amax, amax_floor, POW2)
    x0, x1, x2, x3 = _quarters(_load_tile(shared, row_scales, DIVIDE, DEQUANTIZE))
    COLUMN: gl.constexpr = gl.SliceLayout(0, x0.type.layout)
    divisor = gl.convert_layout(scale_inv, COLUMN)[None, :]
    factor = gl.convert_layout(_reciprocal(scale_inv), COLUMN)[None, :]
    words = _pack(
        _divide(x0, divisor, factor), _divide(x1, divisor, factor),
        _divide(x2, divisor, factor), _divide(x3, divisor, factor),
    )  # fmt: skip
    if ROWWISE and GROUPED:
        words = gl.where(mine, words, 0)
    words = gl.convert_layout(gl.permute(words, (1, 0)), STORE)
    _store_transposed(words, scale_inv, t_ptr, t_scale_inv_ptr, K - column_tile * COLUMNS, P_words)


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
    _retile(_readable(x_RK), None, offs, amax_floor, pow2, None, out)


def quantize_tile_both(
    x_RK: Tensor, offs: Tensor | None, amax_floor: float, pow2: bool, out: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Launcher of `dsv3c::quantize_tile_both`."""
    _retile(_readable(x_RK), None, offs, amax_floor, pow2, out[:2], out[2:])


def requantize_t(
    x_fp8_RK: Tensor,
    x_scale_inv: Tensor,
    offs: Tensor | None,
    amax_floor: float,
    pow2: bool,
    out: tuple[Tensor, Tensor],
) -> None:
    """Launcher of `dsv3c::requantize_t`."""
    _retile(_readable(x_fp8_RK), column_major(x_scale_inv), offs, amax_floor, pow2, None, out)


def _retile(x_RK, x_scale_inv, offs, amax_floor, pow2, rowwise, transposed) -> None:
    R, K = x_RK.shape
    t_KP, t_scale_inv = transposed
    P = t_KP.shape[1]
    if t_KP.numel() == 0:
        return
    tiles, first = (None, None) if offs is None else tile_map(offs, R, TILE)
    E, bound = (0, 0) if offs is None else (len(offs), tiles.shape[1])
    scale_stride = 0 if x_scale_inv is None else x_scale_inv.stride(1)
    columns, warps = _tile_of(rowwise is not None)
    _retile_kernel[(ceil_div(K, columns), P // TILE)](
        x_RK, x_scale_inv, *(rowwise or (None, None)), t_KP.view(torch.int32), t_scale_inv, offs, tiles, first, R, K,
        x_RK.stride(0), scale_stride, P // 4, E, bound, amax_floor, pow2, x_scale_inv is not None,
        rowwise is not None, offs is not None, columns, num_warps=warps,
    )  # fmt: skip


def _tile_of(rowwise: bool) -> tuple[int, int]:
    """Columns and warps of a program of `_retile_kernel`; a tile along the rows takes 128 columns."""
    return (128, 4) if rowwise else (64, 2)


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


def variants() -> Iterator[Variant]:
    quantized = {"q_ptr": FP8, "scale_inv_ptr": F32, "amax_floor": "fp32"}
    for x in (BF16, F32):
        yield Variant(_quantize_tile_kernel, {"x_ptr": x} | quantized, {"POW2": False, "ROWS": ROWS})
        yield Variant(_quantize_block_kernel, {"w_ptr": x} | quantized, {"POW2": False})
        block = {"q_ptr": FP8, "scale_inv_ptr": F32, "w_ptr": x}
        yield Variant(_dequantize_block_kernel, block, {}, num_warps=8)
    for x, dequantize, rowwise in ((BF16, False, False), (F32, False, False), (FP8, True, False), (BF16, False, True)):
        for grouped in (False, True):
            pointers = {"x_ptr": x, "t_ptr": I32, "t_scale_inv_ptr": F32}
            pointers |= {"x_scale_inv_ptr": F32} if dequantize else {}
            pointers |= {"q_ptr": FP8, "scale_inv_ptr": F32} if rowwise else {}
            pointers |= {"offs_ptr": I32, "tiles_ptr": I32, "first_ptr": I32} if grouped else {}
            columns, warps = _tile_of(rowwise)
            flags = {"POW2": False, "DEQUANTIZE": dequantize, "ROWWISE": rowwise, "GROUPED": grouped}
            absent = {n: None for n in _retile_kernel.arg_names if n.endswith("_ptr") and n not in pointers}
            yield Variant(
                _retile_kernel,
                pointers | {"amax_floor": "fp32"},
                flags | absent | {"COLUMNS": columns},
                num_warps=warps,
            )
