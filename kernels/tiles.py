"""What fused producers end with: BF16 values, rounded from float32, quantised to the bits that `quantize.py` gives.

BF16 values come two in a 32-bit word (`pack`), which halves registers and the maxima: magnitudes of BF16 are ordered
as unsigned integers, infinity and NaN above everything, so that one instruction takes the larger of two pairs.

`scale_inv` and `divide` take 2 instructions a value where division takes 8 and `quantize._divide` 3. A quotient is
x·r + x·s with r + s the reciprocal of the divisor to 46 bits. Compared with float32 division: amax/448 is equal for all
2^23 significands. x/scale_inv lies on the same side of every tie of E4M3 for all BF16 x, for every divisor near such a
tie, and for every r within 4 units in the last place; except x = 2^i, scale_inv = 2^j·(1 - 2^-24), which no BF16
maximum has. s is made positive, so that -0 stays -0. A tile that holds NaN or infinity is NaN, scale included.
"""

import triton
import triton.language as tl


@triton.jit
def pack(low, high):
    """Two float32 numbers rounded to BF16, in one word."""
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def rounded(x):
    """float32, rounded to BF16: the high half of a word whose low half is zero. One instruction."""
    return pack(tl.zeros_like(x), x).to(tl.float32, bitcast=True)


@triton.jit
def low(word):
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def magnitudes(word):
    return word & 0x7FFF7FFF


@triton.jit
def larger(a, b):
    """The larger of two pairs of magnitudes, each half for itself."""
    return tl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


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
def store_tiles(x, q_at, scale_inv_at, inside, amax_floor, POW2: tl.constexpr):
    """BF16 values x [tiles, 128], given in float32, quantised; q_at [tiles, 128], scale_inv_at [tiles], inside [tiles]."""
    amax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    scale = scale_inv(amax, amax_floor, POW2)
    first, second = reciprocal(scale)
    tl.store(q_at, divide(x, first[:, None], second[:, None]).to(tl.float8e4nv), mask=inside[:, None])
    tl.store(scale_inv_at, scale, mask=inside)
