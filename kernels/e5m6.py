"""The 12-bit cast of what is cached for the linear after attention, and back. Memory-bound.

Twelve bits are no address: eight values of a row make three 32-bit words (`reference/casts.py` has the format). Stores
of such words, each a part of a sector, took six times as long as the bytes. So a thread has 32 values, whose 12 words
are three vectors of 16 bytes; a fourth, of nothing, makes them a tensor, which goes through shared memory to where
neighbouring threads store neighbouring vectors. In Gluon, which takes these layouts as they are.

Scales are powers of two, so that the division is an exact product, and only rounding loses anything.

H200, 4096 rows of 16384, in the time of a copy of as many bytes: 0.89, and back 0.96.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import BF16, F32, I32, Variant
from dsv3c.kernels.quantize import _maximum, _readable, _reciprocal, _scale_inv, column_major, dense
from dsv3c.numerics import TILE, ceil_div

ROWS, WARPS = 32, 4  # of a program


@gluon.jit
def _halves(x):
    """x[:, 0::2] and x[:, 1::2]."""
    return gl.split(gl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@gluon.jit
def _quarters(x):
    """x[:, 0::4] to x[:, 3::4]."""
    even, odd = _halves(x)
    x0, x2 = _halves(even)
    x1, x3 = _halves(odd)
    return x0, x1, x2, x3


@gluon.jit
def _interleave(x0, x1, x2, x3):
    """What `_quarters` takes apart."""
    x = gl.join(gl.join(x0, x2), gl.join(x1, x3))
    return gl.reshape(x, (x0.shape[0], 4 * x0.shape[1]))


@gluon.jit
def _values(ptr, row_stride, first, tile, R, K, LAYOUT: gl.constexpr, ROWS: gl.constexpr):
    """Pointers to a tile of values, and their mask."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
    ptr += first * row_stride + tile * 128
    mask = (row < R - first)[:, None] & (column < K - tile * 128)[None, :]
    return ptr + (row[:, None] * row_stride + column[None, :]), mask


@gluon.jit
def _words(ptr, row_words, first, tile, R, LAYOUT: gl.constexpr, ROWS: gl.constexpr):
    """Pointers to the words of a tile, 12 of each 16, and their mask."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    place = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    word = place // 16 * 12 + place % 16
    ptr += first * row_words + tile * 48
    mask = (row < R - first)[:, None] & ((place % 16 < 12) & (word < row_words - tile * 48))[None, :]
    return ptr + (row[:, None] * row_words + word[None, :]), mask


@launched
@gluon.jit(do_not_specialize=["R"])
def _quantize_e5m6_kernel(x_ptr, packed_ptr, scale_inv_ptr, R, K, row_words, x_stride, amax_floor, ROWS: gl.constexpr):
    WARPS: gl.constexpr = gl.num_warps()
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    PACK: gl.constexpr = gl.BlockedLayout([1, 32], [8, 4], [WARPS, 1], [1, 0])
    STORE: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])
    tile, first = gl.program_id(0), gl.program_id(1).to(gl.int64) * ROWS
    at, inside = _values(x_ptr, x_stride, first, tile, R, K, LOAD, ROWS)
    x = gl.convert_layout(gl.load(at, mask=inside, other=0.0), PACK).to(gl.float32)
    scale_inv = _scale_inv(gl.reduce(gl.abs(x), 1, _maximum), amax_floor, True, 65024)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, PACK))
    gl.store(scale_inv_ptr + (tile.to(gl.int64) * R + first) + row, scale_inv, mask=row < R - first)
    x *= _reciprocal(scale_inv)[:, None]
    # Added to a number 2^17 times its own power of two, x keeps 6 bits of mantissa; then it is a float16.
    power = (x.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    power = gl.maximum(power, 2.0**-14)
    rounded = gl.fma(power, 1.5 * 2.0**17, x)
    rounded = gl.fma(power, -1.5 * 2.0**17, rounded).to(gl.int32, bitcast=True)
    rounded = (rounded & 0x7FFFFFFF) | (x.to(gl.int32, bitcast=True) & -0x80000000)  # -0 too
    even, odd = _halves(rounded.to(gl.float32, bitcast=True))
    pair = gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )
    a, b, c, d = _quarters(((pair >> 4) & 0xFFF) | ((pair >> 8) & 0xFFF000))
    x0, x1, x2, x3 = _quarters(a | (b << 24))
    y0, y1, y2, y3 = _quarters((b >> 8) | (c << 16))
    z0, z1, z2, z3 = _quarters((c >> 16) | (d << 8))
    nothing = gl.zeros_like(x0)
    words = _interleave(
        _interleave(x0, y1, z2, nothing), _interleave(y0, z1, x3, nothing),
        _interleave(z0, x2, y3, nothing), _interleave(x1, y2, z3, nothing),
    )  # fmt: skip
    at, inside = _words(packed_ptr, row_words, first, tile, R, STORE, ROWS)
    gl.store(at, gl.convert_layout(words, STORE), mask=inside)


@gluon.jit
def _value(code):
    bits = ((code & 0x800) << 4) | ((code & 0x7FF) << 4)
    return bits.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@launched
@gluon.jit(do_not_specialize=["R", "scale_stride"])
def _dequantize_e5m6_kernel(packed_ptr, scale_inv_ptr, x_ptr, R, K, row_words, scale_stride, ROWS: gl.constexpr):
    WARPS: gl.constexpr = gl.num_warps()
    LOAD: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])
    UNPACK: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [WARPS, 1], [1, 0])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    tile, first = gl.program_id(0), gl.program_id(1).to(gl.int64) * ROWS
    at, inside = _words(packed_ptr, row_words, first, tile, R, LOAD, ROWS)
    v0, v1, v2, v3 = _quarters(gl.convert_layout(gl.load(at, mask=inside, other=0), UNPACK))
    x0, y1, z2, _ = _quarters(v0)
    y0, z1, x3, _ = _quarters(v1)
    z0, x2, y3, _ = _quarters(v2)
    x1, y2, z3, _ = _quarters(v3)
    x, y, z = _interleave(x0, x1, x2, x3), _interleave(y0, y1, y2, y3), _interleave(z0, z1, z2, z3)
    # a value takes the bits it needs of them
    pairs = _interleave(x, ((x >> 24) & 0xFF) | (y << 8), ((y >> 16) & 0xFFFF) | (z << 16), z >> 8)
    x = gl.reshape(gl.join(_value(pairs), _value(pairs >> 12)), (ROWS, 128))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, x.type.layout))
    scale_inv_ptr += tile.to(gl.int64) * scale_stride + first
    x *= gl.load(scale_inv_ptr + row, mask=row < R - first, other=0.0)[:, None]
    at, inside = _values(x_ptr, K, first, tile, R, K, STORE, ROWS)
    gl.store(at, gl.convert_layout(x.to(x_ptr.dtype.element_ty), STORE), mask=inside)


def quantize_e5m6(x_RK: Tensor, amax_floor: float, out: tuple[Tensor, Tensor]) -> None:
    """Launcher of `dsv3c::quantize_e5m6`."""
    x_RK, (packed, scale_inv) = _readable(x_RK), out
    R, K = x_RK.shape
    if x_RK.numel():
        words = packed.view(torch.int32)
        _quantize_e5m6_kernel[_grid(R, K)](
            x_RK, words, scale_inv, R, K, 3 * K // 8, x_RK.stride(0), amax_floor, ROWS, num_warps=WARPS
        )


def dequantize_e5m6(packed: Tensor, scale_inv: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Launcher of `dsv3c::dequantize_e5m6`."""
    R, K = out.shape
    if out.numel():
        words, scale_inv = dense(packed).view(torch.int32), column_major(scale_inv)
        _dequantize_e5m6_kernel[_grid(R, K)](
            words, scale_inv, out, R, K, 3 * K // 8, scale_inv.stride(1), ROWS, num_warps=WARPS
        )


def _grid(R: int, K: int) -> tuple[int, int]:
    return ceil_div(K, TILE), ceil_div(R, ROWS)


def variants() -> Iterator[Variant]:
    pointers, constants = {"packed_ptr": I32, "scale_inv_ptr": F32}, {"ROWS": ROWS}
    for x in (BF16, F32):
        quantize = {"x_ptr": x} | pointers | {"amax_floor": "fp32"}
        yield Variant(_quantize_e5m6_kernel, quantize, constants, num_warps=WARPS)
        yield Variant(_dequantize_e5m6_kernel, pointers | {"x_ptr": x}, constants, num_warps=WARPS)
