"""What fused producers end with: BF16 values, rounded from float32, quantised to the bits that `quantize.py` gives.

BF16 values come two in a 32-bit word (`pack`), which halves registers and the maxima: one instruction takes the larger
magnitudes of two pairs.

`scale_inv` and `divide` take 2 instructions a value where division takes 8 and `quantize._divide` 3. A quotient is
x·r + x·s with r + s the reciprocal of the divisor to 46 bits. Compared with float32 division: amax/448 is equal for all
2^23 significands. x/scale_inv lies on the same side of every tie of E4M3 for all BF16 x, for every divisor near such a
tie, and for every r within 4 units in the last place; except x = 2^i, scale_inv = 2^j·(1 - 2^-24), which no BF16
maximum has. s is made positive, so that -0 stays -0. A tile that holds NaN or infinity is NaN, scale included.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def pack(low, high):
    """Two float32 numbers rounded to BF16, in one word."""
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def low(word):
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def larger(a, b):
    """The larger of the magnitudes of two pairs, each half for itself; NaN if one is. Signs mean nothing."""
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def magnitude(word):
    """The larger magnitude of a pair, in float32."""
    return tl.maximum(tl.abs(low(word)), tl.abs(high(word)), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def plus(a, b):
    """Both sums, rounded once: as float32 addition and rounding, since a sum near a tie of BF16 is exact there."""
    return tl.inline_asm_elementwise(
        "add.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def times(a, b):
    """Both products, rounded once."""
    return tl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def scale_inv(amax, amax_floor, POW2: tl.constexpr):
    """max(amax, amax_floor)/448 of finite amax, rounded up to a power of two if POW2; NaN of others."""
    amax = tl.maximum(amax, amax_floor, propagate_nan=tl.PropagateNan.ALL)
    quotient = tl.fma(amax, 0.0022321429569274187, amax * -9.978456255721468e-11)  # 1/448 as a sum
    if POW2:  # carry a nonzero mantissa into the exponent, then clear it
        bits = (quotient.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        quotient = tl.where(quotient < float("inf"), bits.to(tl.float32, bitcast=True), quotient)
    return quotient


@triton.jit
def reciprocal(x):
    """1/x as a sum of two numbers, the second positive."""
    near = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    below = (near.to(tl.int32, bitcast=True) - 2).to(tl.float32, bitcast=True)
    return below, tl.fma(-x, below, 1.0) * below


@triton.jit
def divide(x, first, second):
    """x divided by what `first, second` are the reciprocal of."""
    return tl.fma(x, first, x * second)


@triton.jit
def to_fp8(word, first, second):
    """Both BF16 numbers of a word, divided as by `divide`, to E4M3 in 16 bits."""
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;",
        "=h,f,f",
        [divide(low(word), first, second), divide(high(word), first, second)],
        dtype=tl.int16,
        is_pure=True,
        pack=1,
    )


@triton.jit
def store_words(words, q_at, inside, amax_floor, POW2: tl.constexpr):
    """Quantises words [tiles, 64], two neighbouring values each; q_at [tiles, 64], inside [tiles]. The scales."""
    scale = scale_inv(magnitude(tl.reduce(words, 1, larger)), amax_floor, POW2)
    first, second = reciprocal(scale)
    tl.store(q_at, to_fp8(words, first[:, None], second[:, None]), mask=inside[:, None])
    return scale


@triton.jit
def store_tiles(words, q_at, scale_inv_at, inside, amax_floor, POW2: tl.constexpr):
    """`store_words`, and the scales; scale_inv_at [tiles]."""
    tl.store(scale_inv_at, store_words(words, q_at, inside, amax_floor, POW2), mask=inside)


def as_words(x: Tensor) -> Tensor:
    """x [.., K], BF16, as int32 [.., K/2] with contiguous rows; copied if its rows do not begin at a word."""
    begins = x.data_ptr() % 4 == 0 and x.storage_offset() % 2 == 0
    aligned = begins and all(stride % 2 == 0 for stride in x.stride()[:-1])
    x = x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.int32)
