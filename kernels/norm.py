"""RMSNorm and the cast behind it, memory-bound: 3 bytes a value, 7 with the residual addition in front, 9 with
the BF16 result beside. A program has one row, or a warp one if rows are narrow and alone; it stays in registers between
its sum of squares and its result.

In Gluon, which stores a tile's scale from where it is; plain Triton moves the scales of each chunk through shared
memory first, with two barriers. A chunk's weight is loaded a chunk ahead, the first one before the sum: until a
multiprocessor's cache has it, rows wait for it one chunk after the other.

Wide rows alone (`_wide_norm_kernel`) come two to a program, by the copy engine: the second is on its way while the
first is computed. The weight is loaded once for both, and their scales, which are neighbours, are stored together.

H200, rows of 7168, in the time of a copy of as many bytes: alone 0.87 to 0.88 (4096 rows) and 0.96 (16384), with the
addition 0.89 and 0.95, and 0.92 and 0.94 with the BF16 result. Alone by a row a program, with the weight loaded for
each, 0.84 and 0.94. Slower than two rows a program: four 0.86, eight 0.85, sixteen 0.83; three at once 0.86; scales
stored row by row 0.86; 8 warps 0.83; results by the copy engine as well 0.87 and 0.96. x marked for the L2 cache as
not needed again: no difference at 4096 rows, 0.89 at 16384. A copy reads half of its bytes, the norm two thirds, and
what is written waits in the L2 cache: without the arithmetic 4096 rows would take 0.94.

Rows of up to 2048 columns, alone, have a warp each, which needs no barrier, and eight lanes a tile instead of sixteen:
of 1536 columns a row takes 568 instructions instead of 784. 4096 rows 0.87 (two warps a row 0.82), 16384 0.88 (0.87),
4096 of 512 columns 0.90 (0.77). With 64 registers all 4096 rows fit at once, 0.90; but the weight's loads come late
then, and any other number of rows takes longer than with two warps a row.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsv3c.kernels.bulk import copy, expect, set_up
from dsv3c.kernels.cluster import start_of_shared, wait
from dsv3c.kernels.gemm import aligned
from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import F32, I16, I32, Variant
from dsv3c.kernels.tiles import as_words, high, low, pack, plus, store_tiles, store_words, times
from dsv3c.numerics import ceil_div

NARROW = 2048  # columns of rows that a warp can have
ROWS, TILES = 2, 8  # of a program that has wide rows; of a chunk
_wait_for_all = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6


@triton.jit
def squares(words, sums):
    """The squares of both numbers of each word, added to `sums`."""
    return tl.fma(high(words), high(words), tl.fma(low(words), low(words), sums))


@triton.jit
def scaled(words, factor):
    return pack(low(words) * factor, high(words) * factor)


@launched
@gluon.jit(do_not_specialize=["R"])
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, q_ptr, scale_inv_ptr, rstd_ptr, R, x_stride, eps, amax_floor,
    POW2: gl.constexpr, ADD: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr, TILES: gl.constexpr,
    LANES: gl.constexpr,
):  # fmt: skip
    """ROWS rows a program, in chunks of TILES tiles, all of them in registers; LANES lanes have a tile."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    place = gl.arange(0, ROWS * TILES, gl.SliceLayout(1, LAYOUT))
    row, tile = (gl.program_id(0) * ROWS + place // TILES).to(gl.int64), place % TILES
    column = tile[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))[None, :]  # in words: half of the columns
    known = (row < R) | (ROWS == 1)
    x_ptr += row[:, None] * x_stride + column
    at = row[:, None] * (K // 2) + column
    chunks, sums = (), gl.full([ROWS * TILES, 64], 0.0, gl.float32, LAYOUT)
    for chunk in gl.static_range((K + 128 * TILES - 1) // (128 * TILES)):
        inside = known[:, None] & (column < K // 2 - chunk * 64 * TILES)
        x = gl.load(x_ptr + chunk * 64 * TILES, mask=inside, other=0)
        if ADD:
            x = plus(x, gl.load(residual_ptr + at + chunk * 64 * TILES, mask=inside, other=0))
            gl.store(sum_ptr + at + chunk * 64 * TILES, x, mask=inside)
        sums = squares(x, sums)
        chunks += (x,)
    ahead = gl.load(weight_ptr + column, mask=column < K // 2, other=0)  # the next chunk's weight, before it is needed
    rstd = gl.rsqrt(gl.sum(gl.reshape(gl.sum(sums, 1), (ROWS, TILES)), 1) / K + eps)
    first = gl.program_id(0) * ROWS + gl.arange(0, ROWS, rstd.type.layout)
    gl.store(rstd_ptr + first, rstd, mask=(first < R) | (ROWS == 1))
    rstd = gl.reshape(rstd[:, None] + gl.full([ROWS, TILES], 0.0, gl.float32), (ROWS * TILES,))
    rstd = gl.convert_layout(rstd, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    for chunk in gl.static_range((K + 128 * TILES - 1) // (128 * TILES)):
        inside = known[:, None] & (column < K // 2 - chunk * 64 * TILES)
        weight = ahead
        if (chunk + 1) * TILES * 128 < K:
            below = column + (chunk + 1) * 64 * TILES
            ahead = gl.load(weight_ptr + below, mask=below < K // 2, other=0)
        y = times(scaled(chunks[chunk], rstd[:, None]), weight)
        if y_ptr is not None:
            gl.store(y_ptr + at + chunk * 64 * TILES, y, mask=inside)
        scale_at = scale_inv_ptr + (chunk * TILES + tile).to(gl.int64) * R + row
        inside_tile = known & (tile < K // 128 - chunk * TILES)
        store_tiles(y, q_ptr + at + chunk * 64 * TILES, scale_at, inside_tile, amax_floor, POW2)


@launched
@gluon.jit(do_not_specialize=["R", "x_stride"])
def _wide_norm_kernel(
    x_ptr, weight_ptr, q_ptr, scale_inv_ptr, rstd_ptr, R, x_stride, eps, amax_floor,
    POW2: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """ROWS rows a program, all on their way from the start, in chunks of TILES tiles."""
    LANES: gl.constexpr = 32 * gl.num_warps() // TILES  # of a tile
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 64 // LANES], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    SCALES: gl.constexpr = gl.BlockedLayout([1, 1], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    PARTS: gl.constexpr = gl.BlockedLayout([TILES], [32], [gl.num_warps()], [0])
    THREAD: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    CHUNKS: gl.constexpr = (K + 128 * TILES - 1) // (128 * TILES)
    ROW: gl.constexpr = CHUNKS * TILES * 256  # bytes of shared memory
    rows = gl.allocate_shared_memory(gl.int32, [ROWS * CHUNKS + 1, TILES, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    parts = gl.allocate_shared_memory(gl.float32, [ROWS, TILES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    base = start_of_shared()
    first = gl.program_id(0) * ROWS
    for i in gl.static_range(ROWS):
        set_up(base + ROWS * ROW + 8 * i)
        expect(base + ROWS * ROW + 8 * i, gl.where(first + i < R, 2 * K, 0))
    _wait_for_all()
    thread = gl.arange(0, 32 * gl.num_warps(), THREAD)
    source = x_ptr + (first + thread).to(gl.int64) * x_stride
    there = (thread < ROWS) & (first + thread < R)
    copy(base + thread * ROW, source, 2 * K, base + ROWS * ROW + 8 * thread, there)
    tile = gl.arange(0, TILES, gl.SliceLayout(1, LAYOUT))
    column = tile[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))[None, :]  # in words: half of the columns
    weights, scales = (), ()
    for chunk in gl.static_range(CHUNKS):
        inside = column < K // 2 - chunk * 64 * TILES
        weights += (gl.load(weight_ptr + column + chunk * 64 * TILES, mask=inside, other=0),)
        scales += (gl.full([TILES, LANES], 0.0, gl.float32, SCALES),)
    of_row = gl.arange(0, LANES, gl.SliceLayout(0, SCALES))[None, :]
    for i in range(gl.minimum(R - first, ROWS)):
        wait(base + ROWS * ROW + 8 * i, 0)
        chunks, sums = (), gl.full([TILES, 64], 0.0, gl.float32, LAYOUT)
        for chunk in gl.static_range(CHUNKS):
            x = rows.index(i * CHUNKS + chunk).load(LAYOUT)
            if K % (128 * TILES) != 0:
                x = gl.where(column < K // 2 - chunk * 64 * TILES, x, 0)
            sums = squares(x, sums)
            chunks += (x,)
        parts.index(i).store(gl.sum(sums, 1))  # then each thread adds up: one barrier, where a sum of warps has three
        rstd = gl.rsqrt(gl.sum(parts.index(i).load(PARTS), 0) / K + eps)
        row = (first + i).to(gl.int64)
        gl.store(rstd_ptr + row, rstd)
        scales_before = scales
        scales = ()
        for chunk in gl.static_range(CHUNKS):
            y, q_at = times(scaled(chunks[chunk], rstd), weights[chunk]), q_ptr + row * (K // 2) + column
            known = tile < K // 128 - chunk * TILES
            scale = store_words(y, q_at + chunk * 64 * TILES, known, amax_floor, POW2)
            scale = gl.convert_layout(scale, gl.SliceLayout(1, SCALES), assert_trivial=True)
            scales += (gl.where(of_row == i, scale[:, None], scales_before[chunk]),)
    rows._keep_alive()  # nothing else may lie where barriers were
    tile = gl.arange(0, TILES, gl.SliceLayout(1, SCALES))[:, None]
    for chunk in gl.static_range(CHUNKS):
        at = scale_inv_ptr + (chunk * TILES + tile).to(gl.int64) * R + first + of_row
        inside = (of_row < gl.minimum(R - first, ROWS)) & (tile < K // 128 - chunk * TILES)
        gl.store(at, scales[chunk], mask=inside)


def rms_norm_quantize(x_RK: Tensor, weight_K: Tensor, eps: float, amax_floor: float, pow2: bool, out: tuple) -> None:
    """Launcher of `dsv3c::rms_norm_quantize`."""
    q, scale_inv, rstd = out
    _forward(x_RK, None, weight_K, None, None, q, scale_inv, rstd, eps, amax_floor, pow2)


def add_rms_norm_quantize(
    x_RK: Tensor, residual_RK: Tensor, weight_K: Tensor, eps: float, amax_floor: float, pow2: bool, normed: bool,
    out: tuple,
) -> None:  # fmt: skip
    """Launcher of `dsv3c::add_rms_norm_quantize`."""
    total, y, *quantized = out
    residual, y = as_words(residual_RK.contiguous()), as_words(y) if normed else None
    _forward(x_RK, residual, weight_K, as_words(total), y, *quantized, eps, amax_floor, pow2)


def _forward(x_RK, residual, weight_K, total, y, q, scale_inv, rstd, eps, amax_floor, pow2) -> None:
    R, K = q.shape
    if q.numel() == 0:
        return
    if K > NARROW and residual is None:
        x = aligned(x_RK).view(torch.int32)
        _wide_norm_kernel[(ceil_div(R, ROWS),)](
            x, as_words(weight_K), q.view(torch.int16), scale_inv, rstd, R, x.stride(0), eps, amax_floor, pow2, K,
            ROWS, TILES,
        )  # fmt: skip
        return
    x = as_words(x_RK)
    (rows, *program), num_warps = _program(K, residual is not None)
    _norm_kernel[(ceil_div(R, rows),)](
        x, residual, as_words(weight_K), total, y, q.view(torch.int16), scale_inv, rstd, R, x.stride(0), eps,
        amax_floor, pow2, residual is not None, K, rows, *program, num_warps=num_warps,
    )  # fmt: skip


def _program(K: int, add: bool) -> tuple[tuple[int, int, int], int]:
    """Rows, tiles of a chunk and lanes of a tile; warps. Narrow rows alone have a warp each."""
    if add:
        return ((1, 16, 16), 4) if K > NARROW else ((1, 8, 16), 2)
    return (4, 4, 8), 4


def variants() -> Iterator[Variant]:
    added = ("residual_ptr", "sum_ptr", "y_ptr")
    plain = {"x_ptr": I32, "weight_ptr": I32, "q_ptr": I16, "scale_inv_ptr": F32, "rstd_ptr": F32}
    plain |= {"eps": "fp32", "amax_floor": "fp32"}
    for K, there in ((1536, ()), (7168, added[:2]), (7168, added)):
        (rows, tiles, lanes), num_warps = _program(K, bool(there))
        yield Variant(
            _norm_kernel,
            plain | dict.fromkeys(there, I32),
            {"POW2": False, "ADD": bool(there), "K": K, "ROWS": rows, "TILES": tiles, "LANES": lanes}
            | dict.fromkeys(added[len(there) :]),
            num_warps=num_warps,
        )
    yield Variant(_wide_norm_kernel, plain, {"POW2": False, "K": 7168, "ROWS": ROWS, "TILES": TILES})
