"""RMSNorm and the cast behind it, memory-bound: 3 bytes a value, 7 with the residual addition in front, 9 with
the BF16 result beside. A program has one row, or a warp one if rows are narrow and alone; it stays in registers between
its sum of squares and its result.

Backward needs a sum over rows for the weight's gradient: as many programs as the GPU runs at a time add up theirs, and
a second launch adds up the programs'. No atomics: the order is always the same.

Forward is in Gluon, which stores a tile's scale from where it is; plain Triton moves the scales of each chunk through
shared memory first, with two barriers. A chunk's weight is loaded a chunk ahead, the first one before the sum: until
a multiprocessor's cache has it, rows wait for it one chunk after the other.

H200, rows of 7168, in the time of a copy of as many bytes: alone 0.85 (4096 rows) and 0.94 (16384), with the addition
0.89 and 0.95, and 0.93 and 0.94 with the BF16 result; backward, which writes a quarter of them, 1.02 and 1.16. Slower:
rows fetched into L2 ahead (0.70 to 0.83), the weight into L1 (0.73), programs that take several rows, the next in
registers (0.79) or in shared memory (0.55 to 0.70). Without the arithmetic, 4096 rows would take 0.94.

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
from triton.language.extra.cuda import gdc_wait

from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import BF16, F32, I16, I32, Variant
from dsv3c.kernels.tiles import as_words, high, low, pack, plus, store_tiles, times
from dsv3c.numerics import TILE, ceil_div

WARPS = 2048  # of all programs of the backward kernel: about 16 for each multiprocessor of an H200


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
@triton.jit(do_not_specialize=["R"])
def _norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dsum_ptr, dx_ptr, partial_ptr, R, K, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < K
    dweight = tl.zeros((BLOCK,), tl.float32)
    stride = K.to(tl.int64)
    for row in range(program, R, tl.num_programs(0)):
        at = row * stride + column
        rstd = tl.load(rstd_ptr + row)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dweight += dy * x
        dy *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        dx = rstd * (dy - x * (tl.sum(dy * x) / K))
        if ADD:
            dx += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(tl.bfloat16), mask=inside)
    tl.store(partial_ptr + program.to(tl.int64) * K + column, dweight, mask=inside)


@launched
@triton.jit(do_not_specialize=["P"])
def _sum_programs_kernel(partial_ptr, out_ptr, P, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    gdc_wait()
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, P, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row[:, None] < P) & (column[None, :] < K)
        total += tl.load(partial_ptr + row[:, None] * K + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=column < K)


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
    x = as_words(x_RK)
    (rows, *program), options = _program(K, residual is not None)
    _norm_kernel[(ceil_div(R, rows),)](
        x, residual, as_words(weight_K), total, y, q.view(torch.int16), scale_inv, rstd, R, x.stride(0), eps,
        amax_floor, pow2, residual is not None, K, rows, *program, **options,
    )  # fmt: skip


def _program(K: int, add: bool) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Rows, tiles of a chunk and lanes of a tile; warps and registers. At 7168 columns alone, seven programs a
    multiprocessor; narrow rows have a warp each."""
    if K > 2048:
        return (1, 16 if add else 8, 16), {"num_warps": 4} | ({"maxnreg": 72} if K <= 7168 and not add else {})
    return ((1, 8, 16), {"num_warps": 2}) if add else ((4, 4, 8), {"num_warps": 4})


def rms_norm_backward(
    dy_RK: Tensor, x_RK: Tensor, weight_K: Tensor, rstd_R: Tensor, dsum_RK: Tensor | None, out: tuple[Tensor, Tensor]
) -> None:
    """Launcher of `dsv3c::rms_norm_backward`."""
    dx_RK, dweight_K = out
    R, K = dx_RK.shape
    block = triton.next_power_of_2(K)
    warps = _warps(block // TILE)
    programs = min(R, WARPS // warps)
    if dx_RK.numel() == 0:
        dweight_K.zero_()
        return
    partial = x_RK.new_empty((programs, K), dtype=torch.float32)
    dsum_RK = None if dsum_RK is None else dsum_RK.contiguous()
    _norm_backward_kernel[(programs,)](
        dy_RK.contiguous(), x_RK.contiguous(), weight_K.contiguous(), rstd_R, dsum_RK, dx_RK, partial, R, K,
        dsum_RK is not None, block, num_warps=warps,
    )  # fmt: skip
    sum_programs(partial, dweight_K)


def sum_programs(partial_PK: Tensor, out_K: Tensor, launch_pdl: bool = False) -> None:
    """launch_pdl: the kernel before calls `gdc_launch_dependents`."""
    P, K = partial_PK.shape
    _sum_programs_kernel[(ceil_div(K, 8),)](partial_PK, out_K, P, K, 512, 8, num_warps=8, launch_pdl=launch_pdl)


def _warps(tiles: int) -> int:
    """32 values a thread."""
    return max(1, tiles // 8)


def variants() -> Iterator[Variant]:
    added = ("residual_ptr", "sum_ptr", "y_ptr")
    for K, there in ((7168, ()), (1536, ()), (7168, added[:2]), (7168, added)):
        (rows, tiles, lanes), options = _program(K, bool(there))
        yield Variant(
            _norm_kernel,
            {"x_ptr": I32, "weight_ptr": I32, "q_ptr": I16, "scale_inv_ptr": F32, "rstd_ptr": F32}
            | {"eps": "fp32", "amax_floor": "fp32"}
            | dict.fromkeys(there, I32),
            {"POW2": False, "ADD": bool(there), "K": K, "ROWS": rows, "TILES": tiles, "LANES": lanes}
            | dict.fromkeys(added[len(there) :]),
            **options,
        )
    for add in (False, True):
        yield Variant(
            _norm_backward_kernel,
            {"dy_ptr": BF16, "x_ptr": BF16, "weight_ptr": BF16, "rstd_ptr": F32, "dx_ptr": BF16, "partial_ptr": F32}
            | ({"dsum_ptr": BF16} if add else {}),
            {"ADD": add, "BLOCK": 8192} | ({} if add else {"dsum_ptr": None}),
            num_warps=8,
        )
    yield Variant(_sum_programs_kernel, {"partial_ptr": F32, "out_ptr": F32}, {"ROWS": 512, "COLUMNS": 8}, num_warps=8)
