"""Casts to FP8 and back, memory-bound: each value is read once and written once.

Bits equal `reference.py`'s: quotients are correctly rounded (see `_divide`; `/` is not), and the hardware's cast rounds
to nearest even and saturates, which is what clamping first means. Letters and layouts as there.

The transposing casts write 128 tokens of one feature contiguously. Moving single bytes through shared memory would be
the bottleneck, so four neighbouring rows travel as four tensors and are packed into 32-bit words before the
transposition.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels.groups import tile_map
from dsv3c.kernels.offline import BF16, F32, FP8, I32, Variant
from dsv3c.numerics import TILE, ceil_div


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _scale_inv(amax, amax_floor, POW2: tl.constexpr):
    scale_inv = tl.div_rn(_maximum(amax, amax_floor), 448.0)
    if POW2:  # the next power of two: carry a nonzero mantissa into the exponent, then clear it
        bits = (scale_inv.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale_inv = tl.where(scale_inv < float("inf"), bits.to(tl.float32, bitcast=True), scale_inv)
    return scale_inv


@triton.jit
def _divide(x, scale_inv):
    """x / scale_inv, correctly rounded: the product with the reciprocal, and one correction by the exact remainder.

    Four instructions a value instead of a division. Compared with division for all 2^23 significands of scale_inv, at
    every x around every tie of E4M3: no difference. The remainder is exact down to scale_inv = 2^-93, far below what
    `MIN_AMAX_FLOOR` allows. It is taken as quotient·scale_inv − x, so that −0 stays −0.
    """
    reciprocal = tl.div_rn(1.0, scale_inv)
    quotient = x * reciprocal
    return tl.fma(tl.fma(quotient, scale_inv, -x), -reciprocal, quotient)


@triton.jit(do_not_specialize=["R"])  # numbers of tokens: each would otherwise be compiled anew
def _quantize_tile_kernel(
    x_ptr, q_ptr, scale_inv_ptr, R, K, x_stride, amax_floor, POW2: tl.constexpr, ROWS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < R) & (columns[None, :] < K)
    offsets = rows[:, None].to(tl.int64)
    x = tl.load(x_ptr + offsets * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    scale_inv = _scale_inv(tl.reduce(tl.abs(x), 1, _maximum), amax_floor, POW2)
    q = _divide(x, scale_inv[:, None]).to(tl.float8e4nv)
    tl.store(q_ptr + offsets * K + columns[None, :], q, mask=inside)
    tl.store(scale_inv_ptr + tl.program_id(1) * R + rows, scale_inv, mask=rows < R)


@triton.jit
def _load_rows(x_ptr, x_scale_inv_ptr, row, end, columns, K, x_stride, DEQUANTIZE: tl.constexpr):
    """Rows `row` of the columns in float32; zero from `end` on."""
    inside = (row[:, None] < end) & (columns[None, :] < K)
    x = tl.load(x_ptr + row[:, None].to(tl.int64) * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if DEQUANTIZE:
        x = x * tl.load(x_scale_inv_ptr + row, mask=row < end, other=0.0)[:, None]
    return x


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


@triton.jit(do_not_specialize=["R", "scale_stride", "E", "bound"])
def _quantize_tile_t_kernel(
    x_ptr, x_scale_inv_ptr, q_ptr, scale_inv_ptr, tiles_ptr, first_ptr, R, K, x_stride, scale_stride, P_words, E, bound,
    amax_floor, POW2: tl.constexpr, DEQUANTIZE: tl.constexpr, GROUPED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: 128 rows of one group × COLUMNS columns. Tiles that no group has are written as zeros."""
    tile = tl.program_id(0)
    if GROUPED:
        mine = tile < tl.load(first_ptr + E)
        start = tl.load(tiles_ptr + bound + tile, mask=mine, other=0)
        end = tl.load(tiles_ptr + 2 * bound + tile, mask=mine, other=0)
    else:
        start = tile * 128
        end = R
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if DEQUANTIZE:  # COLUMNS divides 128: they lie in one tile of x
        x_scale_inv_ptr += tl.program_id(1) * COLUMNS // 128 * scale_stride
    row = start + 4 * tl.arange(0, 32)
    x0 = _load_rows(x_ptr, x_scale_inv_ptr, row, end, columns, K, x_stride, DEQUANTIZE)
    x1 = _load_rows(x_ptr, x_scale_inv_ptr, row + 1, end, columns, K, x_stride, DEQUANTIZE)
    x2 = _load_rows(x_ptr, x_scale_inv_ptr, row + 2, end, columns, K, x_stride, DEQUANTIZE)
    x3 = _load_rows(x_ptr, x_scale_inv_ptr, row + 3, end, columns, K, x_stride, DEQUANTIZE)
    amax = _maximum(_maximum(tl.abs(x0), tl.abs(x1)), _maximum(tl.abs(x2), tl.abs(x3)))
    scale_inv = _scale_inv(tl.reduce(amax, 0, _maximum), amax_floor, POW2)
    divisor = scale_inv[None, :]
    words = _pack(_divide(x0, divisor), _divide(x1, divisor), _divide(x2, divisor), _divide(x3, divisor))
    out = columns[:, None].to(tl.int64) * P_words + tile * 32 + tl.arange(0, 32)[None, :]
    tl.store(q_ptr + out, tl.trans(words), mask=columns[:, None] < K)
    tl.store(scale_inv_ptr + tile.to(tl.int64) * K + columns, scale_inv, mask=columns < K)


@triton.jit
def _quantize_block_kernel(w_ptr, q_ptr, scale_inv_ptr, N, K, amax_floor, POW2: tl.constexpr):
    batch = tl.program_id(2)
    rows = tl.program_id(1) * 128 + tl.arange(0, 128)
    columns = tl.program_id(0) * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    offsets = (batch.to(tl.int64) * N + rows[:, None]) * K + columns[None, :]
    w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale_inv = _scale_inv(tl.reduce(tl.reduce(tl.abs(w), 1, _maximum), 0, _maximum), amax_floor, POW2)
    q = _divide(w, scale_inv).to(tl.float8e4nv)
    tl.store(q_ptr + offsets, q, mask=inside)
    block = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(scale_inv_ptr + block, scale_inv)


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
    if x_RK.numel() == 0:
        return
    rows = 16
    grid = (ceil_div(R, rows), ceil_div(K, TILE))
    _quantize_tile_kernel[grid](x_RK, *out, R, K, x_RK.stride(0), amax_floor, pow2, rows)


def quantize_tile_t(
    x_RK: Tensor, offs: Tensor | None, amax_floor: float, pow2: bool, out: tuple[Tensor, Tensor]
) -> None:
    """Launcher of `dsv3c::quantize_tile_t`."""
    _transposed(_readable(x_RK), None, offs, amax_floor, pow2, out)


def requantize_t(
    x_fp8_RK: Tensor,
    x_scale_inv: Tensor,
    offs: Tensor | None,
    amax_floor: float,
    pow2: bool,
    out: tuple[Tensor, Tensor],
) -> None:
    """Launcher of `dsv3c::requantize_t`."""
    _transposed(_readable(x_fp8_RK), column_major(x_scale_inv), offs, amax_floor, pow2, out)


def _transposed(x_RK, x_scale_inv, offs, amax_floor, pow2, out) -> None:
    R, K = x_RK.shape
    q_KP, scale_inv = out
    P = q_KP.shape[1]
    if q_KP.numel() == 0:
        return
    tiles, first = (None, None) if offs is None else tile_map(offs, R, TILE)
    E, bound = (0, 0) if offs is None else (len(offs), tiles.shape[1])
    dequantize = x_scale_inv is not None
    columns = 32 if dequantize else 64
    scale_stride = x_scale_inv.stride(1) if dequantize else 0
    _quantize_tile_t_kernel[(P // TILE, ceil_div(K, columns))](
        x_RK, x_scale_inv, q_KP.view(torch.int32), scale_inv, tiles, first, R, K, x_RK.stride(0), scale_stride, P // 4,
        E, bound, amax_floor, pow2, dequantize, offs is not None, columns,
    )  # fmt: skip


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
        yield Variant(_quantize_tile_kernel, {"x_ptr": x} | quantized, {"POW2": False, "ROWS": 16})
        yield Variant(_quantize_block_kernel, {"w_ptr": x} | quantized, {"POW2": False})
        block = {"q_ptr": FP8, "scale_inv_ptr": F32, "w_ptr": x}
        yield Variant(_dequantize_block_kernel, block, {}, num_warps=8)
    for x, dequantize in ((BF16, False), (F32, False), (FP8, True)):
        for grouped in (False, True):
            constants = {
                "POW2": False,
                "DEQUANTIZE": dequantize,
                "GROUPED": grouped,
                "COLUMNS": 32 if dequantize else 64,
            }
            arguments = {"x_ptr": x} | quantized | {"q_ptr": I32}
            arguments |= {"x_scale_inv_ptr": F32} if dequantize else {}
            constants |= {} if dequantize else {"x_scale_inv_ptr": None}
            arguments |= {"tiles_ptr": I32, "first_ptr": I32} if grouped else {}
            constants |= {} if grouped else {"tiles_ptr": None, "first_ptr": None}
            yield Variant(_quantize_tile_t_kernel, arguments, constants)
