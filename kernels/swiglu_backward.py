"""SwiGLU between two FP8 products, backward, from the FP8 copy of its input that forward saved.

From one read it writes the gradient twice, as tiles along the features for dgrad and along the rows for wgrad, and once
the recomputed activation, along the rows, for the wgrad of the product behind: 9 bytes a pair of gate and up. The
instructions are nearly as scarce as the bytes: about 60 a pair, where a copy's time has room for 71. So threads work
on 32-bit words of two BF16 values (`tiles.py`), and columns are read by `ldmatrix` (`columns.py`).

One program a multiprocessor stays. The copy engine brings gate, up and da two tiles ahead, and no barrier holds up all
warps: they wait in shared memory for operands, for the others' results, and until those have been read, and have some
of a turn before they must. (Copies that Triton starts come with five barriers a turn.) Copies fill the memory's queue,
in which every other load waits for about half a tile. So scales and weights are loaded a tile ahead, in front of the
copies. What is known of addresses before the loop the compiler would keep in registers that are not there: hence
`same`. Scales leave in lines of 128 bytes; a warp has 16 at a time.

Multiprocessors differ: the first has done its 35 tiles after 155 µs, the last after 201. So tiles are drawn from a
counter where there are many, three ahead. One thread, the scout, draws them, finds their rows and addresses and writes
those down for all warps. It is not of the warp that starts copies, which the others would wait for.

H200, 32768 rows of 2048 in 8 groups with weights, and 4096 of 18432: 180 and 198 µs, 0.82 and 0.83 of a copy of as many
bytes (tiles dealt out, their places computed by all warps: 190 and 205). In a form that drew elsewhere in a turn, 181
and 196: 32768 and 9000 rows in 256 groups 242 and 184 (247 and 183), 4096 and 1024 rows of 2048, dealt out, 31.0 and
14.5 (31.8 and 15.3). A copy that writes five bytes for
four read, as this does, takes 151 and 170, the copy engine alone, which moves the same tiles, 168 and 191. Without the
sum of weight gradients 3 µs less. Warps wait little: 100 to 400 of 11,000 cycles a turn for operands, and the slowest
100 for anything else. No faster: bands of 1, 4, 8 (0 to +4 µs); scales stored by each warp at once, which saves 4 % of
the instructions (+1 to +3); one thread for the scout's work and the copies' (+1 to +2); only the last turn's tiles
drawn (no gain over none).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv3c.kernels.cluster import arrive, start_of_shared, wait
from dsv3c.kernels.columns import divide_words, largest, load_words, shared_layout
from dsv3c.kernels.gemm import aligned, multiprocessors
from dsv3c.kernels.groups import tile_map
from dsv3c.kernels.launch import Descriptor, launched
from dsv3c.kernels.offline import F32, I32, Variant
from dsv3c.kernels.quantize import packed
from dsv3c.kernels.swiglu import sigmoid
from dsv3c.kernels.swiglu_ptx import (
    blank,
    both,
    copy,
    describe,
    draw,
    flush_columns,
    flush_rows,
    keep,
    look_up,
    place,
    read,
    same,
    store_words,
    unpack,
)
from dsv3c.kernels.tiles import high, larger, low, pack, reciprocal, scale_inv
from dsv3c.numerics import TILE, ceil_div

PROGRAM = {"num_warps": 32, "maxnreg": 64}  # all registers of a multiprocessor, and nearly all of its shared memory
BAND = 2  # tiles along the rows that are walked together
DRAWN = 8  # tiles of a program from which on they are drawn; with groups, always
HALVES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)
WORDS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
_wait_for_all = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6

# Bytes from the beginning of shared memory: of each of two tiles gate, up and da, 64 KiB; BF16 results, those of gate,
# of up and the activation, 96; barriers, and scales.
RESULTS_AT = gl.constexpr(128 * 1024)
BARRIERS_AT = gl.constexpr(224 * 1024)
SHARED = gl.constexpr(227 * 1024)


@gluon.jit
def _pairs(x, LAYOUT: gl.constexpr):
    """Even and odd columns of x [R, 2C], in LAYOUT; nothing moves."""
    even, odd = gl.split(gl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return gl.convert_layout(even, LAYOUT, assert_trivial=True), gl.convert_layout(odd, LAYOUT, assert_trivial=True)


@gluon.jit
def _load_scales(h_scale_inv_ptr, weight_ptr, start, scale_at, rows, gap, row, WEIGHTED: gl.constexpr):
    """Scales of gate and of up, and the weights, of a tile's rows. There are less than 2^31 scales of any tensor."""
    inside = row < rows
    gate = gl.load(h_scale_inv_ptr + (scale_at + row), mask=inside, other=0.0)
    up = gl.load(h_scale_inv_ptr + (scale_at + gap + row), mask=inside, other=0.0)
    weight = gate
    if WEIGHTED:
        weight = gl.load(weight_ptr + (start + row), mask=inside, other=0.0)
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
def _load_columns(memory, KIB: gl.constexpr):
    return load_words(memory.index(KIB)._reinterpret(gl.bfloat16, [128, 128], shared_layout(128, 16)))


@gluon.jit
def _scale_columns(words, others, kept, amax_floor, POW2: gl.constexpr):
    scale = scale_inv(largest(words, others), amax_floor, POW2)
    keep(kept + 4 * gl.arange(0, 128, scale.type.layout), scale)
    return scale


@gluon.jit
def _store_columns(words, others, scale, q_ptr, tiles):
    """Tiles along the rows, into 128 rows of q [.., 32·tiles]."""
    first, second = reciprocal(scale)
    q = divide_words(words, others, first[None, :], second[None, :])
    word = gl.arange(0, 32, gl.SliceLayout(1, q.type.layout))
    column = gl.arange(0, 128, gl.SliceLayout(0, q.type.layout))
    gl.store(q_ptr + (column[None, :] * (tiles * 32) + word[:, None]), q)


@gluon.jit
def _store_zeros_t(q_ptr, scale_inv_ptr, tiles, amax_floor, POW2: gl.constexpr, LAYOUT: gl.constexpr):
    """The same of rows that are not there."""
    column = gl.arange(0, 128, gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))
    gl.store(q_ptr + (column[:, None] * (tiles * 32) + word[None, :]), gl.full([128, 32], 0, gl.int32, LAYOUT))
    gl.store(scale_inv_ptr + column, scale_inv(gl.full([128], 0.0, gl.float32, column.type.layout), amax_floor, POW2))


@launched
@gluon.jit(do_not_specialize=["R", "E", "bound", "drawn"])
def _swiglu_backward_kernel(
    h_desc, da_desc, h_scale_inv_ptr, weight_ptr, dh_ptr, dh_scale_inv_ptr, dht_ptr, dht_scale_inv_ptr, at_ptr,
    at_scale_inv_ptr, dweight_ptr, tiles_ptr, first_ptr, R, width, P, E, bound, drawn, amax_floor, gradient_amax_floor,
    POW2: gl.constexpr, WEIGHTED: gl.constexpr, GROUPED: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """A tile: 128 rows of one group × 128 columns of gate and of up. Tiles that no group has are written as zeros,
    transposed; no row is theirs. Words hold four columns in FP8, two in BF16, and of what is transposed, four rows."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    CHUNKS: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [gl.num_warps(), 1], [1, 0])
    DA: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 36], [1, 8], [2, 16], [4, 0], [8, 0], [16, 0], [32, 0], [64, 0]]
    )
    memory = gl.allocate_shared_memory(gl.int32, [SHARED // 1024, 8, 32], h_desc.layout)
    barriers = memory.index(BARRIERS_AT // 1024)._reinterpret(gl.int64, (4, 1), mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(barriers.index(i), count=1 if i < 2 else gl.num_warps())
    fence_async_shared()
    _wait_for_all()
    shared_at = start_of_shared()
    full = shared_at + BARRIERS_AT  # of each of two tiles
    stored, taken = full + 16, full + 24  # by all warps: results
    slots = full + 128  # descriptions of four tiles
    kept = full + 256  # scales of rows, of gate and of up
    kept_t = kept + 1024  # and of columns, those and the activation's
    row = gl.arange(0, 128, gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))
    results = shared_at + RESULTS_AT + place(row[:, None], word[None, :])
    chunk = shared_at + 16 * gl.arange(0, 8, gl.SliceLayout(0, CHUNKS))[None, :]
    row_of_chunk = gl.convert_layout(row, gl.SliceLayout(1, CHUNKS), assert_trivial=True)[:, None]
    tiles, columns = P // 128, width // 128
    of_groups, gap = tiles, columns * R
    gdc_launch_dependents()
    gdc_wait()
    if GROUPED:
        of_groups = gl.load(first_ptr + E)
    programs = gl.num_programs(0)
    n = gl.program_id(0)
    start_2, end_2 = look_up(n, columns, of_groups, BAND, tiles_ptr, bound, R, slots, GROUPED)
    describe(slots, start_2, end_2, columns, R, width, P)
    n += programs
    start_2, end_2 = look_up(n, columns, of_groups, BAND, tiles_ptr, bound, R, slots + 32, GROUPED)
    describe(slots + 32, start_2, end_2, columns, R, width, P)
    n += programs
    start_2, end_2 = look_up(n, columns, of_groups, BAND, tiles_ptr, bound, R, slots + 64, GROUPED)
    _wait_for_all()
    copy(shared_at, full, slots, columns)
    copy(shared_at + 65536, full + 8, slots + 32, columns)
    rows, start, scale_at, _ = read(slots)
    scales = _load_scales(h_scale_inv_ptr, weight_ptr, start, scale_at, rows, gap, row, WEIGHTED)
    count = gl.to_tensor(0)
    while rows > 0:
        stage = count & 1
        wait(full + 8 * stage, count >> 1 & 1)
        if rows < 128:
            blank(chunk + stage * 65536, row_of_chunk, rows)
        gate = memory.index(stage * 64)._reinterpret(gl.int32, [128, 32], h_desc.layout).load(LAYOUT)
        up = memory.index(stage * 64 + 16)._reinterpret(gl.int32, [128, 32], h_desc.layout).load(LAYOUT)
        da = memory.index(stage * 64 + 32)._reinterpret(gl.int32, [128, 64], DA).load(WIDE)
        da_01, da_23 = _pairs(da, LAYOUT)
        gate_0, gate_1, gate_2, gate_3 = unpack(gate)
        up_0, up_1, up_2, up_3 = unpack(up)
        g0, u0, a0, dweight = _gradients(gate_0, up_0, low(da_01), 0.0, scales, WEIGHTED)
        g1, u1, a1, dweight = _gradients(gate_1, up_1, high(da_01), dweight, scales, WEIGHTED)
        g2, u2, a2, dweight = _gradients(gate_2, up_2, low(da_23), dweight, scales, WEIGHTED)
        g3, u3, a3, dweight = _gradients(gate_3, up_3, high(da_23), dweight, scales, WEIGHTED)
        g01, g23, u01, u23 = pack(g0, g1), pack(g2, g3), pack(u0, u1), pack(u2, u3)
        wait(taken, count & 1 ^ 1)
        n += programs
        if drawn > 0:
            n = draw(first_ptr + (E + 1)) + 3 * programs
        if count > 0:
            flush_columns(kept_t, slots + (count - 1 & 3) * 32, dht_scale_inv_ptr, at_scale_inv_ptr, width)
        store_words(results, g01, g23)
        store_words(results + 32 * 1024, u01, u23)
        store_words(results + 64 * 1024, pack(a0, a1), pack(a2, a3))
        amax = gl.reduce(both(larger(g01, g23), larger(u01, u23)), 1, larger)
        gate_scale_inv = scale_inv(gl.abs(low(amax)), gradient_amax_floor, POW2)
        up_scale_inv = scale_inv(gl.abs(high(amax)), gradient_amax_floor, POW2)
        keep(kept + 4 * row, gate_scale_inv)
        keep(kept + 512 + 4 * row, up_scale_inv)
        describe(slots + (count + 2 & 3) * 32, start_2, end_2, columns, R, width, P)
        arrive(stored)
        gate_first, gate_second = reciprocal(gate_scale_inv)
        up_first, up_second = reciprocal(up_scale_inv)
        # Loads in front of the copies, behind which they would wait.
        slot = slots + (count + 3 & 3) * 32
        start_2, end_2 = look_up(n, columns, of_groups, BAND, tiles_ptr, bound, R, slot, GROUPED)
        rows_1, start_1, scale_at_1, _ = read(slots + (count + 1 & 3) * 32)
        scales = _load_scales(h_scale_inv_ptr, weight_ptr, start_1, scale_at_1, rows_1, gap, row, WEIGHTED)
        dh_at, q_at, _, _ = read(slots + (count & 3) * 32 + 16)
        inside = row < rows
        dh = dh_ptr + dh_at.to(gl.int64) * 4
        dh += row[:, None] * (same(columns) * 64) + word[None, :]
        gl.store(dh, divide_words(g01, g23, gate_first[:, None], gate_second[:, None]), mask=inside[:, None])
        gl.store(dh + width // 4, divide_words(u01, u23, up_first[:, None], up_second[:, None]), mask=inside[:, None])
        if WEIGHTED:
            gl.store(dweight_ptr + (scale_at + row), gl.sum(dweight, 1), mask=inside)
        wait(stored, count & 1)
        flush_rows(kept, dh_scale_inv_ptr + scale_at, gap, rows)
        copy(shared_at + stage * 65536, full + 8 * stage, slots + (count + 2 & 3) * 32, columns)
        g0, g1 = _load_columns(memory, RESULTS_AT // 1024)
        u0, u1 = _load_columns(memory, RESULTS_AT // 1024 + 32)
        a0, a1 = _load_columns(memory, RESULTS_AT // 1024 + 64)
        g_scale = _scale_columns(g0, g1, kept_t, gradient_amax_floor, POW2)
        u_scale = _scale_columns(u0, u1, kept_t + 512, gradient_amax_floor, POW2)
        a_scale = _scale_columns(a0, a1, kept_t + 1024, amax_floor, POW2)
        arrive(taken)
        dht, tiles_too = dht_ptr + q_at.to(gl.int64) * 4, same(tiles)
        _store_columns(g0, g1, g_scale, dht, tiles_too)
        _store_columns(u0, u1, u_scale, dht + columns.to(gl.int64) * 32 * P, tiles_too)
        _store_columns(a0, a1, a_scale, at_ptr + q_at.to(gl.int64) * 4, tiles_too)
        rows, scale_at = rows_1, scale_at_1
        count += 1
    if count > 0:
        wait(taken, count & 1 ^ 1)
        flush_columns(kept_t, slots + (count - 1 & 3) * 32, dht_scale_inv_ptr, at_scale_inv_ptr, width)
    if GROUPED:
        for i in range(gl.program_id(0), (tiles - of_groups) * columns, programs):
            tile, column = of_groups + i // columns, i % columns
            q_at, scale_at = column.to(gl.int64) * 32 * P + tile * 32, tile * width + column * 128
            dht_scale_inv = dht_scale_inv_ptr + (scale_at + tile * width)
            _store_zeros_t(dht_ptr + q_at, dht_scale_inv, tiles, gradient_amax_floor, POW2, LAYOUT)
            q_up = q_at + columns.to(gl.int64) * 32 * P
            _store_zeros_t(dht_ptr + q_up, dht_scale_inv + width, tiles, gradient_amax_floor, POW2, LAYOUT)
            _store_zeros_t(at_ptr + q_at, at_scale_inv_ptr + scale_at, tiles, amax_floor, POW2, LAYOUT)
    _wait_for_all()
    for i in gl.static_range(4):
        mbarrier.invalidate(barriers.index(i))


@launched
@triton.jit
def _draw_none_kernel(first_ptr):
    """None has been drawn. What follows may begin, and wait."""
    gdc_launch_dependents()
    tl.store(first_ptr + 1, 0)


@launched
@triton.jit(do_not_specialize=["R"])
def _sum_tiles_kernel(
    partial_ptr, out_ptr, last_ptr, R, G, GROUPED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr
):
    """out[r] = Σ_g partial[g, r]; zero for rows of no group."""
    gdc_wait()
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
    programs = multiprocessors()
    drawn = grouped or ceil_div(R, TILE) * (width // TILE) >= DRAWN * programs
    if grouped:
        tiles, first = tile_map(offs, R, TILE)
    else:
        tiles, first = None, da_RI.new_empty(2, dtype=torch.int32)
        if drawn:
            _draw_none_kernel[(1,)](first, num_warps=1)
    E, bound = (len(offs), tiles.shape[1]) if grouped else (0, 0)
    weight_R = weight_R.contiguous() if weighted else None
    partial = da_RI.new_empty((width // TILE, R), dtype=torch.float32) if weighted else dh_scale_inv
    _swiglu_backward_kernel[(programs,)](
        Descriptor(aligned(h_fp8_RN).view(torch.int32), (128, 32), WORDS),
        Descriptor(aligned(da_RI).view(torch.int32).view(R, width // 64, 32), (128, 2, 32), HALVES),
        packed(h_scale_inv), weight_R, dh_fp8.view(torch.int32), dh_scale_inv, dht_fp8.view(torch.int32),
        dht_scale_inv, at_fp8.view(torch.int32), at_scale_inv, partial, tiles, first, R, width, P, E, bound, int(drawn),
        amax_floor, gradient_amax_floor, pow2, weighted, grouped, BAND, **PROGRAM, launch_pdl=True,
    )  # fmt: skip
    if weighted and R:
        last = offs[-1:] if grouped else None
        _sum_tiles_kernel[(ceil_div(R, 64),)](
            partial, dweight_R, last, R, width // TILE, grouped, 64, 16, launch_pdl=True
        )


def variants() -> Iterator[Variant]:
    yield Variant(_draw_none_kernel, {"first_ptr": I32}, {}, num_warps=1)
    for grouped in (False, True):
        for weighted in (False, True):
            given = {"tiles_ptr": I32} if grouped else {}
            given |= {"weight_ptr": F32} if weighted else {}
            left_out = {name: None for name in ("weight_ptr", "tiles_ptr") if name not in given}
            yield Variant(
                _swiglu_backward_kernel,
                {"h_desc": f"tensordesc<i32[128, 32],{WORDS!r}>", "da_desc": f"tensordesc<i32[128, 2, 32],{HALVES!r}>"}
                | {"dh_ptr": I32, "dht_ptr": I32, "at_ptr": I32, "dweight_ptr": F32, "first_ptr": I32}
                | {f"{name}_scale_inv_ptr": F32 for name in ("h", "dh", "dht", "at")}
                | {"amax_floor": "fp32", "gradient_amax_floor": "fp32"}
                | given,
                {"POW2": False, "WEIGHTED": weighted, "GROUPED": grouped, "BAND": BAND} | left_out,
                **PROGRAM,
            )
    for grouped in (False, True):
        last, no_last = ({"last_ptr": I32}, {}) if grouped else ({}, {"last_ptr": None})
        yield Variant(
            _sum_tiles_kernel,
            {"partial_ptr": F32, "out_ptr": F32} | last,
            {"GROUPED": grouped, "ROWS": 64, "TILES": 16} | no_last,
        )
