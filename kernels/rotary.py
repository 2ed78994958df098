"""What multi-head latent attention does between its products, fused: the rotation of the queries in place, and the
latent's norm and rotation and cast.

Memory-bound. A pair that is rotated is one 32-bit word of two BF16 numbers, so that interleaved pairs are loaded and
stored 16 bytes at a time.

The latent's gradient has a row a warp. What it adds up for the weight lies in several warps then, and changes its
layout before it is summed: with Triton's own sum across warps a launch took 22 µs instead of 11, presumably for bank
conflicts. A second launch, which begins while the first one runs, adds up what the programs have.

H200, 4096 tokens and 128 heads, in the time of a copy of as many bytes: queries 0.88 (42 µs), their gradient 0.79, the
latent 0.93 (10 µs), its gradient 0.80 (12.2 µs; 0.85 of 16384 tokens). Of those, the second launch is 1.4 µs; a launch
that does nothing takes 5.4. One launch, in which clusters sum columns and hand their sums on in shared memory: the
columns alone take 12.8. Sums made before the gradients are stored, for which the second launch waits by flags: 14.5.
Two or four rows a warp at a time, more warps or fewer programs: 12.4 to 15. All rows at once by the copy engine, which
leaves 132 to 528 programs' sums: 12.1 to 14.6, the rows alone 10.4 to 10.9.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents

from dsv3c.kernels.launch import launched
from dsv3c.kernels.norm import scaled, squares
from dsv3c.kernels.norm_backward import sum_programs
from dsv3c.kernels.offline import BF16, F32, I16, I32, Variant
from dsv3c.kernels.tiles import as_words, high, low, pack, store_tiles, times
from dsv3c.numerics import TILE, ceil_div

HEADS, WARPS = 128, 4  # of a program
PROGRAMS, ROWS = 512, 4  # of the latent's backward kernel; rows of a program at a time, one a warp


@triton.jit
def _turn(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@launched
@triton.jit
def _rotate_heads_kernel(
    x_ptr, cos_ptr, sin_ptr, H, row_stride, head_stride, PAIRS: tl.constexpr, INVERSE: tl.constexpr, HEADS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = head < H
    cos = tl.load(cos_ptr + row * PAIRS + pair).to(tl.float32)
    sin = tl.load(sin_ptr + row * PAIRS + pair).to(tl.float32)
    halves = x_ptr + row * row_stride + head * head_stride + pair
    words = (x_ptr + row * row_stride).to(tl.pointer_type(tl.int32)) + head * (head_stride // 2) + pair
    if INVERSE:
        first = tl.load(halves, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(halves + PAIRS, mask=inside, other=0.0).to(tl.float32)
        tl.debug_barrier()  # every thread has read what another may overwrite
        even, odd = _turn(first, second, cos, -sin)
        tl.store(words, pack(even, odd), mask=inside)
    else:
        word = tl.load(words, mask=inside, other=0)
        tl.debug_barrier()
        first, second = _turn(low(word), high(word), cos, sin)
        tl.store(halves, first.to(tl.bfloat16), mask=inside)
        tl.store(halves + PAIRS, second.to(tl.bfloat16), mask=inside)


@launched
@triton.jit(do_not_specialize=["R"])
def _latent_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, latent_ptr, q_ptr, scale_inv_ptr, rstd_ptr, R, K, x_stride, eps, amax_floor,
    POW2: tl.constexpr, TILES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    words_ptr = latent_ptr.to(tl.pointer_type(tl.int32)) + row * (K // 2 + PAIRS)
    latent_ptr += row * (K + 2 * PAIRS)
    tile = tl.arange(0, TILES)
    column = tile[:, None] * 64 + tl.arange(0, 64)[None, :]  # in words: half of the columns
    inside = column < K // 2
    x = tl.load(x_ptr + column, mask=inside, other=0)
    pair = tl.arange(0, PAIRS)
    turning = tl.load(x_ptr + K // 2 + pair)
    cos = tl.load(cos_ptr + row * PAIRS + pair).to(tl.float32)
    sin = tl.load(sin_ptr + row * PAIRS + pair).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0)
    first, second = _turn(low(turning), high(turning), cos, sin)
    tl.store(latent_ptr + K + pair, first.to(tl.bfloat16))
    tl.store(latent_ptr + K + PAIRS + pair, second.to(tl.bfloat16))
    rstd = tl.rsqrt(tl.sum(squares(x, 0.0)) / K + eps)
    y = times(scaled(x, rstd), weight)
    tl.store(words_ptr + column, y, mask=inside)
    q_ptr += row * (K // 2) + column
    store_tiles(y, q_ptr, scale_inv_ptr + tile.to(tl.int64) * R + row, tile * 128 < K, amax_floor, POW2)
    tl.store(rstd_ptr + row, rstd)


@launched
@gluon.jit(do_not_specialize=["R"])
def _latent_backward_kernel(
    dy_ptr, drope_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, rstd_ptr, dx_ptr, partial_ptr, R, x_stride, dy_stride,
    K: gl.constexpr, PAIRS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """ROWS rows at a time, one a warp, in chunks of 128 words; strides in words."""
    gdc_launch_dependents()
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [ROWS, 1], [1, 0])
    PAIR: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [ROWS, 1], [1, 0])
    COLUMN: gl.constexpr = gl.BlockedLayout([ROWS, 1], [1, 32], [1, ROWS], [1, 0])
    CHUNKS: gl.constexpr = (K + 255) // 256
    word = gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))[None, :]
    pair = gl.arange(0, PAIRS, gl.SliceLayout(0, PAIR))[None, :]
    evens, odds = (), ()  # of the weight's gradient
    for _ in gl.static_range(CHUNKS):
        evens += (gl.full([ROWS, 128], 0.0, gl.float32, LAYOUT),)
        odds += (gl.full([ROWS, 128], 0.0, gl.float32, LAYOUT),)
    program = gl.program_id(0)
    for start in range(program * ROWS, R, gl.num_programs(0) * ROWS):
        row = start + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        rstd = gl.load(rstd_ptr + row, mask=row < R, other=0.0)[:, None]
        known = (row < R)[:, None]
        row = row[:, None].to(gl.int64)
        xs, dys, weights = (), (), ()
        for chunk in gl.static_range(CHUNKS):
            at, inside = word + chunk * 128, known & (word + chunk * 128 < K // 2)
            xs += (gl.load(x_ptr + row * x_stride + at, mask=inside, other=0),)
            dys += (gl.load(dy_ptr + row * dy_stride + at, mask=inside, other=0),)
        turned = start + gl.arange(0, ROWS, gl.SliceLayout(1, PAIR))
        there = (turned < R)[:, None]
        turned = turned[:, None].to(gl.int64)
        first = gl.load(drope_ptr + turned * 2 * PAIRS + pair, mask=there, other=0.0).to(gl.float32)
        second = gl.load(drope_ptr + turned * 2 * PAIRS + PAIRS + pair, mask=there, other=0.0).to(gl.float32)
        cos = gl.load(cos_ptr + turned * PAIRS + pair, mask=there, other=0.0).to(gl.float32)
        sin = gl.load(sin_ptr + turned * PAIRS + pair, mask=there, other=0.0).to(gl.float32)
        for chunk in gl.static_range(CHUNKS):
            weights += (gl.load(weight_ptr + word + chunk * 128, mask=word + chunk * 128 < K // 2, other=0),)
        sums = gl.full([ROWS, 128], 0.0, gl.float32, LAYOUT)
        evens_before, odds_before = evens, odds
        evens, odds = (), ()
        for chunk in gl.static_range(CHUNKS):
            even, odd = low(dys[chunk]) * (low(xs[chunk]) * rstd), high(dys[chunk]) * (high(xs[chunk]) * rstd)
            sums += low(weights[chunk]) * even + high(weights[chunk]) * odd
            evens += (evens_before[chunk] + even,)
            odds += (odds_before[chunk] + odd,)
        mean = (gl.sum(sums, 1) / K)[:, None]
        dx_row = dx_ptr + row * (K // 2 + PAIRS)
        for chunk in gl.static_range(CHUNKS):
            even = rstd * (low(dys[chunk]) * low(weights[chunk]) - low(xs[chunk]) * rstd * mean)
            odd = rstd * (high(dys[chunk]) * high(weights[chunk]) - high(xs[chunk]) * rstd * mean)
            at, inside = word + chunk * 128, known & (word + chunk * 128 < K // 2)
            gl.store(dx_row + at, pack(even, odd), mask=inside)
        even, odd = _turn(first, second, cos, -sin)
        gl.store(dx_ptr + turned * (K // 2 + PAIRS) + K // 2 + pair, pack(even, odd), mask=there)
    column = gl.arange(0, 256, gl.SliceLayout(0, COLUMN))
    for chunk in gl.static_range(CHUNKS):
        terms = gl.reshape(gl.join(evens[chunk], odds[chunk]), (ROWS, 256))
        total = gl.sum(gl.convert_layout(terms, COLUMN), 0)  # a thread has a column
        gl.store(partial_ptr + program * K + chunk * 256 + column, total, mask=column < K - chunk * 256)


def rotate_heads_(x_RHD: Tensor, cos_Rr: Tensor, sin_Rr: Tensor, inverse: bool) -> None:
    """Launcher of `dsv3c::rotate_heads_`."""
    R, H, D = x_RHD.shape
    pairs = cos_Rr.shape[1]
    if x_RHD.numel() == 0:
        return
    if x_RHD.data_ptr() % 4:  # a pair is no word
        rotated = x_RHD.clone(memory_format=torch.contiguous_format)
        rotate_heads_(rotated, cos_Rr, sin_Rr, inverse)
        x_RHD.copy_(rotated)
        return
    _rotate_heads_kernel[(R, ceil_div(H, HEADS))](
        x_RHD[..., D - 2 * pairs :], cos_Rr.contiguous(), sin_Rr.contiguous(), H, x_RHD.stride(0), x_RHD.stride(1),
        pairs, inverse, HEADS, num_warps=WARPS,
    )  # fmt: skip


def latent_quantize(
    x_RL: Tensor,
    weight_K: Tensor,
    cos_Rr: Tensor,
    sin_Rr: Tensor,
    eps: float,
    amax_floor: float,
    pow2: bool,
    out: tuple,
) -> None:
    """Launcher of `dsv3c::latent_quantize`."""
    latent, q, scale_inv, rstd = out
    R, K = q.shape
    if R == 0:
        return
    x = as_words(x_RL)
    _latent_kernel[(R,)](
        x, as_words(weight_K), cos_Rr.contiguous(), sin_Rr.contiguous(), latent, q.view(torch.int16), scale_inv, rstd,
        R, K, x.stride(0), eps, amax_floor, pow2, triton.next_power_of_2(K // TILE), cos_Rr.shape[1], num_warps=1,
    )  # fmt: skip


def latent_backward(
    dnormed_RK: Tensor,
    drope: Tensor,
    x_RL: Tensor,
    weight_K: Tensor,
    cos_Rr: Tensor,
    sin_Rr: Tensor,
    rstd_R: Tensor,
    out: tuple[Tensor, Tensor],
) -> None:
    """Launcher of `dsv3c::latent_backward`."""
    dx_RL, dweight_K = out
    R, K = dnormed_RK.shape
    programs = min(ceil_div(R, ROWS), PROGRAMS)
    if R == 0:
        dweight_K.zero_()
        return
    partial = dnormed_RK.new_empty((programs, K), dtype=torch.float32)
    dy, x = as_words(dnormed_RK), as_words(x_RL)
    _latent_backward_kernel[(programs,)](
        dy, drope.contiguous(), x, as_words(weight_K), cos_Rr.contiguous(), sin_Rr.contiguous(),
        rstd_R.contiguous(), dx_RL.view(torch.int32), partial, R, x.stride(0), dy.stride(0), K, cos_Rr.shape[1], ROWS,
        num_warps=ROWS,
    )  # fmt: skip
    sum_programs(partial, dweight_K, PROGRAMS)


def variants() -> Iterator[Variant]:
    angles = {"cos_ptr": F32, "sin_ptr": F32}
    for inverse in (False, True):
        yield Variant(
            _rotate_heads_kernel,
            {"x_ptr": BF16} | angles,
            {"PAIRS": 32, "INVERSE": inverse, "HEADS": HEADS},
            num_warps=WARPS,
        )
    latent = {"x_ptr": BF16, "weight_ptr": BF16, "rstd_ptr": F32} | angles
    yield Variant(
        _latent_kernel,
        latent
        | {
            "x_ptr": I32,
            "weight_ptr": I32,
            "latent_ptr": BF16,
            "q_ptr": I16,
            "scale_inv_ptr": F32,
            "eps": "fp32",
            "amax_floor": "fp32",
        },
        {"POW2": False, "TILES": 4, "PAIRS": 32},
        num_warps=1,
    )
    yield Variant(
        _latent_backward_kernel,
        latent | {"dy_ptr": I32, "drope_ptr": BF16, "x_ptr": I32, "weight_ptr": I32, "dx_ptr": I32, "partial_ptr": F32},
        {"K": 512, "PAIRS": 32, "ROWS": ROWS},
        num_warps=ROWS,
    )
