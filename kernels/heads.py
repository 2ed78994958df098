"""Gradients of queries, keys and values, cast to FP8 for dgrad and wgrad as they are put together for the linears.

Unfused, the gradient of kv_b's output (a head's keys, then its values) and the one of q_b's (rotated back) are written
in BF16 and read twice, by the cast along the rows and by the transposing one. Here a program reads a tile of
128 × 128 from where attention left it, as two halves of 64 features (a head of V3 has three, the last one rotary), and
writes both casts: 4 bytes a value in all instead of 10 to 12.

A thread has 4 neighbouring rows of 4 words (two BF16 values each) in each half: both maxima are taken from the words,
and four rows of a column make one word of the transposed copy.

H200, 4096 tokens and 128 heads: queries 136 µs, keys and values 161, where a copy of as many bytes takes 100 and 130
and the separate kernels 273 and 325. Registers limit it (120 of a thread: two programs a multiprocessor); with fewer it
spills, and another order of programs, more warps or fewer change nothing.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import F32, I16, I32, Variant
from dsv3c.kernels.quantize import _pack as pack_rows
from dsv3c.kernels.rotary import _turn as turn
from dsv3c.kernels.rotary import rotate_heads_
from dsv3c.kernels.tiles import (
    as_words,
    divide,
    high,
    larger,
    low,
    magnitude,
    pack,
    reciprocal,
    scale_inv,
    to_fp8,
)
from dsv3c.numerics import TILE, ceil_div

HALF, WARPS = 64, 8


@triton.jit
def _loaded(x_ptr, stride, row, rows):
    """Words [32, 32] of every fourth row."""
    word = tl.arange(0, 32)[None, :]
    return tl.load(x_ptr + (row * stride + word), mask=row < rows, other=0)


@triton.jit
def _turned(x_ptr, stride, cos_ptr, sin_ptr, row, rows):
    """The same of a rotary half, rotated back: it holds the first halves of 32 pairs, then the second ones."""
    pair = tl.arange(0, 32)[None, :]
    at = x_ptr.to(tl.pointer_type(tl.bfloat16)) + (row * stride * 2 + pair)
    first = tl.load(at, mask=row < rows, other=0.0).to(tl.float32)
    second = tl.load(at + 32, mask=row < rows, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + (row * 32 + pair), mask=row < rows, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + (row * 32 + pair), mask=row < rows, other=0.0).to(tl.float32)
    even, odd = turn(first, second, cos, -sin)
    return pack(even, odd)


@triton.jit
def _load_half(
    x_ptr, y_ptr, cos_ptr, sin_ptr, half, start, rows, K_words, x_row, x_head, y_row, y_head, NOPE: tl.constexpr,
    REST: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """64 features of 128 rows as four tensors [32, 32] of words: rows 4i, 4i + 1, 4i + 2, 4i + 3."""
    row = 4 * tl.arange(0, 32)[:, None]
    head, part = (half // (NOPE + REST)).to(tl.int64), half % (NOPE + REST)
    rows = tl.where(half * 32 < K_words, rows, 0)
    at, stride = x_ptr + start * x_row + (head * x_head + part * 32), x_row
    if not ROTATE and part >= NOPE:
        at, stride = y_ptr + start * y_row + (head * y_head + (part - NOPE) * 32), y_row
    if ROTATE and part == NOPE:
        cos_ptr += start * 32
        sin_ptr += start * 32
        x0 = _turned(at, stride, cos_ptr, sin_ptr, row, rows)
        x1 = _turned(at, stride, cos_ptr, sin_ptr, row + 1, rows)
        x2 = _turned(at, stride, cos_ptr, sin_ptr, row + 2, rows)
        x3 = _turned(at, stride, cos_ptr, sin_ptr, row + 3, rows)
    else:
        x0 = _loaded(at, stride, row, rows)
        x1 = _loaded(at, stride, row + 1, rows)
        x2 = _loaded(at, stride, row + 2, rows)
        x3 = _loaded(at, stride, row + 3, rows)
    return x0, x1, x2, x3


@triton.jit
def _cast_rows(left, right, first_row, q_ptr, scale_inv_ptr, rows, halves, K_words, amax_floor, POW2: tl.constexpr):
    """A quarter of the rows of a tile, of both halves, along the rows."""
    row = first_row + 4 * tl.arange(0, 32)
    scale = scale_inv(magnitude(tl.reduce(larger(left, right), 1, larger)), amax_floor, POW2)
    first, second = reciprocal(scale)
    at = q_ptr + (row[:, None] * K_words + tl.arange(0, 32)[None, :])  # two FP8 values each
    tl.store(at, to_fp8(left, first[:, None], second[:, None]), mask=row[:, None] < rows)
    tl.store(at + 32, to_fp8(right, first[:, None], second[:, None]), mask=row[:, None] < tl.where(halves > 1, rows, 0))
    tl.store(scale_inv_ptr + row, scale, mask=row < rows)


@triton.jit
def _cast_columns(x0, x1, x2, x3, t_ptr, scale_inv_ptr, halves, P_words, amax_floor, POW2: tl.constexpr):
    """64 columns of 128 rows, transposed."""
    amax = tl.reduce(larger(larger(x0, x1), larger(x2, x3)), 0, larger)[None, :]
    even, odd = scale_inv(tl.abs(low(amax)), amax_floor, POW2), scale_inv(tl.abs(high(amax)), amax_floor, POW2)
    first, second = reciprocal(even)
    evens = pack_rows(
        divide(low(x0), first, second), divide(low(x1), first, second),
        divide(low(x2), first, second), divide(low(x3), first, second),
    )  # fmt: skip
    first, second = reciprocal(odd)
    odds = pack_rows(
        divide(high(x0), first, second), divide(high(x1), first, second),
        divide(high(x2), first, second), divide(high(x3), first, second),
    )  # fmt: skip
    words = tl.trans(tl.reshape(tl.join(evens, odds), (32, 64)))
    column = tl.arange(0, 64)
    columns = tl.where(halves > 0, 64, 0)
    at = t_ptr + (column[:, None] * P_words + tl.arange(0, 32)[None, :])
    tl.store(at, words, mask=column[:, None] < columns)
    tl.store(scale_inv_ptr + column, tl.reshape(tl.join(even, odd), (64,)), mask=column < columns)


@launched
@triton.jit(do_not_specialize=["R"])
def _cast_heads_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, q_ptr, scale_inv_ptr, t_ptr, t_scale_inv_ptr, R, K_words, x_row, x_head, y_row,
    y_head, P_words, amax_floor, NOPE: tl.constexpr, REST: tl.constexpr, ROTATE: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """Heads of NOPE halves from x and REST more: of y, or x's own, rotated back. Strides in words."""
    tile, block = tl.program_id(0), tl.program_id(1)
    start = block.to(tl.int64) * 128
    rows = R - block * 128
    halves = tl.cdiv(K_words, 32) - 2 * tile
    a0, a1, a2, a3 = _load_half(
        x_ptr, y_ptr, cos_ptr, sin_ptr, 2 * tile, start, rows, K_words, x_row, x_head, y_row, y_head, NOPE, REST, ROTATE
    )
    b0, b1, b2, b3 = _load_half(
        x_ptr, y_ptr, cos_ptr, sin_ptr, 2 * tile + 1, start, rows, K_words, x_row, x_head, y_row, y_head, NOPE, REST,
        ROTATE,
    )  # fmt: skip
    q_ptr += start * K_words + tile * 64
    scale_inv_ptr += tile.to(tl.int64) * R + start
    _cast_rows(a0, b0, 0, q_ptr, scale_inv_ptr, rows, halves, K_words, amax_floor, POW2)
    _cast_rows(a1, b1, 1, q_ptr, scale_inv_ptr, rows, halves, K_words, amax_floor, POW2)
    _cast_rows(a2, b2, 2, q_ptr, scale_inv_ptr, rows, halves, K_words, amax_floor, POW2)
    _cast_rows(a3, b3, 3, q_ptr, scale_inv_ptr, rows, halves, K_words, amax_floor, POW2)
    t_ptr += tile.to(tl.int64) * 128 * P_words + block * 32
    t_scale_inv_ptr += block.to(tl.int64) * K_words * 2 + tile * 128
    _cast_columns(a0, a1, a2, a3, t_ptr, t_scale_inv_ptr, halves, P_words, amax_floor, POW2)
    t_ptr += 64 * P_words.to(tl.int64)
    _cast_columns(b0, b1, b2, b3, t_ptr, t_scale_inv_ptr + 64, halves - 1, P_words, amax_floor, POW2)


def rotate_heads(x_RHD: Tensor, cos_Rr: Tensor, sin_Rr: Tensor, inverse: bool, out: Tensor) -> None:
    """Launcher of `dsv3c::rotate_heads`, where it may not write to x."""
    rotate_heads_(out.copy_(x_RHD), cos_Rr, sin_Rr, inverse)


def rotate_quantize_both(
    x_RHD: Tensor, cos_Rr: Tensor, sin_Rr: Tensor, amax_floor: float, pow2: bool, out: tuple
) -> None:
    """Launcher of `dsv3c::rotate_quantize_both`."""
    x = as_words(x_RHD)
    angles = cos_Rr.contiguous(), sin_Rr.contiguous()
    nope = x_RHD.shape[2] // HALF - 1
    _cast_heads(x, x, angles, nope, 1, amax_floor, pow2, out)


def join_quantize_both(dk_RHD: Tensor, dv_RHV: Tensor, nope: int, amax_floor: float, pow2: bool, out: tuple) -> None:
    """Launcher of `dsv3c::join_quantize_both`."""
    dk, dv = as_words(dk_RHD), as_words(dv_RHV)
    _cast_heads(dk, dv, None, nope // HALF, dv_RHV.shape[2] // HALF, amax_floor, pow2, out)


def _cast_heads(x, y, angles, nope, rest, amax_floor, pow2, out) -> None:
    q, scale, t, t_scale = out
    (R, K), P = q.shape, t.shape[1]
    if q.numel() == 0:
        return
    _cast_heads_kernel[(ceil_div(K, TILE), P // TILE)](
        x, y, *(angles or (None, None)), q.view(torch.int16), scale, t.view(torch.int32), t_scale, R, K // 2,
        x.stride(0), x.stride(1), y.stride(0), y.stride(1), P // 4, amax_floor, nope, rest, angles is not None, pow2,
        num_warps=WARPS,
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    arguments = {
        "x_ptr": I32, "y_ptr": I32, "q_ptr": I16, "scale_inv_ptr": F32, "t_ptr": I32, "t_scale_inv_ptr": F32,
        "amax_floor": "fp32",
    }  # fmt: skip
    angles = {"cos_ptr": F32, "sin_ptr": F32}
    constants = {"NOPE": 2, "POW2": False}
    queries, keys = {"REST": 1, "ROTATE": True}, {"REST": 2, "ROTATE": False, "cos_ptr": None, "sin_ptr": None}
    yield Variant(_cast_heads_kernel, arguments | angles, constants | queries, num_warps=WARPS)
    yield Variant(_cast_heads_kernel, arguments, constants | keys, num_warps=WARPS)
