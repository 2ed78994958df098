"""Formats, the recipe, and the error bounds that every numerics test uses.

One word, one meaning: `scale_inv` multiplies to dequantise (x ≈ x_fp8 · scale_inv). A *tile* is 1×128 values of an
activation or gradient, a *block* 128×128 values of a weight; each has one float32 scale_inv.

The bounds are derived here and nowhere else; a test file holds no tolerance. `norm` below is sqrt(Σ_k a_k² b_k²) of the
dequantised operands: the size of a sum of products whose signs are random, hence the natural unit of its errors.
"""

from dataclasses import dataclass
from math import log, sqrt

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E5M6_MAX = 65024.0  # (2 - 2^-6) · 2^15
TILE = 128
# A smaller floor would make quotients and products of scale_invs leave the normal range of float32.
MIN_AMAX_FLOOR = 2.0**-64


@dataclass(frozen=True)
class Recipe:
    """What is quantised how. The defaults are DeepSeek-V3's (report §3.3): E4M3 for everything, online amax.

    `amax_floor` keeps scale_inv of an all-zero tile finite. V3's is 1e-4, for which anything below 2e-10 is zero; dy
    gets there without a loss scale, in a mean over millions of tokens. So gradients have their own floor, the least
    possible. `pow2` rounds scale_inv up to a power of two (ue8m0): the division is then exact.
    """

    amax_floor: float = 1e-4
    gradient_amax_floor: float = MIN_AMAX_FLOOR
    pow2: bool = False


def ceil_div(n, d):
    """⌈n/d⌉, for ints and SymInts."""
    return (n + d - 1) // d


def round_up(n, d):
    """The least multiple of d that is at least n, for ints and SymInts."""
    return ceil_div(n, d) * d


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest in the normal range: half the spacing at 1 (2^-4 for E4M3)."""
    return torch.finfo(dtype).eps / 2


def cast_bound(x: Tensor, scale_inv: Tensor) -> Tensor:
    """Largest |x − q·scale_inv|, element by element; `scale_inv` broadcast to x's shape.

    q rounds x/scale_inv to E4M3: relative error 2^-4 in the normal range, and half the subnormal spacing, 2^-10, below
    it. The float32 division before it, and saturation at 448 where that division rounded up, cost 2^-23 of |x| each.
    """
    x, scale_inv = x.double().abs(), scale_inv.double()
    rounded = torch.maximum(unit_roundoff(E4M3) * x, 2.0**-10 * scale_inv)
    return rounded + 2.0**-22 * x


def quantized_gemm_rms() -> float:
    """RMS error, in units of `norm`, that quantising both operands of a product adds, whatever computes it.

    Each factor's relative error is at most 2^-4 and uniform within its interval, hence 2^-4/sqrt(3) in RMS; two
    independent factors. Subnormals add at most 2^-10/448 · 128 of a block's RMS (amax ≤ 128 · RMS in 128×128 values).
    """
    relative = unit_roundoff(E4M3) / sqrt(3)
    subnormal = 2.0**-10 / E4M3_MAX * TILE
    return sqrt(2 * (relative**2 + subnormal**2))


def accumulate_rms(contraction: int, device: str) -> float:
    """RMS error of the sum itself, in units of `norm`, for products exact to float32 and signs that are random.

    CPU: dequantised operands (3 roundings a term), then one float32 sum in any order: `contraction` additions, each
    rounding a partial sum that is at most `norm` in RMS. Errors of independent roundings add as squares.

    CUDA: one instruction of a Hopper tensor core adds 32 products and the accumulator after shifting all 33 to the
    largest exponent and cutting at 13 fraction bits (V3 report §3.3.2: "around 14 bits"). A cut costs at most 2^-13
    of the largest addend, 2^-13/sqrt(3) in RMS. That addend squared is at most the sum of a product's and the partial
    sum's square, both at most norm² of the 128 values; 4 instructions, 33 cuts each. Sums of 128 are then promoted: a
    float32 product of two scale_invs, and a fused multiply-add per 128 of the contraction.
    """
    u = unit_roundoff(torch.float32)
    if device == "cpu":
        return u * sqrt(contraction + 3)
    cut = 2.0**-13 / sqrt(3) * sqrt(4 * 33 * 2)
    return sqrt(cut**2 + u**2 * (ceil_div(contraction, TILE) + 2))


def gemm_bounds(reference: Tensor, norm: Tensor, dtype: torch.dtype, contraction: int) -> tuple[Tensor, float]:
    """How far a GEMM may be from `reference`, its float64 value on the same quantised operands.

    Returns the bound of |out − reference| element by element, and of the RMS of (out − reference)/norm over all
    elements. The output is rounded once: u(dtype)·|reference|. The sum's error is a sum of many bounded independent
    errors, so it passes 8 times its RMS with probability below 2·exp(−32) ≈ 3e-14 (Hoeffding): never, in a test of
    10^9 elements.
    """
    u = unit_roundoff(dtype)
    accumulated = accumulate_rms(contraction, reference.device.type)
    reached = norm > 0
    ratio = (reference[reached] / norm[reached]).square().mean() if reached.any() else reference.new_zeros(())
    element = u * reference.abs() + 8 * accumulated * norm * (1 + u)
    return element, sqrt(u**2 * float(ratio) + accumulated**2)


# -- fused producers --
#
# A producer computes in float32, rounds to BF16, and quantises. Rounding is monotone: an evaluation within `error` of
# the value gives a BF16 number between the roundings of value - error and value + error, nearly always the same one;
# and the same holds for the quotients by a tile's scale_inv.


def rounded_between(value: Tensor, error: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """The least and the largest result of a float32 evaluation within `error` of float64 `value`, rounded to dtype."""
    return (value - error).float().to(dtype), (value + error).float().to(dtype)


def sigmoid_bound(x: Tensor) -> Tensor:
    """Largest relative error of 1/(1 + exp(-x)) in float32, on a GPU with exp2 and the reciprocal approximated.

    x·log₂e has a rounding of its own and the constant's, which exp2 turns into relative errors of |x|u each; exp2 is
    within 2^-22 = 4u, the sum is rounded once, the reciprocal is within 2u. Where exp overflows the result is 0.
    """
    u = unit_roundoff(torch.float32)
    return (2 * x.double().abs() + 7) * u


def swiglu_bound(gate: Tensor, a: Tensor) -> Tensor:
    """Largest error of a = silu(gate)·up·weight: the sigmoid's and three products'; all of a where exp overflows."""
    return torch.where(gate < -87, 1, sigmoid_bound(gate) + 3 * unit_roundoff(torch.float32)) * a.abs()


def swiglu_gradient_bound(gate: Tensor, dup: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Largest errors of dgate = factor·(s + silu(gate)(1 - s)), factor = da·weight·up, and of dup = da·weight·silu.

    dup as a. Within dgate's bracket: silu - silu·s and s have relative errors of at most δ + u, the sigmoid's δ and a
    product's, in each occurrence of s and silu, and the bracket, at most 1.1, is rounded twice; then three products.
    Where exp overflows, the bracket is 0 and should be less than 2^-100.
    """
    gate, u = gate.double(), unit_roundoff(torch.float32)
    relative, sigmoid = sigmoid_bound(gate) + 5 * u, gate.sigmoid()
    bracket = relative * (2 * (gate * sigmoid).abs() + sigmoid + 1.1)
    return factor.abs() * (bracket + 2.0**-100), swiglu_bound(gate, dup)


def sum_bound(terms: Tensor, depth: int, dim: int = -1) -> Tensor:
    """Largest error of the float32 sum of `terms` over dim, each of which goes through at most `depth` roundings, those
    of its own computation included."""
    return depth * unit_roundoff(torch.float32) * terms.abs().sum(dim)


# Roundings of a term of a row's sum in the kernels: 32 values a thread, up to 1024 threads, and three for the term.
ROW_DEPTH = 32 + 10 + 3


def rstd_bound() -> float:
    """Largest relative error of 1/sqrt(mean x² + eps): the positive terms' relative error, a quotient within 4u and a
    sum, halved by the root; the root's own, within 4u."""
    return ((ROW_DEPTH + 5) / 2 + 4) * unit_roundoff(torch.float32)


def norm_gradient_bound(dnormed: Tensor, normed: Tensor, rstd: Tensor, dx: Tensor) -> Tensor:
    """Largest error of dx = rstd·(dnormed - normed·mean(dnormed·normed)) (+ what is added) before it is rounded.

    The mean's is that of its sum, and a quotient's within 4u. Then normed, three products and two sums, a rounding each
    of one of the two terms or of dx.
    """
    u, terms = unit_roundoff(torch.float32), dnormed * normed
    mean, error = terms.mean(-1, keepdim=True).abs(), sum_bound(terms, ROW_DEPTH + 4)[..., None] / terms.shape[-1]
    return rstd[..., None] * (normed.abs() * (error + 6 * u * mean) + 6 * u * dnormed.abs()) + u * dx.abs()


def attention_bounds(
    reference: Tensor, norm: Tensor, score: float, keys: int, terms: int
) -> tuple[Tensor, float, float]:
    """How far attention may be from `reference` [.., V], its float64 value softmax(q·k · softmax_scale) v.

    `norm` is sqrt(Σ p² v²) over the keys, p the probabilities: the size of a sum of p·v whose signs are random. `score`
    bounds |q·k| and sqrt(Σ q²k²), both times softmax_scale; a score sums `terms` products. Returns the bound of |out −
    reference| element by element, that of the RMS of (out − reference)/norm, and that of a log-sum-exp's error.

    Roundings to BF16, u = 2^-8: p before its product with v, at most u, u/sqrt(3) in RMS, independent from key to key;
    the output, u·|reference|. In float32: a tensor core's instruction adds 16 products and the accumulator after
    cutting all 17 at 2^-23 of the largest, whose square is at most 2·norm² (see `accumulate_rms`). That is an absolute
    error of a score; rounding the exponent, a difference of two numbers of at most `score`, is another; both are
    relative errors of p. An error e of each p changes out by Σ p e (v − out), of size at most e·(norm + |out|). The sum
    over keys is cut likewise, and rescaled each 64 keys.
    """
    u, cut = unit_roundoff(torch.bfloat16), 2.0**-23 / sqrt(3)
    exponent = score * cut * (sqrt(2 * 17 * ceil_div(terms, 16)) + 4)
    total = cut * (sqrt(2 * 17 * ceil_div(keys, 16)) + ceil_div(keys, 64))
    rms = u / sqrt(3) + exponent + total
    reached = norm > 0
    ratio = reference[reached].abs() / norm[reached]
    element = u * reference.abs() + 8 * (rms * norm + (exponent + total) * reference.abs()) * (1 + u)
    relative = float(ratio.square().mean().sqrt()) if reached.any() else 0.0
    return element, rms + (u + exponent + total) * relative, 8 * (exponent + total)


# -- model bounds --

# In float32 our model may be so many times farther from its float64 evaluation than transformers' model is: the same
# mathematics in another order of operations. transformers' own variants (eager and sdpa attention, experts in a loop
# and grouped, one pass and cached pieces) differ from each other by 5e-7 to 1e-5 of the logits, more than that
# factor.
MODEL_DISTANCE = 8.0

# In bfloat16, for the median token: the largest errors come from tokens that were routed otherwise, by chance.
MODEL_DISTANCE_BF16 = 2.5


def float64_agreement(float32_distance: float) -> float:
    """How far two float64 evaluations of one model may be apart, given how far a float32 evaluation is from them.

    Rounding errors are proportional to the unit roundoff to first order, so each float64 evaluation is within
    MODEL_DISTANCE times the float32 distance, scaled by the ratio of the two roundoffs; and there are two of them.
    """
    return 2 * MODEL_DISTANCE * float32_distance * unit_roundoff(torch.float64) / unit_roundoff(torch.float32)


def distance(out: Tensor, reference: Tensor) -> tuple[float, float]:
    """(RMS error, largest error), both over the RMS of `reference`."""
    error, rms = (out.double() - reference.double()).abs(), reference.double().square().mean().sqrt()
    return float(error.square().mean().sqrt() / rms), float(error.max() / rms)


def median_token_distance(out: Tensor, reference: Tensor) -> float:
    """The median over tokens [..., V] of the RMS error, over the RMS of `reference`."""
    error = (out.double() - reference.double()).square().mean(dim=-1).sqrt()
    return float(error.median() / reference.double().square().mean().sqrt())


def reordered_bound(layers: int, terms: int, dtype: torch.dtype) -> float:
    """Largest difference, over the RMS of the result, of two evaluations of a model that sum in another order.

    About 8 sums of at most `terms` products follow on each other in a layer, √terms roundings each in RMS; independent
    errors add as squares, and the largest of them is below 8 times their RMS (see gemm_bounds).
    """
    return 8 * sqrt(8 * layers * terms) * unit_roundoff(dtype)


def experts_rms(hidden_size: int, width: int, dtype: torch.dtype) -> float:
    """RMS distance of the routed experts' output from a float64 evaluation, over the output's RMS.

    Rounded to dtype: gate (silu at most doubles its relative error), up, silu, the product, down, the weighted sum: 7,
    and the routing weight's product. Each dot product accumulates in at least float32, √terms roundings in RMS: gate's,
    doubled, up's, and down's. The reference accumulates too, which matters for float64 alone.
    """
    accumulator = unit_roundoff(torch.promote_types(dtype, torch.float32))
    return 8 * unit_roundoff(dtype) + 2 * accumulator * (3 * sqrt(hidden_size) + sqrt(width))


def routing_weight_bound(terms: int, magnitude: float, experts: int, dtype: torch.dtype, value: float) -> float:
    """Largest distance of a routing weight `value` from another evaluation of it.

    A logit, a sum of `terms` products whose absolute values sum up to `magnitude`, is off by terms·u·magnitude. The
    logarithm of a sigmoid or softmax score changes by at most twice that, that of a quotient by scores twice as much,
    in both evaluations. Sums over experts, and the few other operations, add a rounding each.
    """
    return (8 * terms * magnitude + 2 * experts + 16) * unit_roundoff(dtype) * value


def positive_sum_bound(terms: int, dtype: torch.dtype, value: float) -> float:
    """Largest error of `value`, a sum of so many positive terms of a few products and quotients each.

    Every partial sum is at most the whole: one rounding per addition, and 8 for the factors and the references' own.
    """
    return (terms + 8) * unit_roundoff(dtype) * value


def rounded_sum_bound(reference: Tensor, magnitude: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """Largest distance from `reference` of a sum of so many products, in float32 and in any order, rounded to dtype.

    `magnitude` is Σ|product|, which no partial sum passes: every product and every addition rounds by at most its unit
    roundoff. Then one rounding of what came out: half the spacing, in the normal range u(dtype) of its size.
    """
    accumulated = 2 * terms * unit_roundoff(torch.float32) * magnitude
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # spacing below the normal range
    return accumulated + unit_roundoff(dtype) * (reference.abs() + accumulated) + smallest


def cross_entropy_bound(logits: Tensor) -> float:
    """Largest error of log Σ exp(x) − x_label over the V logits of a row.

    exp(x) has relative error (2 + |x|)u, the sum of V positive terms V·u more; the logarithm turns relative into
    absolute error, and adds a rounding of its value, at most |x| + log V, as does the difference.
    """
    size, largest = logits.shape[-1], float(logits.abs().max())
    return unit_roundoff(logits.dtype) * (size + 2 + 4 * largest + 2 * log(size))


def cross_entropy_gradient_bound(logits: Tensor, probability: Tensor, scale: Tensor) -> Tensor:
    """Largest error of scale·(softmax − onehot): a probability has the relative errors of an exponential and of their
    sum, twice those of the loss, and 8u with exp2 and the quotient approximated; the product and the difference."""
    u = unit_roundoff(torch.float32)
    return scale.double() * (probability * (2 * cross_entropy_bound(logits.float()) + 8 * u) + 2 * u)


def quantized_layer_rms(*, gradient: bool) -> float:
    """RMS distance, over the RMS, of a layer's output computed with FP8 products from its value; or of a gradient.

    Each product adds an independent error of `quantized_gemm_rms`, and they add as squares. On the way to the output:
    3 (kv_a, kv_b, o), 4 through the weights that attention averages with (q_a, q_b, kv_a, kv_b), and in the MLP gate
    (4, as silu at most doubles a relative error), up and down. A residual sum only dilutes them. A gradient is a
    product of as many errors of the values before it, of as many on the way back, and of its own.
    """
    return quantized_gemm_rms() * sqrt(27 if gradient else 13)
