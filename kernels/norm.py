"""RMSNorm and the cast behind it, memory-bound: 3 bytes a value, 7 with the residual addition in front, 9 with
the BF16 result beside. A program has one row, which stays in registers between its sum of squares and its result.

In Gluon, which stores a tile's scale from where it is; plain Triton moves the scales of each chunk through shared
memory first, with two barriers. The copy engine brings the row, so that what is on its way needs no registers, and the
weight is loaded meanwhile.

H200, in the time of a copy of as many bytes, 4096 rows: of 7168 columns alone 0.87 (16384 rows 0.93), with the addition
0.93 (0.96), and 0.94 (0.935) with the BF16 result; of 1536 0.89 and 0.92; of 512 alone 0.79. 64 rows of 7168 with the
addition take 5.9 us, of 1536 4.6.

Rows loaded by the programs: 0.84 alone, 0.88 and 0.93 with the addition, at 1536 0.83 and 0.90, 64 rows 7.6 and 5.4 us.
Two rows a program, both on their way from the start: 0.86 (16384 rows 0.96) and 0.92, at 1536 0.90 and 0.95, at 512
0.84, but 64 rows 6.7 and 5.2 us. Alone, four rows 0.86, eight 0.85, three at once 0.86; 8 warps 0.80; results by the
copy engine as well 0.87. A copy reads half of its bytes, the norm two thirds, and what is written waits in the L2
cache: without the arithmetic 4096 rows alone would take 0.94.
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
from dsv3c.kernels.tiles import as_words, high, low, pack, plus, store_tiles, times

_wait_for_all = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6


@triton.jit
def squares(words, sums):
    """The squares of both numbers of each word, added to `sums`."""
    return tl.fma(high(words), high(words), tl.fma(low(words), low(words), sums))


@triton.jit
def scaled(words, factor):
    return pack(low(words) * factor, high(words) * factor)


@launched
@gluon.jit(do_not_specialize=["R", "x_stride"])
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, q_ptr, scale_inv_ptr, rstd_ptr, R, x_stride, eps, amax_floor,
    POW2: gl.constexpr, K: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """A row a program, in chunks of TILES tiles; 16 lanes have a tile."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [gl.num_warps(), 1], [1, 0])
    PARTS: gl.constexpr = gl.BlockedLayout([TILES], [32], [gl.num_warps()], [0])
    CHUNKS: gl.constexpr = (K + 128 * TILES - 1) // (128 * TILES)
    TERMS: gl.constexpr = 1 if residual_ptr is None else 2
    ROW: gl.constexpr = CHUNKS * TILES * 256  # bytes of a term in shared memory
    rows = gl.allocate_shared_memory(
        gl.int32, [TERMS * CHUNKS + 1, TILES, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    parts = gl.allocate_shared_memory(gl.float32, [TILES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    base = start_of_shared()
    full = base + TERMS * ROW  # a barrier
    row = gl.program_id(0).to(gl.int64)
    set_up(full)
    expect(full, 2 * K * TERMS)
    thread = gl.arange(0, 32 * gl.num_warps(), gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    copy(base, x_ptr + row * x_stride, 2 * K, full, thread == 0)
    if residual_ptr is not None:
        copy(base + ROW, residual_ptr + row * (K // 2), 2 * K, full, thread == 0)
    _wait_for_all()  # the barrier is there for all
    tile = gl.arange(0, TILES, gl.SliceLayout(1, LAYOUT))
    column = tile[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))[None, :]  # in words: half of the columns
    weights = ()
    for chunk in gl.static_range(CHUNKS):
        inside = column < K // 2 - chunk * 64 * TILES
        weights += (gl.load(weight_ptr + column + chunk * 64 * TILES, mask=inside, other=0),)
    at = row * (K // 2) + column
    wait(full, 0)
    chunks, sums = (), gl.full([TILES, 64], 0.0, gl.float32, LAYOUT)
    for chunk in gl.static_range(CHUNKS):
        inside = column < K // 2 - chunk * 64 * TILES
        x = rows.index(chunk).load(LAYOUT)
        if residual_ptr is not None:
            x = plus(x, rows.index(CHUNKS + chunk).load(LAYOUT))
            gl.store(sum_ptr + at + chunk * 64 * TILES, x, mask=inside)
        if K % (128 * TILES) != 0:
            x = gl.where(inside, x, 0)
        sums = squares(x, sums)
        chunks += (x,)
    parts.store(gl.sum(sums, 1))  # then each thread adds up: one barrier, where a sum of warps has three
    rstd = gl.rsqrt(gl.sum(parts.load(PARTS), 0) / K + eps)
    gl.store(rstd_ptr + row, rstd)
    for chunk in gl.static_range(CHUNKS):
        y = times(scaled(chunks[chunk], rstd), weights[chunk])
        if y_ptr is not None:
            gl.store(y_ptr + at + chunk * 64 * TILES, y, mask=column < K // 2 - chunk * 64 * TILES)
        known = tile < K // 128 - chunk * TILES
        scale_at = scale_inv_ptr + (chunk * TILES + tile).to(gl.int64) * R + row
        store_tiles(y, q_ptr + at + chunk * 64 * TILES, scale_at, known, amax_floor, POW2)
    rows._keep_alive()  # nothing else may lie where the barrier was


def rms_norm_quantize(x_RK: Tensor, weight_K: Tensor, eps: float, amax_floor: float, pow2: bool, out: tuple) -> None:
    """Launcher of `dsv3c::rms_norm_quantize`."""
    _norm(x_RK, None, weight_K, None, None, *out, eps, amax_floor, pow2)


def add_rms_norm_quantize(
    x_RK: Tensor, residual_RK: Tensor, weight_K: Tensor, eps: float, amax_floor: float, pow2: bool, normed: bool,
    out: tuple,
) -> None:  # fmt: skip
    """Launcher of `dsv3c::add_rms_norm_quantize`."""
    total, y, *quantized = out
    residual = aligned(residual_RK.contiguous()).view(torch.int32)
    _norm(x_RK, residual, weight_K, as_words(total), as_words(y) if normed else None, *quantized, eps, amax_floor, pow2)


def _norm(x_RK, residual, weight_K, total, y, q, scale_inv, rstd, eps, amax_floor, pow2) -> None:
    R, K = q.shape
    if q.numel() == 0:
        return
    x, (tiles, num_warps) = aligned(x_RK).view(torch.int32), _program(K)
    _norm_kernel[(R,)](
        x, residual, as_words(weight_K), total, y, q.view(torch.int16), scale_inv, rstd, R, x.stride(0), eps,
        amax_floor, pow2, K, tiles, num_warps=num_warps,
    )  # fmt: skip


def _program(K: int) -> tuple[int, int]:
    """Tiles of a chunk, warps."""
    return (8, 4) if K > 2048 else (4, 2)


def variants() -> Iterator[Variant]:
    plain = {"x_ptr": I32, "weight_ptr": I32, "q_ptr": I16, "scale_inv_ptr": F32, "rstd_ptr": F32}
    plain |= {"eps": "fp32", "amax_floor": "fp32"}
    added = ("residual_ptr", "sum_ptr", "y_ptr")
    for K, there in ((7168, added), (7168, added[:2]), (1536, added[:2]), (7168, ()), (1536, ())):
        tiles, num_warps = _program(K)
        constants = {"POW2": False, "K": K, "TILES": tiles} | dict.fromkeys(added[len(there) :])
        yield Variant(_norm_kernel, plain | dict.fromkeys(there, I32), constants, num_warps=num_warps)
