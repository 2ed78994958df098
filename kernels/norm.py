"""RMSNorm and the cast behind it, memory-bound: 3 bytes a value, 9 with the residual addition in front and the BF16
result beside. A program has one row; its two sums stay on the multiprocessor.

Backward needs a sum over rows for the weight's gradient: PROGRAMS programs add up theirs, each every PROGRAMS-th row,
and a second launch adds up the programs'. No atomics: the order is always the same.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels.offline import BF16, F32, FP8, Variant
from dsv3c.kernels.tiles import rounded, store_tiles
from dsv3c.numerics import TILE, ceil_div

PROGRAMS = 264  # of the backward kernel: two for each multiprocessor of an H200


@triton.jit
def normalized(x, K, eps):
    """x, a row of K values in float32 (and zeros), over its root mean square, rounded to BF16; and 1/that."""
    rstd = tl.rsqrt(tl.sum(x * x) / K + eps)
    return rounded(x * rstd), rstd


@triton.jit(do_not_specialize=["R"])
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, q_ptr, scale_inv_ptr, rstd_ptr, R, K, x_stride, eps, amax_floor,
    POW2: tl.constexpr, ADD: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    column = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < K
    at = row * K + column
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x = rounded(x + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32))
        tl.store(sum_ptr + at, x.to(tl.bfloat16), mask=inside)
    x, rstd = normalized(x, K, eps)
    y = rounded(x * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32))
    if ADD:
        tl.store(y_ptr + at, y.to(tl.bfloat16), mask=inside)
    store_tiles(y, q_ptr + at, scale_inv_ptr + tile.to(tl.int64) * R + row, tile * 128 < K, amax_floor, POW2)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["R"])
def _norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dsum_ptr, dx_ptr, partial_ptr, R, K, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < K
    dweight = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, R, tl.num_programs(0)):
        at = row.to(tl.int64) * K + column
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


@triton.jit(do_not_specialize=["P"])
def _sum_programs_kernel(partial_ptr, out_ptr, P, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
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
    x_RK: Tensor, residual_RK: Tensor, weight_K: Tensor, eps: float, amax_floor: float, pow2: bool, out: tuple
) -> None:
    """Launcher of `dsv3c::add_rms_norm_quantize`."""
    _forward(x_RK, residual_RK.contiguous(), weight_K, *out, eps, amax_floor, pow2)


def _forward(x_RK, residual_RK, weight_K, total, y, q, scale_inv, rstd, eps, amax_floor, pow2) -> None:
    R, K = q.shape
    if q.numel() == 0:
        return
    x_RK = x_RK if x_RK.stride(1) == 1 else x_RK.contiguous()
    tiles = triton.next_power_of_2(K // TILE)
    _norm_kernel[(R,)](
        x_RK, residual_RK, weight_K.contiguous(), total, y, q, scale_inv, rstd, R, K, x_RK.stride(0), eps, amax_floor,
        pow2, residual_RK is not None, tiles, num_warps=_warps(tiles),
    )  # fmt: skip


def rms_norm_backward(
    dy_RK: Tensor, x_RK: Tensor, weight_K: Tensor, rstd_R: Tensor, dsum_RK: Tensor | None, out: tuple[Tensor, Tensor]
) -> None:
    """Launcher of `dsv3c::rms_norm_backward`."""
    dx_RK, dweight_K = out
    R, K = dx_RK.shape
    programs = min(R, PROGRAMS)
    if dx_RK.numel() == 0:
        dweight_K.zero_()
        return
    partial = x_RK.new_empty((programs, K), dtype=torch.float32)
    dsum_RK = None if dsum_RK is None else dsum_RK.contiguous()
    block = triton.next_power_of_2(K)
    _norm_backward_kernel[(programs,)](
        dy_RK.contiguous(), x_RK.contiguous(), weight_K.contiguous(), rstd_R, dsum_RK, dx_RK, partial, R, K,
        dsum_RK is not None, block, num_warps=_warps(block // TILE),
    )  # fmt: skip
    sum_programs(partial, dweight_K)


def sum_programs(partial_PK: Tensor, out_K: Tensor) -> None:
    P, K = partial_PK.shape
    _sum_programs_kernel[(ceil_div(K, 32),)](partial_PK, out_K, P, K, 32, 32)


def _warps(tiles: int) -> int:
    """32 values a thread."""
    return max(1, tiles // 8)


def variants() -> Iterator[Variant]:
    for add in (False, True):
        also = ("residual_ptr", "sum_ptr", "y_ptr")
        yield Variant(
            _norm_kernel,
            {"x_ptr": BF16, "weight_ptr": BF16, "q_ptr": FP8, "scale_inv_ptr": F32, "rstd_ptr": F32}
            | {"eps": "fp32", "amax_floor": "fp32"}
            | (dict.fromkeys(also, BF16) if add else {}),
            {"POW2": False, "ADD": add, "TILES": 64} | ({} if add else dict.fromkeys(also)),
            num_warps=8,
        )
        yield Variant(
            _norm_backward_kernel,
            {"dy_ptr": BF16, "x_ptr": BF16, "weight_ptr": BF16, "rstd_ptr": F32, "dx_ptr": BF16, "partial_ptr": F32}
            | ({"dsum_ptr": BF16} if add else {}),
            {"ADD": add, "BLOCK": 8192} | ({} if add else {"dsum_ptr": None}),
            num_warps=8,
        )
    yield Variant(_sum_programs_kernel, {"partial_ptr": F32, "out_ptr": F32}, {"ROWS": 32, "COLUMNS": 32})
