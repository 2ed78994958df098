"""SwiGLU between two FP8 products: forward, and backward from the FP8 copy of its input that forward saved.

Memory-bound: 5 bytes a pair of gate and up in forward (7 with the saved copy), 9 in backward, which from one read
writes the gradient twice, as tiles along the features for dgrad and along the rows for wgrad, and once the recomputed
activation, along the rows, for the wgrad of the product behind. In backward the instructions are nearly as scarce as
the bytes: 61 a pair, where a copy's time has room for 71. So a thread computes with rows in pairs, a pair in one 32-bit
word (`tiles.py`), and what is to be tiled along the rows is transposed as such words: afterwards a thread has rows of
one column, with one scale to compute for them, and 16 bytes at a time to store. Before, it has 8 columns of two rows.
In Gluon, which takes both layouts as they are.

H200, 32768 rows of 2048 in 8 groups and 4096 of 18432, in the time of a copy of as many bytes: forward 0.94 and 0.95,
with the saved copy 0.87 and 0.89, backward 0.66 (weights and groups) and 0.74. The first is 211 µs of the kernel, and 9
of the map of tiles and the sum of weight gradients, for a copy's 146. Without sigmoid and divisions, half of the
instructions, the same loads, transposition and stores still take 188, and keep the link between the halves of the L2
81 % busy. The kernel issues in 64 % of the cycles, in bursts: more than two programs do not fit into a multiprocessor's
shared memory, and both wait at once. No faster: 7 % fewer instructions (columns read by `ldmatrix`, 16 columns a
thread), half as many warps, whole lines, no bank conflicts, other orders of tiles, hints to the caches, programs that
stay. Two tiles a program, the second one's loads ahead: 4 % less time in groups with weights, 2 % more without.
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
from dsv3c.kernels.offline import BF16, F32, FP8, I16, I32, Variant
from dsv3c.kernels.quantize import column_major
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
    store_tiles,
    to_fp8,
)
from dsv3c.numerics import TILE, ceil_div

ROWS, WARPS = 16, 4  # of a program of the forward kernel
BACKWARD = {"num_warps": 16, "maxnreg": 64}  # two programs a multiprocessor


@triton.jit
def _sigmoid(x):
    """1/(1 + exp(-x)) within 2^-22 + |x|·2^-23 of it, relatively."""
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 power;
        ex2.approx.ftz.f32 power, $1;
        add.rn.f32 power, power, 0f3F800000;
        rcp.approx.ftz.f32 $0, power;
        }""",
        "=f,f",
        [x * -1.4426950408889634],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@launched
@triton.jit(do_not_specialize=["R"])
def _swiglu_kernel(
    h_ptr, weight_ptr, a_ptr, a_scale_inv_ptr, h_fp8_ptr, h_scale_inv_ptr, R, width, amax_floor, POW2: tl.constexpr,
    WEIGHTED: tl.constexpr, SAVE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tile * 64 + tl.arange(0, 64)[None, :]  # in words: half of the columns
    row_64 = row[:, None].to(tl.int64)
    at = row_64 * width + column
    inside = row < R
    gate = tl.load(h_ptr + at, mask=inside[:, None], other=0)
    up = tl.load(h_ptr + at + width // 2, mask=inside[:, None], other=0)
    a_0 = low(gate) * _sigmoid(low(gate)) * low(up)
    a_1 = high(gate) * _sigmoid(high(gate)) * high(up)
    if WEIGHTED:
        weight = tl.load(weight_ptr + row, mask=inside, other=0.0)[:, None]
        a_0 *= weight
        a_1 *= weight
    scale_at = tile.to(tl.int64) * R + row
    a_ptr += row_64 * (width // 2) + column
    store_tiles(pack(a_0, a_1), a_ptr, a_scale_inv_ptr + scale_at, inside, amax_floor, POW2)
    if SAVE:
        store_tiles(gate, h_fp8_ptr + at, h_scale_inv_ptr + scale_at, inside, amax_floor, POW2)
        scale_at += (width // 128).to(tl.int64) * R
        store_tiles(up, h_fp8_ptr + at + width // 2, h_scale_inv_ptr + scale_at, inside, amax_floor, POW2)


@gluon.jit
def _load(h_ptr, h_scale_inv_ptr, da_ptr, weight_ptr, row, rows, column, R, width, WEIGHTED: gl.constexpr):
    """What `_gradients` takes of rows `row` × columns [128], as it lies in memory; zero from `rows` on."""
    inside = row < rows
    mask = inside[:, None]
    at = row[:, None] * width + column[None, :]
    gate = gl.load(h_ptr + at + row[:, None] * width, mask=mask, other=0.0)
    up = gl.load(h_ptr + at + row[:, None] * width + width, mask=mask, other=0.0)
    da = gl.load(da_ptr + at, mask=mask, other=0.0)
    gate_scale_inv = gl.load(h_scale_inv_ptr + row, mask=inside, other=0.0)
    up_scale_inv = gl.load(h_scale_inv_ptr + (width // 128).to(gl.int64) * R + row, mask=inside, other=0.0)
    weight = gate_scale_inv
    if WEIGHTED:
        weight = gl.load(weight_ptr + row, mask=inside, other=0.0)
    return gate, up, da, gate_scale_inv, up_scale_inv, weight


@gluon.jit
def _gradients(loaded, WEIGHTED: gl.constexpr):
    """Gradients of gate and up, the activation, and the rows' sums of da·a without weight, in float32."""
    gate, up, da, gate_scale_inv, up_scale_inv, weight = loaded
    gate = gate.to(gl.float32) * gate_scale_inv[:, None]
    up = up.to(gl.float32) * up_scale_inv[:, None]
    da = da.to(gl.float32)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    a = silu * up
    dweight = weight
    if WEIGHTED:
        dweight = gl.sum(da * a, 1)
        a *= weight[:, None]
        da *= weight[:, None]
    dgate = da * up * gl.fma(silu, 1 - sigmoid, sigmoid)
    return dgate, da * silu, a, dweight


@gluon.jit
def _store_rows(words, q_ptr, scale_inv_ptr, columns, row, rows, column, amax_floor, POW2: gl.constexpr):
    """Tiles along the columns of words [.., 128] that hold rows `row` and `row` + 1, into q [.., columns]."""
    amax = gl.reduce(words, 1, larger)
    scale_0, scale_1 = scale_inv(gl.abs(low(amax)), amax_floor, POW2), scale_inv(gl.abs(high(amax)), amax_floor, POW2)
    first_0, second_0 = reciprocal(scale_0)
    first_1, second_1 = reciprocal(scale_1)
    q_0 = divide(low(words), first_0[:, None], second_0[:, None]).to(gl.float8e4nv)
    q_1 = divide(high(words), first_1[:, None], second_1[:, None]).to(gl.float8e4nv)
    at = row[:, None] * columns + column[None, :]
    gl.store(q_ptr + at, q_0, mask=row[:, None] < rows)
    gl.store(q_ptr + at + columns, q_1, mask=row[:, None] + 1 < rows)
    gl.store(scale_inv_ptr + row, scale_0, mask=row < rows)
    gl.store(scale_inv_ptr + row + 1, scale_1, mask=row + 1 < rows)


@gluon.jit
def _store_columns(parts, q_ptr, scale_inv_ptr, tile, column_tile, P, amax_floor, POW2: gl.constexpr):
    """Tiles along the rows of parts, pairs [PAIRS, 128] each, transposed, into q [.., P/2], two rows an element."""
    PAIRS: gl.constexpr = parts[0].shape[0]
    LAYOUT: gl.constexpr = gl.BlockedLayout([8, 1], [PAIRS // 8, 256 // PAIRS], [1, gl.num_warps()], [0, 1])
    words = ()
    amax = gl.full([PAIRS, 128], 0, gl.int32, LAYOUT)
    for part in gl.static_range(64 // PAIRS):
        words += (parts[part].load(LAYOUT),)
        amax = larger(amax, words[part])
    scale = scale_inv(magnitude(gl.reduce(amax, 0, larger)), amax_floor, POW2)
    first, second = reciprocal(scale)
    column = column_tile * 128 + gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
    pair = tile * 64 + gl.arange(0, PAIRS, gl.SliceLayout(1, LAYOUT))
    q_ptr += column.to(gl.int64)[None, :] * (P // 2) + pair[:, None]
    for part in gl.static_range(64 // PAIRS):
        gl.store(q_ptr + part * PAIRS, to_fp8(words[part], first[None, :], second[None, :]))
    gl.store(scale_inv_ptr + column, scale)


@launched
@gluon.jit(do_not_specialize=["R", "E", "bound"])
def _swiglu_backward_kernel(
    h_ptr, h_scale_inv_ptr, da_ptr, weight_ptr, dh_ptr, dh_scale_inv_ptr, dht_ptr, dht_scale_inv_ptr, at_ptr,
    at_scale_inv_ptr, dweight_ptr, tiles_ptr, first_ptr, R, width, P, E, bound, amax_floor, gradient_amax_floor,
    POW2: gl.constexpr, WEIGHTED: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """One program: 128 rows of one group × 128 columns of gate and of up. Tiles that no group has are written as zeros,
    transposed; no row is theirs."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    PAIRS: gl.constexpr = 2 * gl.num_warps()
    # No bank conflicts where columns are read.
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(256 // PAIRS, 8, PAIRS // 8, [1, 0])
    tile, column_tile = gl.program_id(0), gl.program_id(1)
    start = tile * 128
    end = R
    if GROUPED:
        mine = tile < gl.load(first_ptr + E)
        start = gl.where(mine, gl.load(tiles_ptr + bound + tile), 0)
        end = gl.where(mine, gl.load(tiles_ptr + 2 * bound + tile), 0)
    rows = end - start  # and from here on a row's number is that in the tile
    column = column_tile * 128 + gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
    scale_at = column_tile.to(gl.int64) * R + start
    h_ptr += start.to(gl.int64) * 2 * width
    da_ptr += start.to(gl.int64) * width
    dh_ptr += start.to(gl.int64) * 2 * width
    h_scale_inv_ptr += scale_at
    dh_scale_inv_ptr += scale_at
    up_scale_inv_ptr = dh_scale_inv_ptr + (width // 128).to(gl.int64) * R
    if WEIGHTED:
        dweight_ptr += scale_at
        weight_ptr += start
    dgates, dups, activations = (), (), ()  # a buffer for each part, or there would be a barrier between them
    row = 2 * gl.arange(0, PAIRS, gl.SliceLayout(1, LAYOUT))
    # A part ahead: loads would not move above stores that may alias.
    next_0 = _load(h_ptr, h_scale_inv_ptr, da_ptr, weight_ptr, row, rows, column, R, width, WEIGHTED)
    next_1 = _load(h_ptr, h_scale_inv_ptr, da_ptr, weight_ptr, row + 1, rows, column, R, width, WEIGHTED)
    for part in gl.static_range(0, 64, PAIRS):
        loaded_0, loaded_1 = next_0, next_1
        if part + PAIRS < 64:
            ahead = row + 2 * PAIRS
            next_0 = _load(h_ptr, h_scale_inv_ptr, da_ptr, weight_ptr, ahead, rows, column, R, width, WEIGHTED)
            next_1 = _load(h_ptr, h_scale_inv_ptr, da_ptr, weight_ptr, ahead + 1, rows, column, R, width, WEIGHTED)
        dgate_0, dup_0, a_0, dweight_0 = _gradients(loaded_0, WEIGHTED)
        dgate_1, dup_1, a_1, dweight_1 = _gradients(loaded_1, WEIGHTED)
        dgate = pack(dgate_0, dgate_1)
        dup = pack(dup_0, dup_1)
        dgates += (gl.allocate_shared_memory(gl.int32, [PAIRS, 128], SHARED, dgate),)
        dups += (gl.allocate_shared_memory(gl.int32, [PAIRS, 128], SHARED, dup),)
        activations += (gl.allocate_shared_memory(gl.int32, [PAIRS, 128], SHARED, pack(a_0, a_1)),)
        _store_rows(dgate, dh_ptr, dh_scale_inv_ptr, 2 * width, row, rows, column, gradient_amax_floor, POW2)
        _store_rows(dup, dh_ptr + width, up_scale_inv_ptr, 2 * width, row, rows, column, gradient_amax_floor, POW2)
        if WEIGHTED:
            gl.store(dweight_ptr + row, dweight_0, mask=row < rows)
            gl.store(dweight_ptr + row + 1, dweight_1, mask=row + 1 < rows)
        row += 2 * PAIRS
    up_tile = column_tile + width // 128
    dht_scale_inv_ptr += tile.to(gl.int64) * 2 * width
    at_scale_inv_ptr += tile.to(gl.int64) * width
    _store_columns(dgates, dht_ptr, dht_scale_inv_ptr, tile, column_tile, P, gradient_amax_floor, POW2)
    _store_columns(dups, dht_ptr, dht_scale_inv_ptr, tile, up_tile, P, gradient_amax_floor, POW2)
    _store_columns(activations, at_ptr, at_scale_inv_ptr, tile, column_tile, P, amax_floor, POW2)


@launched
@triton.jit(do_not_specialize=["R"])
def _sum_tiles_kernel(
    partial_ptr, out_ptr, last_ptr, R, G, GROUPED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr
):
    """out[r] = Σ_g partial[g, r]; zero for rows of no group."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    end = R
    if GROUPED:
        end = tl.load(last_ptr)
    total = tl.zeros((TILES, ROWS), tl.float32)
    for start in range(0, G, TILES):
        tile = start + tl.arange(0, TILES)[:, None]
        total += tl.load(partial_ptr + tile.to(tl.int64) * R + row, mask=(row < end) & (tile < G), other=0.0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out_ptr + row, tl.sum(total, 0), mask=row < R)


def swiglu_quantize(h_RN: Tensor, weight_R: Tensor | None, amax_floor: float, pow2: bool, out: tuple) -> None:
    """Launcher of `dsv3c::swiglu_quantize`."""
    _forward(h_RN, weight_R, amax_floor, pow2, *out, None, None)


def swiglu_quantize_save(h_RN: Tensor, weight_R: Tensor | None, amax_floor: float, pow2: bool, out: tuple) -> None:
    """Launcher of `dsv3c::swiglu_quantize_save`."""
    _forward(h_RN, weight_R, amax_floor, pow2, *out)


def _forward(h_RN, weight_R, amax_floor, pow2, a_fp8, a_scale_inv, h_fp8, h_scale_inv) -> None:
    R, width = a_fp8.shape
    if a_fp8.numel() == 0:
        return
    _swiglu_kernel[(ceil_div(R, ROWS), width // TILE)](
        as_words(h_RN.contiguous()), weight_R, a_fp8.view(torch.int16), a_scale_inv,
        None if h_fp8 is None else h_fp8.view(torch.int16), h_scale_inv, R, width, amax_floor, pow2,
        weight_R is not None, h_fp8 is not None, ROWS, num_warps=WARPS,
    )  # fmt: skip


def swiglu_quantize_backward(
    h_fp8_RN: Tensor,
    h_scale_inv: Tensor,
    da_RI: Tensor,
    weight_R: Tensor | None,
    offs: Tensor | None,
    amax_floor: float,
    gradient_amax_floor: float,
    pow2: bool,
    out: tuple[Tensor, ...],
) -> None:
    """Launcher of `dsv3c::swiglu_quantize_backward`."""
    dh_fp8, dh_scale_inv, dht_fp8, dht_scale_inv, at_fp8, at_scale_inv, dweight_R = out
    R, width = da_RI.shape
    P = at_fp8.shape[1]
    if at_fp8.numel() == 0:
        return
    grouped, weighted = offs is not None, weight_R is not None
    tiles, first = tile_map(offs, R, TILE) if grouped else (None, None)
    E, bound = (len(offs), tiles.shape[1]) if grouped else (0, 0)
    partial = da_RI.new_empty((width // TILE, R), dtype=torch.float32) if weighted else dh_scale_inv
    _swiglu_backward_kernel[(P // TILE, width // TILE)](
        h_fp8_RN.contiguous(), column_major(h_scale_inv), da_RI.contiguous(), weight_R, dh_fp8, dh_scale_inv,
        dht_fp8.view(torch.int16), dht_scale_inv, at_fp8.view(torch.int16), at_scale_inv, partial, tiles, first, R,
        width, P, E, bound, amax_floor, gradient_amax_floor, pow2, weighted, grouped, **BACKWARD,
    )  # fmt: skip
    if weighted and R:
        last = offs[-1:] if grouped else None
        _sum_tiles_kernel[(ceil_div(R, 64),)](partial, dweight_R, last, R, width // TILE, grouped, 64, 16)


def variants() -> Iterator[Variant]:
    for weighted in (False, True):
        weight, no_weight = ({"weight_ptr": F32}, {}) if weighted else ({}, {"weight_ptr": None})
        for save in (False, True):
            saved, unsaved = ("h_fp8_ptr", "h_scale_inv_ptr"), {"h_fp8_ptr": None, "h_scale_inv_ptr": None}
            yield Variant(
                _swiglu_kernel,
                {"h_ptr": I32, "a_ptr": I16, "a_scale_inv_ptr": F32, "amax_floor": "fp32"}
                | weight
                | (dict(zip(saved, (I16, F32), strict=True)) if save else {}),
                {"POW2": False, "WEIGHTED": weighted, "SAVE": save, "ROWS": ROWS}
                | no_weight
                | ({} if save else unsaved),
                num_warps=WARPS,
            )
        for grouped in (False, True):
            scales = ("h", "dh", "dht", "at")
            yield Variant(
                _swiglu_backward_kernel,
                {"h_ptr": FP8, "da_ptr": BF16, "dh_ptr": FP8, "dht_ptr": I16, "at_ptr": I16, "dweight_ptr": F32}
                | {f"{name}_scale_inv_ptr": F32 for name in scales}
                | {"amax_floor": "fp32", "gradient_amax_floor": "fp32"}
                | weight
                | ({"tiles_ptr": I32, "first_ptr": I32} if grouped else {}),
                {"POW2": False, "WEIGHTED": weighted, "GROUPED": grouped}
                | no_weight
                | ({} if grouped else {"tiles_ptr": None, "first_ptr": None}),
                **BACKWARD,
            )
    for grouped in (False, True):
        yield Variant(
            _sum_tiles_kernel,
            {"partial_ptr": F32, "out_ptr": F32} | ({"last_ptr": I32} if grouped else {}),
            {"GROUPED": grouped, "ROWS": 64, "TILES": 16} | ({} if grouped else {"last_ptr": None}),
        )
