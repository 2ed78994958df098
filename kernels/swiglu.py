"""SwiGLU between two FP8 products: forward, and backward from the FP8 copy of its input that forward saved.

Memory-bound: 5 bytes a pair of gate and up in forward (7 with the saved copy), 9 in backward, which from one read
writes the gradient twice, as tiles along the features for dgrad and along the rows for wgrad, and once the recomputed
activation, along the rows, for the wgrad of the product behind. In backward the instructions are as scarce as the
bytes. So a thread computes with rows in pairs, a pair in one 32-bit word (`tiles.py`), and what is to be tiled along
the rows is transposed as such words: afterwards a thread has 16 rows of one column, one scale to compute for them, and
16 bytes to store. Before, it has 16 columns of two rows, likewise. In Gluon, which takes both layouts as they are.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsv3c.kernels.groups import tile_map
from dsv3c.kernels.offline import BF16, F32, FP8, I16, I32, Variant
from dsv3c.kernels.quantize import column_major
from dsv3c.kernels.tiles import divide, high, larger, low, magnitudes, pack, reciprocal, rounded, scale_inv, store_tiles
from dsv3c.numerics import TILE, ceil_div

ROWS, WARPS = 32, 4  # of a program of the forward kernel


@triton.jit
def _sigmoid(x):
    """1/(1 + exp(-x)) within 2^-22 + |x|·2^-23 of it, relatively."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;",
        "=f,f",
        [1.0 + tl.exp2(x * -1.4426950408889634)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit(do_not_specialize=["R"])
def _swiglu_kernel(
    h_ptr, weight_ptr, a_ptr, a_scale_inv_ptr, h_fp8_ptr, h_scale_inv_ptr, R, I, amax_floor, POW2: tl.constexpr,
    WEIGHTED: tl.constexpr, SAVE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tile * 128 + tl.arange(0, 128)[None, :]
    row_64 = row[:, None].to(tl.int64)
    at = row_64 * 2 * I + column
    inside = row < R
    gate = tl.load(h_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    up = tl.load(h_ptr + at + I, mask=inside[:, None], other=0.0).to(tl.float32)
    a = gate * _sigmoid(gate) * up
    if WEIGHTED:
        a *= tl.load(weight_ptr + row, mask=inside, other=0.0)[:, None]
    scale_at = tile.to(tl.int64) * R + row
    store_tiles(rounded(a), a_ptr + row_64 * I + column, a_scale_inv_ptr + scale_at, inside, amax_floor, POW2)
    if SAVE:
        store_tiles(gate, h_fp8_ptr + at, h_scale_inv_ptr + scale_at, inside, amax_floor, POW2)
        scale_at += (I // 128).to(tl.int64) * R
        store_tiles(up, h_fp8_ptr + at + I, h_scale_inv_ptr + scale_at, inside, amax_floor, POW2)


@gluon.jit
def _gradients(h_ptr, h_scale_inv_ptr, da_ptr, weight_ptr, dweight_ptr, row, end, column, R, I, WEIGHTED: gl.constexpr):
    """Gradients of gate and up, and the activation, of rows [64] × columns [128], in float32; zero from `end` on."""
    inside = row < end
    row_64 = row.to(gl.int64)[:, None]
    mask = inside[:, None]
    at = row_64 * 2 * I + column[None, :]
    gate = gl.load(h_ptr + at, mask=mask, other=0.0).to(gl.float32)
    up = gl.load(h_ptr + at + I, mask=mask, other=0.0).to(gl.float32)
    da = gl.load(da_ptr + row_64 * I + column[None, :], mask=mask, other=0.0).to(gl.float32)
    gate *= gl.load(h_scale_inv_ptr + row, mask=inside, other=0.0)[:, None]
    up *= gl.load(h_scale_inv_ptr + (I // 128).to(gl.int64) * R + row, mask=inside, other=0.0)[:, None]
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    a = silu * up
    if WEIGHTED:
        gl.store(dweight_ptr + row, gl.sum(da * a, 1), mask=inside)
        weight = gl.load(weight_ptr + row, mask=inside, other=0.0)[:, None]
        a *= weight
        da *= weight
    dgate = da * up * (gl.fma(-silu, sigmoid, silu) + sigmoid)
    return dgate, da * silu, a


@gluon.jit
def _store_rows(words, q_ptr, scale_inv_ptr, columns, row, end, column, amax_floor, POW2: gl.constexpr):
    """Tiles along the columns of words [.., 128] that hold rows `row` and `row` + 1, into q [.., columns]."""
    amax = gl.reduce(magnitudes(words), 1, larger)
    scale_0, scale_1 = scale_inv(low(amax), amax_floor, POW2), scale_inv(high(amax), amax_floor, POW2)
    first_0, second_0 = reciprocal(scale_0)
    first_1, second_1 = reciprocal(scale_1)
    q_0 = divide(low(words), first_0[:, None], second_0[:, None]).to(gl.float8e4nv)
    q_1 = divide(high(words), first_1[:, None], second_1[:, None]).to(gl.float8e4nv)
    at = row.to(gl.int64)[:, None] * columns + column[None, :]
    gl.store(q_ptr + at, q_0, mask=row[:, None] < end)
    gl.store(q_ptr + at + columns, q_1, mask=row[:, None] + 1 < end)
    gl.store(scale_inv_ptr + row, scale_0, mask=row < end)
    gl.store(scale_inv_ptr + row + 1, scale_1, mask=row + 1 < end)


@gluon.jit
def _store_columns(words, q_ptr, scale_inv_ptr, tile, column_tile, P, amax_floor, POW2: gl.constexpr):
    """Tiles along the rows of the pairs words [64, 128], transposed, into q [.., P/2], two rows an element."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [1, gl.num_warps()], [0, 1])
    words = words.load(LAYOUT)
    pair = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    column = column_tile * 128 + gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
    amax = gl.reduce(magnitudes(words), 0, larger)
    amax = gl.maximum(amax & 0xFFFF, (amax >> 16) & 0xFFFF)
    scale = scale_inv(low(amax), amax_floor, POW2)
    first, second = reciprocal(scale)
    first, second = first[None, :], second[None, :]
    q = gl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;",
        "=h,f,f",
        [divide(low(words), first, second), divide(high(words), first, second)],
        dtype=gl.int16,
        is_pure=True,
        pack=1,
    )
    gl.store(q_ptr + column.to(gl.int64)[None, :] * (P // 2) + tile * 64 + pair[:, None], q)
    gl.store(scale_inv_ptr + column, scale)


@gluon.jit(do_not_specialize=["R", "E", "bound"])
def _swiglu_backward_kernel(
    h_ptr, h_scale_inv_ptr, da_ptr, weight_ptr, dh_ptr, dh_scale_inv_ptr, dht_ptr, dht_scale_inv_ptr, at_ptr,
    at_scale_inv_ptr, dweight_ptr, tiles_ptr, first_ptr, R, I, P, E, bound, amax_floor, gradient_amax_floor,
    POW2: gl.constexpr, WEIGHTED: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """One program: 128 rows of one group × 128 columns of gate and of up. Tiles that no group has are written as zeros,
    transposed; no row is theirs."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    PAIRS: gl.constexpr = 2 * gl.num_warps()
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(16, 8, 2, [1, 0])  # no bank conflict by rows or columns
    tile = gl.program_id(0)
    column_tile = gl.program_id(1)
    start = tile * 128
    end = R
    if GROUPED:
        mine = tile < gl.load(first_ptr + E)
        start = gl.load(tiles_ptr + bound + tile, mask=mine, other=0)
        end = gl.load(tiles_ptr + 2 * bound + tile, mask=mine, other=0)
    column = column_tile * 128 + gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
    row_scales = column_tile.to(gl.int64) * R
    up_scales = (I // 128).to(gl.int64) * R
    h_scale_inv_ptr += row_scales
    dh_scale_inv_ptr += row_scales
    dweight_ptr += row_scales
    dgates = gl.allocate_shared_memory(gl.int32, [64, 128], SHARED)
    dups = gl.allocate_shared_memory(gl.int32, [64, 128], SHARED)
    activations = gl.allocate_shared_memory(gl.int32, [64, 128], SHARED)
    for first in gl.static_range(0, 64, PAIRS):
        row = start + 2 * (first + gl.arange(0, PAIRS, gl.SliceLayout(1, LAYOUT)))
        dgate_0, dup_0, a_0 = _gradients(
            h_ptr, h_scale_inv_ptr, da_ptr, weight_ptr, dweight_ptr, row, end, column, R, I, WEIGHTED
        )
        dgate_1, dup_1, a_1 = _gradients(
            h_ptr, h_scale_inv_ptr, da_ptr, weight_ptr, dweight_ptr, row + 1, end, column, R, I, WEIGHTED
        )
        dgate = pack(dgate_0, dgate_1)
        dup = pack(dup_0, dup_1)
        dgates.slice(first, PAIRS).store(dgate)
        dups.slice(first, PAIRS).store(dup)
        activations.slice(first, PAIRS).store(pack(a_0, a_1))
        _store_rows(dgate, dh_ptr, dh_scale_inv_ptr, 2 * I, row, end, column, gradient_amax_floor, POW2)
        _store_rows(dup, dh_ptr + I, dh_scale_inv_ptr + up_scales, 2 * I, row, end, column, gradient_amax_floor, POW2)
    up_tile = column_tile + I // 128
    dht_scale_inv_ptr += tile.to(gl.int64) * 2 * I
    at_scale_inv_ptr += tile.to(gl.int64) * I
    _store_columns(dgates, dht_ptr, dht_scale_inv_ptr, tile, column_tile, P, gradient_amax_floor, POW2)
    _store_columns(dups, dht_ptr, dht_scale_inv_ptr, tile, up_tile, P, gradient_amax_floor, POW2)
    _store_columns(activations, at_ptr, at_scale_inv_ptr, tile, column_tile, P, amax_floor, POW2)


@triton.jit(do_not_specialize=["R"])
def _sum_tiles_kernel(partial_ptr, out_ptr, last_ptr, R, G, GROUPED: tl.constexpr, ROWS: tl.constexpr):
    """out[r] = Σ_g partial[g, r]; zero for rows of no group."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    end = R
    if GROUPED:
        end = tl.load(last_ptr)
    total = tl.zeros((ROWS,), tl.float32)
    for g in range(G):
        total += tl.load(partial_ptr + g.to(tl.int64) * R + row, mask=row < end, other=0.0)
    tl.store(out_ptr + row, total, mask=row < R)


def swiglu_quantize(h_RN: Tensor, weight_R: Tensor | None, amax_floor: float, pow2: bool, out: tuple) -> None:
    """Launcher of `dsv3c::swiglu_quantize`."""
    _forward(h_RN, weight_R, amax_floor, pow2, *out, None, None)


def swiglu_quantize_save(h_RN: Tensor, weight_R: Tensor | None, amax_floor: float, pow2: bool, out: tuple) -> None:
    """Launcher of `dsv3c::swiglu_quantize_save`."""
    _forward(h_RN, weight_R, amax_floor, pow2, *out)


def _forward(h_RN, weight_R, amax_floor, pow2, a_fp8, a_scale_inv, h_fp8, h_scale_inv) -> None:
    R, I = a_fp8.shape  # noqa: E741
    if a_fp8.numel() == 0:
        return
    _swiglu_kernel[(ceil_div(R, ROWS), I // TILE)](
        h_RN.contiguous(), weight_R, a_fp8, a_scale_inv, h_fp8, h_scale_inv, R, I, amax_floor, pow2,
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
    R, I = da_RI.shape  # noqa: E741
    P = at_fp8.shape[1]
    if at_fp8.numel() == 0:
        return
    grouped, weighted = offs is not None, weight_R is not None
    tiles, first = tile_map(offs, R, TILE) if grouped else (None, None)
    E, bound = (len(offs), tiles.shape[1]) if grouped else (0, 0)
    partial = da_RI.new_empty((I // TILE, R), dtype=torch.float32) if weighted else dh_scale_inv
    _swiglu_backward_kernel[(P // TILE, I // TILE)](
        h_fp8_RN.contiguous(), column_major(h_scale_inv), da_RI.contiguous(), weight_R, dh_fp8, dh_scale_inv,
        dht_fp8.view(torch.int16), dht_scale_inv, at_fp8.view(torch.int16), at_scale_inv, partial, tiles, first, R, I,
        P, E, bound, amax_floor, gradient_amax_floor, pow2, weighted, grouped, num_warps=8, maxnreg=_registers(weighted, grouped),
    )  # fmt: skip
    if weighted and R:
        last = offs[-1:] if grouped else None
        _sum_tiles_kernel[(ceil_div(R, 256),)](partial, dweight_R, last, R, I // TILE, grouped, 256)


def _registers(weighted: bool, grouped: bool) -> int | None:
    """A thread's, where two programs would not fit a multiprocessor otherwise: the most that compile without spills."""
    return (128 if grouped else 112) if weighted else None


def variants() -> Iterator[Variant]:
    for weighted in (False, True):
        weight, no_weight = ({"weight_ptr": F32}, {}) if weighted else ({}, {"weight_ptr": None})
        for save in (False, True):
            saved, unsaved = ("h_fp8_ptr", "h_scale_inv_ptr"), {"h_fp8_ptr": None, "h_scale_inv_ptr": None}
            yield Variant(
                _swiglu_kernel,
                {"h_ptr": BF16, "a_ptr": FP8, "a_scale_inv_ptr": F32, "amax_floor": "fp32"}
                | weight
                | (dict(zip(saved, (FP8, F32), strict=True)) if save else {}),
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
                num_warps=8,
                maxnreg=_registers(weighted, grouped),
            )
    for grouped in (False, True):
        yield Variant(
            _sum_tiles_kernel,
            {"partial_ptr": F32, "out_ptr": F32} | ({"last_ptr": I32} if grouped else {}),
            {"GROUPED": grouped, "ROWS": 256} | ({} if grouped else {"last_ptr": None}),
        )
