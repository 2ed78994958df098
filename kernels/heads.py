"""Gradients of queries, keys and values, cast to FP8 for dgrad and wgrad as they are put together for the linears.

Unfused, the gradient of kv_b's output (a head's keys, then its values) and the one of q_b's (rotated back) are written
in BF16 and read twice, by the cast along the rows and by the transposing one. Here a program reads a tile of
128 × 128 from where attention left it, as two halves of 64 features (a head of V3 has three, the last one rotary), and
writes both casts: 4 bytes a value in all instead of 10 to 12.

The halves wait in shared memory, whose columns `columns.py` reads: one barrier instead of 21, and 64 registers instead
of 122.

H200, 4096 tokens and 128 heads, in the time of a copy of as many bytes: queries 0.87 (116 µs), keys and values 0.88
(148 µs), where the separate kernels take 273 and 325 µs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsv3c.kernels.columns import divide_words, largest, load_words, shared_layout, store_columns
from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import F32, I16, I32, Variant
from dsv3c.kernels.rotary import _turn as turn
from dsv3c.kernels.rotary import rotate_heads_
from dsv3c.kernels.tiles import as_words, larger, magnitude, pack, reciprocal, scale_inv, to_fp8
from dsv3c.numerics import TILE, ceil_div

HALF = 64
OPTIONS = {"num_warps": 8, "maxnreg": 64}  # four programs a multiprocessor


@gluon.jit
def _turned(x_ptr, stride, cos_ptr, sin_ptr, row, word, rows, inside):
    """Words of a rotary half, rotated back: it holds the first halves of 32 pairs, then the second ones."""
    at = x_ptr.to(gl.pointer_type(gl.bfloat16)) + (row * stride * 2 + word)
    first = gl.load(at, mask=inside, other=0.0).to(gl.float32)
    second = gl.load(at + 32, mask=inside, other=0.0).to(gl.float32)
    at = gl.minimum(row, rows - 1) * 32 + word  # in bounds without a mask, which takes 8 % of the time
    cos = gl.load(cos_ptr + at).to(gl.float32)
    sin = gl.load(sin_ptr + at).to(gl.float32)
    even, odd = turn(first, second, cos, -sin)
    return gl.where(inside, pack(even, odd), 0)  # what is rotated from zeros may be -0


@gluon.jit
def _load_half(
    x_ptr, y_ptr, cos_ptr, sin_ptr, half, start, rows, K_words, x_row, x_head, y_row, y_head, NOPE: gl.constexpr,
    REST: gl.constexpr, ROTATE: gl.constexpr,
):  # fmt: skip
    """64 features of 128 rows, in words of two."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, 128, gl.SliceLayout(1, LAYOUT))[:, None]
    word = gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))[None, :]
    head, part = (half // (NOPE + REST)).to(gl.int64), half % (NOPE + REST)
    inside = (row < rows) & (half * 32 + word < K_words)
    at, stride = x_ptr + start * x_row + (head * x_head + part * 32), x_row
    if not ROTATE and part >= NOPE:
        at, stride = y_ptr + start * y_row + (head * y_head + (part - NOPE) * 32), y_row
    if ROTATE and (NOPE == 0 or part == NOPE):
        words = _turned(at, stride, cos_ptr + start * 32, sin_ptr + start * 32, row, word, rows, inside)
    else:
        words = gl.load(at + (row * stride + word), mask=inside, other=0)
    return words


@gluon.jit
def _cast_columns(tile, t_ptr, scale_inv_ptr, columns, P_words, amax_floor, POW2: gl.constexpr):
    words, others = load_words(tile._reinterpret(gl.bfloat16, (128, 64), shared_layout(64, 16)))
    scale = scale_inv(largest(words, others), amax_floor, POW2)
    first, second = reciprocal(scale)
    words = divide_words(words, others, first[None, :], second[None, :])
    store_columns(words, scale, t_ptr, scale_inv_ptr, columns, P_words)


@launched
@gluon.jit(do_not_specialize=["R"])
def _cast_heads_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, q_ptr, scale_inv_ptr, t_ptr, t_scale_inv_ptr, R, K_words, x_row, x_head, y_row,
    y_head, P_words, amax_floor, NOPE: gl.constexpr, REST: gl.constexpr, ROTATE: gl.constexpr, POW2: gl.constexpr,
):  # fmt: skip
    """Heads of NOPE halves from x and REST more: of y, or x's own, rotated back. Strides in words."""
    tile, block = gl.program_id(0), gl.program_id(1)
    start = block.to(gl.int64) * 128
    rows = R - block * 128
    left = _load_half(
        x_ptr, y_ptr, cos_ptr, sin_ptr, 2 * tile, start, rows, K_words, x_row, x_head, y_row, y_head, NOPE, REST, ROTATE
    )
    right = _load_half(
        x_ptr, y_ptr, cos_ptr, sin_ptr, 2 * tile + 1, start, rows, K_words, x_row, x_head, y_row, y_head, NOPE, REST,
        ROTATE,
    )  # fmt: skip
    SHARED: gl.constexpr = shared_layout(32, 32)
    left_tile = gl.allocate_shared_memory(gl.int32, (128, 32), SHARED, left)
    right_tile = gl.allocate_shared_memory(gl.int32, (128, 32), SHARED, right)
    LAYOUT: gl.constexpr = left.type.layout
    row = gl.arange(0, 128, gl.SliceLayout(1, LAYOUT))
    word = tile * 64 + gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))[None, :]
    scale = scale_inv(magnitude(gl.reduce(larger(left, right), 1, larger)), amax_floor, POW2)
    first, second = reciprocal(scale)
    first, second = first[:, None], second[:, None]
    at = q_ptr + start * K_words + (row[:, None] * K_words + word)  # two FP8 values each
    gl.store(at, to_fp8(left, first, second), mask=(row[:, None] < rows) & (word < K_words))
    gl.store(at + 32, to_fp8(right, first, second), mask=(row[:, None] < rows) & (word + 32 < K_words))
    gl.store(scale_inv_ptr + tile.to(gl.int64) * R + start + row, scale, mask=row < rows)
    columns = 2 * K_words - tile * 128
    t_ptr += tile.to(gl.int64) * 128 * P_words + block * 32
    t_scale_inv_ptr += block.to(gl.int64) * K_words * 2 + tile * 128
    _cast_columns(left_tile, t_ptr, t_scale_inv_ptr, columns, P_words, amax_floor, POW2)
    t_ptr += 64 * P_words
    _cast_columns(right_tile, t_ptr, t_scale_inv_ptr + 64, columns - 64, P_words, amax_floor, POW2)


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
        **OPTIONS,
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    arguments = {
        "x_ptr": I32, "y_ptr": I32, "q_ptr": I16, "scale_inv_ptr": F32, "t_ptr": I32, "t_scale_inv_ptr": F32,
        "amax_floor": "fp32",
    }  # fmt: skip
    angles = {"cos_ptr": F32, "sin_ptr": F32}
    constants = {"NOPE": 2, "POW2": False}
    queries, keys = {"REST": 1, "ROTATE": True}, {"REST": 2, "ROTATE": False, "cos_ptr": None, "sin_ptr": None}
    yield Variant(_cast_heads_kernel, arguments | angles, constants | queries, **OPTIONS)
    yield Variant(_cast_heads_kernel, arguments, constants | keys, **OPTIONS)
