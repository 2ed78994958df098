"""SwiGLU between two FP8 products, backward, from the FP8 copy of its input that forward saved.

From one read it writes the gradient twice, as tiles along the features for dgrad and along the rows for wgrad, and once
the recomputed activation, along the rows, for the wgrad of the product behind: 9 bytes a pair of gate and up. The
instructions are nearly as scarce as the bytes: 62 a pair, where a copy's time has room for 71. So threads work on
32-bit words of two BF16 values (`tiles.py`), and columns are read by `ldmatrix` (`columns.py`).

One program a multiprocessor stays. The copy engine brings gate, up and da two tiles ahead. That fills the memory's
queue, and every other load waits in it for about half a tile. So scales, weights and where a tile lies are loaded a
tile ahead too, all at once and in front of the copies: behind them, or late, or spread over a turn, they cost 5 to
30 % (a warp has few counters to wait by, and shares them between these loads and those from shared memory). The two
barriers of a turn follow each other closely, with little but reads of columns between them: warps are free to be up to
a turn apart.

H200, 32768 rows of 2048 in 8 groups with weights, and 4096 of 18432: 196 and 205 µs, 0.74 and 0.80 of a copy of as many
bytes; with two programs a multiprocessor that come and go, 220 and 223. The copy engine alone, which moves the same
tiles and computes nothing, takes 171 and 191, and 161 and 180 where addresses follow each other. To that come the
scales, 3 % of the bytes, and of the first, 9 µs of the map of tiles and the sum of weight gradients. No faster: 16
warps, scales two tiles ahead or fetched into the L2 first, hints to the L2, other orders of tiles. Few tiles take 3 µs
longer than with the former kernel: 4096 rows of 2048 34 µs instead of 31, 9000 in 256 groups 223 instead of 207.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from dsv3c.kernels.columns import divide_words, largest, load_words, shared_layout, store_columns
from dsv3c.kernels.gemm import aligned, multiprocessors
from dsv3c.kernels.groups import tile_map
from dsv3c.kernels.launch import Descriptor, launched
from dsv3c.kernels.offline import F32, I32, Variant
from dsv3c.kernels.quantize import column_major
from dsv3c.kernels.swiglu import sigmoid
from dsv3c.kernels.tiles import high, larger, low, pack, reciprocal, scale_inv
from dsv3c.numerics import TILE, ceil_div

PROGRAM = {"num_warps": 32, "maxnreg": 64}  # all registers of a multiprocessor, and nearly all of its shared memory
BAND = 2  # tiles along the rows that are walked together
WORDS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
_wait_for_all = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6


@triton.jit
def _both(a, b):
    """The larger magnitude of each word: of a in the low half, of b in the high."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 lows, highs;
        prmt.b32 lows, $1, $2, 0x5410;
        prmt.b32 highs, $1, $2, 0x7632;
        max.NaN.xorsign.abs.bf16x2 $0, lows, highs;
        }""",
        "=r,r,r",
        [a, b],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _unpack(word):
    """The four E4M3 numbers of a word, in float32."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 a, b, c, d;
        .reg .b32 ab, cd;
        mov.b32 {a, b}, $4;
        cvt.rn.f16x2.e4m3x2 ab, a;
        cvt.rn.f16x2.e4m3x2 cd, b;
        mov.b32 {a, b}, ab;
        mov.b32 {c, d}, cd;
        cvt.f32.f16 $0, a;
        cvt.f32.f16 $1, b;
        cvt.f32.f16 $2, c;
        cvt.f32.f16 $3, d;
        }""",
        "=f,=f,=f,=f,r",
        [word],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _pairs(x, LAYOUT: gl.constexpr):
    """Even and odd columns of x [R, 2C], in LAYOUT; nothing moves."""
    even, odd = gl.split(gl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return gl.convert_layout(even, LAYOUT, assert_trivial=True), gl.convert_layout(odd, LAYOUT, assert_trivial=True)


@gluon.jit
def _share(buffer, even, odd):
    """Stores even and odd columns."""
    buffer.store(gl.reshape(gl.join(even, odd), (even.shape[0], 2 * even.shape[1])))


@gluon.jit
def _next(tile, column, columns, down, right, BAND: gl.constexpr):
    """The tile that a program takes after this one."""
    column += right
    over = column >= columns
    return gl.where(over, tile + (down + BAND), tile + down), gl.where(over, column - columns, column)


@gluon.jit
def _rows(tile, tiles_ptr, tiles, R, bound, GROUPED: gl.constexpr):
    """The first row of a tile, and how many rows follow in its group; none if `tiles`, those of groups, end before."""
    start = tile * 128
    end = R
    if GROUPED:
        start = gl.load(tiles_ptr + bound + tile, mask=tile < tiles, other=0)
        end = gl.load(tiles_ptr + 2 * bound + tile, mask=tile < tiles, other=0)
    return start, end - start


@gluon.jit
def _copy(descs, operands, stage, start, column, columns, mine):
    """Has the operands of a tile copied, if there is one."""
    h_desc, da_desc = descs
    gates, ups, das, full = operands
    ready = full.index(stage)
    mbarrier.expect(ready, 4 * 128 * 128, pred=mine)
    tma.async_copy_global_to_shared(h_desc, [start, column * 32], ready, gates.index(stage), pred=mine)
    tma.async_copy_global_to_shared(h_desc, [start, (column + columns) * 32], ready, ups.index(stage), pred=mine)
    tma.async_copy_global_to_shared(da_desc, [start, column * 64], ready, das.index(stage), pred=mine)


@gluon.jit
def _load_scales(h_scale_inv_ptr, weight_ptr, start, rows, column, columns, row, R, WEIGHTED: gl.constexpr):
    """Scales of gate and of up, and the weights, of a tile's rows. There are less than 2^31 scales of any tensor."""
    inside = row < rows
    at = h_scale_inv_ptr + (column * R + start + row)
    gate = gl.load(at, mask=inside, other=0.0)
    up = gl.load(at + columns * R, mask=inside, other=0.0)
    weight = gate
    if WEIGHTED:
        weight = gl.load(weight_ptr + start + row, mask=inside, other=0.0)
    return gate, up, weight


@gluon.jit
def _gradients(gate, up, da, dweight, scales, WEIGHTED: gl.constexpr):
    """Gradients of gate and up, the activation, and dweight + da·a without weight, in float32."""
    gate_scale_inv, up_scale_inv, weight = scales
    gate = gate * gate_scale_inv[:, None]
    up = up * up_scale_inv[:, None]
    s = sigmoid(gate)
    silu = gate * s
    a = silu * up
    if WEIGHTED:
        dweight = gl.fma(da, a, dweight)
        a *= weight[:, None]
        da *= weight[:, None]
    dgate = da * up * gl.fma(silu, 1 - s, s)
    return dgate, da * silu, a, dweight


@gluon.jit
def _load_columns(buffer):
    return load_words(buffer._reinterpret(gl.bfloat16, [128, 128], shared_layout(128, 16)))


@gluon.jit
def _store_tiles_t(words, others, q_ptr, scale_inv_ptr, P, amax_floor, POW2: gl.constexpr):
    """Tiles along the rows, into 128 rows of q [.., P/4]."""
    scale = scale_inv(largest(words, others), amax_floor, POW2)
    first, second = reciprocal(scale)
    q = divide_words(words, others, first[None, :], second[None, :])
    store_columns(q, scale, q_ptr, scale_inv_ptr, 128, P // 4, 1)


@launched
@gluon.jit(do_not_specialize=["R", "E", "bound"])
def _swiglu_backward_kernel(
    h_desc, da_desc, h_scale_inv_ptr, weight_ptr, dh_ptr, dh_scale_inv_ptr, dht_ptr, dht_scale_inv_ptr, at_ptr,
    at_scale_inv_ptr, dweight_ptr, tiles_ptr, first_ptr, R, width, P, E, bound, amax_floor, gradient_amax_floor,
    POW2: gl.constexpr, WEIGHTED: gl.constexpr, GROUPED: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """A tile: 128 rows of one group × 128 columns of gate and of up. Tiles that no group has are written as zeros,
    transposed; no row is theirs. Words hold four columns in FP8, two in BF16, and of what is transposed, four rows."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    SHARED: gl.constexpr = shared_layout(64, 32)
    dgates = gl.allocate_shared_memory(gl.int32, [128, 64], SHARED)
    dups = gl.allocate_shared_memory(gl.int32, [128, 64], SHARED)
    activations = gl.allocate_shared_memory(gl.int32, [128, 64], SHARED)
    gates = gl.allocate_shared_memory(gl.int32, [2, 128, 32], h_desc.layout)
    ups = gl.allocate_shared_memory(gl.int32, [2, 128, 32], h_desc.layout)
    das = gl.allocate_shared_memory(gl.int32, [2, 128, 64], da_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, (2, 1), mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
    row = gl.arange(0, 128, gl.SliceLayout(1, LAYOUT))
    row_wide = gl.convert_layout(row, gl.SliceLayout(1, WIDE), assert_trivial=True)
    at = row[:, None] * (width // 2) + gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))[None, :]
    tiles, columns = P // 128, width // 128
    of_groups = tiles
    if GROUPED:
        of_groups = gl.load(first_ptr + E)
    step = gl.num_programs(0) // BAND
    down, right = step // columns * BAND, step % columns
    i = gl.program_id(0) // BAND
    tile, column = i // columns * BAND + gl.program_id(0) % BAND, i % columns
    start, rows = _rows(tile, tiles_ptr, of_groups, R, bound, GROUPED)
    descs, operands = (h_desc, da_desc), (gates, ups, das, full)
    _copy(descs, operands, 0, start, column, columns, tile < tiles)
    tile_1, column_1 = _next(tile, column, columns, down, right, BAND)
    start_1, rows_1 = _rows(tile_1, tiles_ptr, of_groups, R, bound, GROUPED)
    _copy(descs, operands, 1, start_1, column_1, columns, tile_1 < tiles)
    tile_2, column_2 = _next(tile_1, column_1, columns, down, right, BAND)
    start_2, rows_2 = _rows(tile_2, tiles_ptr, of_groups, R, bound, GROUPED)
    scales = _load_scales(h_scale_inv_ptr, weight_ptr, start, rows, column, columns, row, R, WEIGHTED)
    count = gl.to_tensor(0)
    _wait_for_all()  # or Triton would have one at the beginning of each turn
    while tile < tiles:
        stage = count & 1
        mbarrier.wait(full.index(stage), count // 2 & 1)
        gate = gates.index(stage).load(LAYOUT)
        up = ups.index(stage).load(LAYOUT)
        da = das.index(stage).load(WIDE)
        if rows < 128:
            gate = gl.where(row[:, None] < rows, gate, 0)
            up = gl.where(row[:, None] < rows, up, 0)
            da = gl.where(row_wide[:, None] < rows, da, 0)
        da_01, da_23 = _pairs(da, LAYOUT)
        gate_0, gate_1, gate_2, gate_3 = _unpack(gate)
        up_0, up_1, up_2, up_3 = _unpack(up)
        g0, u0, a0, dweight = _gradients(gate_0, up_0, low(da_01), 0.0, scales, WEIGHTED)
        g1, u1, a1, dweight = _gradients(gate_1, up_1, high(da_01), dweight, scales, WEIGHTED)
        g2, u2, a2, dweight = _gradients(gate_2, up_2, low(da_23), dweight, scales, WEIGHTED)
        g3, u3, a3, dweight = _gradients(gate_3, up_3, high(da_23), dweight, scales, WEIGHTED)
        g01, g23, u01, u23 = pack(g0, g1), pack(g2, g3), pack(u0, u1), pack(u2, u3)
        _share(dgates, g01, g23)
        _share(dups, u01, u23)
        _share(activations, pack(a0, a1), pack(a2, a3))
        amax = gl.reduce(_both(larger(g01, g23), larger(u01, u23)), 1, larger)
        gate_scale_inv = scale_inv(gl.abs(low(amax)), gradient_amax_floor, POW2)
        up_scale_inv = scale_inv(gl.abs(high(amax)), gradient_amax_floor, POW2)
        gate_first, gate_second = reciprocal(gate_scale_inv)
        up_first, up_second = reciprocal(up_scale_inv)
        _wait_for_all()
        # Loads in front of the copies, behind which they would wait.
        tile_3, column_3 = _next(tile_2, column_2, columns, down, right, BAND)
        start_3, rows_3 = _rows(tile_3, tiles_ptr, of_groups, R, bound, GROUPED)
        scales = _load_scales(h_scale_inv_ptr, weight_ptr, start_1, rows_1, column_1, columns, row, R, WEIGHTED)
        _copy(descs, operands, stage, start_2, column_2, columns, tile_2 < tiles)
        inside = row < rows
        dh = dh_ptr + start.to(gl.int64) * (width // 2) + column * 32 + at
        gl.store(dh, divide_words(g01, g23, gate_first[:, None], gate_second[:, None]), mask=inside[:, None])
        gl.store(dh + width // 4, divide_words(u01, u23, up_first[:, None], up_second[:, None]), mask=inside[:, None])
        scale_at = column * R + start + row
        gl.store(dh_scale_inv_ptr + scale_at, gate_scale_inv, mask=inside)
        gl.store(dh_scale_inv_ptr + scale_at + columns * R, up_scale_inv, mask=inside)
        if WEIGHTED:
            gl.store(dweight_ptr + scale_at, gl.sum(dweight, 1), mask=inside)
        g0, g1 = _load_columns(dgates)
        u0, u1 = _load_columns(dups)
        a0, a1 = _load_columns(activations)
        _wait_for_all()  # so early that no warp waits for another one's stores
        dht_scale_inv = dht_scale_inv_ptr + (tile * 2 * width + column * 128)
        q_at = column.to(gl.int64) * 32 * P + tile * 32
        _store_tiles_t(g0, g1, dht_ptr + q_at, dht_scale_inv, P, gradient_amax_floor, POW2)
        q_up = q_at + columns.to(gl.int64) * 32 * P
        _store_tiles_t(u0, u1, dht_ptr + q_up, dht_scale_inv + width, P, gradient_amax_floor, POW2)
        at_scale_inv = at_scale_inv_ptr + (tile * width + column * 128)
        _store_tiles_t(a0, a1, at_ptr + q_at, at_scale_inv, P, amax_floor, POW2)
        tile, column, start, rows = tile_1, column_1, start_1, rows_1
        tile_1, column_1, start_1, rows_1 = tile_2, column_2, start_2, rows_2
        tile_2, column_2, start_2, rows_2 = tile_3, column_3, start_3, rows_3
        count += 1
    for i in gl.static_range(2):
        mbarrier.invalidate(full.index(i))


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
    _swiglu_backward_kernel[(multiprocessors() // BAND * BAND,)](
        Descriptor(aligned(h_fp8_RN).view(torch.int32), (128, 32), WORDS),
        Descriptor(aligned(da_RI).view(torch.int32), (128, 64), WORDS),
        column_major(h_scale_inv), weight_R, dh_fp8.view(torch.int32), dh_scale_inv, dht_fp8.view(torch.int32),
        dht_scale_inv, at_fp8.view(torch.int32), at_scale_inv, partial, tiles, first, R, width, P, E, bound, amax_floor,
        gradient_amax_floor, pow2, weighted, grouped, BAND, **PROGRAM,
    )  # fmt: skip
    if weighted and R:
        last = offs[-1:] if grouped else None
        _sum_tiles_kernel[(ceil_div(R, 64),)](partial, dweight_R, last, R, width // TILE, grouped, 64, 16)


def variants() -> Iterator[Variant]:
    for grouped in (False, True):
        tiles, no_tiles = (
            ({"tiles_ptr": I32, "first_ptr": I32}, {}) if grouped else ({}, {"tiles_ptr": None, "first_ptr": None})
        )
        for weighted in (False, True):
            weight, no_weight = ({"weight_ptr": F32}, {}) if weighted else ({}, {"weight_ptr": None})
            yield Variant(
                _swiglu_backward_kernel,
                {f"{name}_desc": f"tensordesc<i32[128, {n}],{WORDS!r}>" for name, n in (("h", 32), ("da", 64))}
                | {"dh_ptr": I32, "dht_ptr": I32, "at_ptr": I32, "dweight_ptr": F32}
                | {f"{name}_scale_inv_ptr": F32 for name in ("h", "dh", "dht", "at")}
                | {"amax_floor": "fp32", "gradient_amax_floor": "fp32"}
                | weight
                | tiles,
                {"POW2": False, "WEIGHTED": weighted, "GROUPED": grouped, "BAND": BAND} | no_weight | no_tiles,
                **PROGRAM,
            )
        last, no_last = ({"last_ptr": I32}, {}) if grouped else ({}, {"last_ptr": None})
        yield Variant(
            _sum_tiles_kernel,
            {"partial_ptr": F32, "out_ptr": F32} | last,
            {"GROUPED": grouped, "ROWS": 64, "TILES": 16} | no_last,
        )
