"""The 12-bit cast of what is cached for the linear after attention, and back. Memory-bound.

Twelve bits are no address: eight values of a row make three 32-bit words, in one thread (`reference/casts.py` has the
format). Scales are powers of two, so that the division is an exact product, and only rounding loses anything.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels.offline import BF16, F32, I32, Variant
from dsv3c.kernels.quantize import _maximum, _readable, _reciprocal, _scale_inv, column_major
from dsv3c.numerics import TILE, ceil_div

ROWS = 16  # of a program


@triton.jit
def _place(R, K, ROWS: tl.constexpr):
    """This program's tile, its rows, their part of packed rows of 3K/8 words, and of rows of K/8 eights: masks too."""
    tile, block = tl.program_id(0) % tl.cdiv(K, 128), tl.program_id(0) // tl.cdiv(K, 128)
    rows = block * ROWS + tl.arange(0, ROWS)
    eights = tile * 16 + tl.arange(0, 16)
    words = rows[:, None].to(tl.int64) * (3 * K // 8) + 3 * eights[None, :]
    return tile, rows, words, (rows[:, None] < R) & (eights[None, :] * 8 < K)


@triton.jit(do_not_specialize=["R"])
def _quantize_e5m6_kernel(x_ptr, packed_ptr, scale_inv_ptr, R, K, x_stride, amax_floor, ROWS: tl.constexpr):
    tile, rows, words, inside = _place(R, K, ROWS)
    columns = tile * 128 + tl.arange(0, 128)[None, :]
    x_ptr += rows[:, None].to(tl.int64) * x_stride
    x = tl.load(x_ptr + columns, mask=(rows[:, None] < R) & (columns < K), other=0.0).to(tl.float32)
    scale_inv = _scale_inv(tl.reduce(tl.abs(x), 1, _maximum), amax_floor, True, 65024)
    tl.store(scale_inv_ptr + tile.to(tl.int64) * R + rows, scale_inv, mask=rows < R)
    x *= _reciprocal(scale_inv)[:, None]
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) >> 17) - (112 << 6)
    subnormal = (size + 8.0).to(tl.int32, bitcast=True) & 0x7F  # 8 has the spacing of the subnormals: the sum rounds
    code = tl.where(size < 2.0**-14, subnormal, normal)
    code = tl.where(size == size, code, 0x7E0) | ((x.to(tl.int32, bitcast=True) >> 20) & 0x800)
    even, odd = tl.split(tl.reshape(code, (ROWS, 16, 2, 2, 2)))
    first, second = tl.split(even | (odd << 12))  # 24 bits each
    a, c = tl.split(first)
    b, d = tl.split(second)
    tl.store(packed_ptr + words, a | (b << 24), mask=inside)
    tl.store(packed_ptr + words + 1, (b >> 8) | (c << 16), mask=inside)
    tl.store(packed_ptr + words + 2, (c >> 16) | (d << 8), mask=inside)


@triton.jit
def _value(code):
    bits = ((code & 0x800) << 4) | ((code & 0x7FF) << 4)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["R", "scale_stride"])
def _dequantize_e5m6_kernel(packed_ptr, scale_inv_ptr, x_ptr, R, K, scale_stride, ROWS: tl.constexpr):
    tile, rows, words, inside = _place(R, K, ROWS)
    low = tl.load(packed_ptr + words, mask=inside, other=0)
    middle = tl.load(packed_ptr + words + 1, mask=inside, other=0)
    high = tl.load(packed_ptr + words + 2, mask=inside, other=0)
    b = ((low >> 24) & 0xFF) | ((middle & 0xFFFF) << 8)
    c = ((middle >> 16) & 0xFFFF) | ((high & 0xFF) << 16)
    pairs = tl.join(tl.join(low, c), tl.join(b, high >> 8))  # a value takes the bits it needs of them
    x = tl.reshape(tl.join(_value(pairs), _value(pairs >> 12)), (ROWS, 128))
    x *= tl.load(scale_inv_ptr + tile.to(tl.int64) * scale_stride + rows, mask=rows < R, other=0.0)[:, None]
    columns = tile * 128 + tl.arange(0, 128)[None, :]
    out = x_ptr + rows[:, None].to(tl.int64) * K + columns
    tl.store(out, x.to(x_ptr.dtype.element_ty), mask=(rows[:, None] < R) & (columns < K))


def quantize_e5m6(x_RK: Tensor, amax_floor: float, out: tuple[Tensor, Tensor]) -> None:
    """Launcher of `dsv3c::quantize_e5m6`."""
    x_RK, (packed, scale_inv) = _readable(x_RK), out
    R, K = x_RK.shape
    if x_RK.numel():
        grid = (ceil_div(R, ROWS) * ceil_div(K, TILE),)
        words = packed.view(torch.int32)
        _quantize_e5m6_kernel[grid](x_RK, words, scale_inv, R, K, x_RK.stride(0), amax_floor, ROWS)


def dequantize_e5m6(packed: Tensor, scale_inv: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Launcher of `dsv3c::dequantize_e5m6`."""
    R, K = out.shape
    if out.numel():
        grid = (ceil_div(R, ROWS) * ceil_div(K, TILE),)
        words, scale_inv = packed.contiguous().view(torch.int32), column_major(scale_inv)
        _dequantize_e5m6_kernel[grid](words, scale_inv, out, R, K, scale_inv.stride(1), ROWS)


def variants() -> Iterator[Variant]:
    pointers = {"packed_ptr": I32, "scale_inv_ptr": F32}
    for x in (BF16, F32):
        yield Variant(_quantize_e5m6_kernel, {"x_ptr": x} | pointers | {"amax_floor": "fp32"}, {"ROWS": ROWS})
        yield Variant(_dequantize_e5m6_kernel, pointers | {"x_ptr": x}, {"ROWS": ROWS})
