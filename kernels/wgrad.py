"""Weight gradients, dw = dyᵀ x, of one weight or of each group's: the contraction runs over rows (tokens).

Both operands come transposed and in 1×128 tiles along the rows (`quantize_tile_t`), each group's rows from a multiple
of 128 on, with zeros between. So both have a scale per row and block of 128 of the contraction, and none per tile of
the output: promotion costs a multiplication more than in `gemm.py`, and registers for the scales. What is aligned is
`wgrad_specialized.py`'s, but for float32 results of few rows.

With all experts of V3 on one GPU most groups have one or two blocks of 128 rows, and the traffic is the result, written
once. A program then would mostly wait: for where its group begins, for its operands, for its scales. So it computes
`chunk` tiles beside each other in one loop, in which loads run ahead over the end of a tile, those of scales too; and
dy's tile, if it is the group's only block, is loaded once for all of them. Without that, as many bytes would come from
the L2 cache as go to memory.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels import wgrad_specialized
from dsv3c.kernels.gemm import (
    Config,
    aligned,
    cublaslt,
    cublaslt_takes,
    described,
    descriptor,
    promote,
    swizzle,
    tile_constants,
    valid,
)
from dsv3c.kernels.groups import tile_map
from dsv3c.kernels.implementations import Choice, Implementation, Problem, choose, implementations, start
from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import BF16, F32, I32, Variant
from dsv3c.kernels.quantize import column_major
from dsv3c.numerics import TILE, ceil_div

SPACE = {
    "rows": (64, 128),
    "columns": (64, 128),
    "halves": (1, 2),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
    "band": (4, 8, 16),
    "chunk": (1, 4, 16),
}
# Without a table. On an H200 the first is best from about 256 rows a group on, the second below.
KNOWN = tuple(
    {"rows": 64, "columns": 128, "halves": halves, "num_warps": 4, "num_stages": 3, "band": 8, "chunk": chunk}
    for halves, chunk in ((2, 1), (1, 16))
)


@triton.jit
def _scales(scale_inv_ptr, rows, size):
    return tl.load(scale_inv_ptr + rows, mask=rows < size, other=0.0)


@triton.jit
def _finish(
    dw_ptr, acc0, acc1, row, column, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Stores both halves, added to what is there if ACCUMULATE."""
    rows = row + tl.arange(0, ROWS)[:, None]
    columns = column + tl.arange(0, COLUMNS)[None, :]
    there = dw_ptr + rows.to(tl.int64) * K + columns
    inside = (rows < N) & (columns < K)
    if ACCUMULATE:
        acc0 += tl.load(there, mask=inside, other=0.0)
    tl.store(there, acc0.to(dw_ptr.dtype.element_ty), mask=inside)
    if HALVES == 2:
        there += tl.cast(K, tl.int64) * ROWS
        inside = (rows + ROWS < N) & (columns < K)
        if ACCUMULATE:
            acc1 += tl.load(there, mask=inside, other=0.0)
        tl.store(there, acc1.to(dw_ptr.dtype.element_ty), mask=inside)


@launched
@triton.jit
def _wgrad_kernel(
    dyt_desc, xt_desc, dw_ptr, dyt_scale_inv_ptr, xt_scale_inv_ptr, first_ptr, N, K, dyt_step, xt_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr, BAND: tl.constexpr,
    CHUNK: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    num_n = tl.cdiv(K, COLUMNS)
    m, chunk = swizzle(tl.program_id(0), tl.cdiv(N, HALVES * ROWS), tl.cdiv(num_n, CHUNK), BAND)
    row, first_n = m * HALVES * ROWS, chunk * CHUNK
    last_n = tl.minimum(first_n + CHUNK, num_n)
    first = tl.load(first_ptr + e)
    blocks = tl.load(first_ptr + e + 1) - first
    dw_ptr += e.to(tl.int64) * N * K
    dyt_scale_inv_ptr += first * dyt_step
    xt_scale_inv_ptr += first * xt_step
    rows0 = row + tl.arange(0, ROWS)
    rows1 = rows0 + ROWS
    columns = tl.arange(0, COLUMNS)
    zero = tl.zeros((ROWS, COLUMNS), tl.float32)
    if CHUNK == 1:
        acc0 = zero
        acc1 = zero
        for block in range(blocks):
            xt = xt_desc.load([first_n * COLUMNS, (first + block) * 128])
            dyt0 = dyt_desc.load([row, (first + block) * 128])
            if HALVES == 2:
                dyt1 = dyt_desc.load([row + ROWS, (first + block) * 128])
            scale0 = _scales(dyt_scale_inv_ptr + block * dyt_step, rows0, N)
            if HALVES == 2:
                scale1 = _scales(dyt_scale_inv_ptr + block * dyt_step, rows1, N)
            xt_scale = _scales(xt_scale_inv_ptr + block * xt_step, first_n * COLUMNS + columns, K)[None, :]
            acc0 = promote(tl.dot(dyt0, xt.T), scale0[:, None] * xt_scale, acc0)
            if HALVES == 2:
                acc1 = promote(tl.dot(dyt1, xt.T), scale1[:, None] * xt_scale, acc1)
        _finish(dw_ptr, acc0, acc1, row, first_n * COLUMNS, N, K, ROWS, COLUMNS, HALVES, ACCUMULATE)
    elif blocks == 0:
        for n in range(first_n, last_n):
            _finish(dw_ptr, zero, zero, row, n * COLUMNS, N, K, ROWS, COLUMNS, HALVES, ACCUMULATE)
    elif blocks == 1:
        dyt0 = dyt_desc.load([row, first * 128])
        scale0 = _scales(dyt_scale_inv_ptr, rows0, N)[:, None]
        if HALVES == 2:
            dyt1 = dyt_desc.load([row + ROWS, first * 128])
            scale1 = _scales(dyt_scale_inv_ptr, rows1, N)[:, None]
        following = _scales(xt_scale_inv_ptr, first_n * COLUMNS + columns, K)
        acc1 = zero
        for n in range(first_n, last_n):
            xt = xt_desc.load([n * COLUMNS, first * 128])
            xt_scale = following[None, :]
            following = _scales(xt_scale_inv_ptr, (n + 1) * COLUMNS + columns, K)
            acc0 = promote(tl.dot(dyt0, xt.T), scale0 * xt_scale, zero)
            if HALVES == 2:
                acc1 = promote(tl.dot(dyt1, xt.T), scale1 * xt_scale, zero)
            _finish(dw_ptr, acc0, acc1, row, n * COLUMNS, N, K, ROWS, COLUMNS, HALVES, ACCUMULATE)
    else:
        acc0 = zero
        acc1 = zero
        following0 = _scales(dyt_scale_inv_ptr, rows0, N)
        following1 = following0
        if HALVES == 2:
            following1 = _scales(dyt_scale_inv_ptr, rows1, N)
        following = _scales(xt_scale_inv_ptr, first_n * COLUMNS + columns, K)
        for step in range((last_n - first_n) * blocks):
            n, block = first_n + step // blocks, step % blocks
            xt = xt_desc.load([n * COLUMNS, (first + block) * 128])
            dyt0 = dyt_desc.load([row, (first + block) * 128])
            if HALVES == 2:
                dyt1 = dyt_desc.load([row + ROWS, (first + block) * 128])
            scale0, scale1, xt_scale = following0[:, None], following1[:, None], following[None, :]
            then_n, then = first_n + (step + 1) // blocks, (step + 1) % blocks
            following0 = _scales(dyt_scale_inv_ptr + then * dyt_step, rows0, N)
            if HALVES == 2:
                following1 = _scales(dyt_scale_inv_ptr + then * dyt_step, rows1, N)
            following = _scales(xt_scale_inv_ptr + then * xt_step, then_n * COLUMNS + columns, K)
            acc0 = promote(tl.dot(dyt0, xt.T), scale0 * xt_scale, acc0)
            if HALVES == 2:
                acc1 = promote(tl.dot(dyt1, xt.T), scale1 * xt_scale, acc1)
            if block == blocks - 1:
                _finish(dw_ptr, acc0, acc1, row, n * COLUMNS, N, K, ROWS, COLUMNS, HALVES, ACCUMULATE)
                acc0 = tl.zeros((ROWS, COLUMNS), tl.float32)
                acc1 = tl.zeros((ROWS, COLUMNS), tl.float32)


def gemm_wgrad(
    dyt_fp8: Tensor, dyt_scale_inv: Tensor, xt_fp8: Tensor, xt_scale_inv: Tensor, dtype: torch.dtype, out: Tensor
) -> None:
    """Launcher of `dsv3c::gemm_wgrad`."""
    _plain((dyt_fp8, dyt_scale_inv, xt_fp8, xt_scale_inv), out, accumulate=False)


def gemm_wgrad_accumulate(
    dyt_fp8: Tensor, dyt_scale_inv: Tensor, xt_fp8: Tensor, xt_scale_inv: Tensor, dw: Tensor
) -> None:
    """Launcher of `dsv3c::gemm_wgrad_accumulate`."""
    _plain((dyt_fp8, dyt_scale_inv, xt_fp8, xt_scale_inv), dw, accumulate=True)


def grouped_gemm_wgrad(
    dyt_fp8: Tensor,
    dyt_scale_inv: Tensor,
    xt_fp8: Tensor,
    xt_scale_inv: Tensor,
    offs: Tensor,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """Launcher of `dsv3c::grouped_gemm_wgrad`."""
    _grouped((dyt_fp8, dyt_scale_inv, xt_fp8, xt_scale_inv, offs), out, accumulate=False)


def grouped_gemm_wgrad_accumulate(
    dyt_fp8: Tensor, dyt_scale_inv: Tensor, xt_fp8: Tensor, xt_scale_inv: Tensor, offs: Tensor, dw: Tensor
) -> None:
    """Launcher of `dsv3c::grouped_gemm_wgrad_accumulate`."""
    _grouped((dyt_fp8, dyt_scale_inv, xt_fp8, xt_scale_inv, offs), dw, accumulate=True)


def _plain(operands: tuple[Tensor, ...], dw: Tensor, accumulate: bool) -> None:
    (N, K), P = dw.shape, operands[0].shape[1]
    _launch(Problem("gemm_wgrad", P, N, K), operands, dw, accumulate)


def _grouped(operands: tuple[Tensor, ...], dw: Tensor, accumulate: bool) -> None:
    (E, N, K), P = dw.shape, operands[0].shape[1]
    _launch(Problem("grouped_gemm_wgrad", P - TILE * E, N, K, E), operands, dw, accumulate)  # rows: see `padded_rows`


def _launch(problem: Problem, operands: tuple[Tensor, ...], dw: Tensor, accumulate: bool) -> None:
    if operands[0].shape[1] == 0 or dw.numel() == 0:
        if not accumulate:
            dw.zero_()
        return
    options, whole = {"accumulate": True} if accumulate else {}, dw.data_ptr() % 16 == 0
    start(
        problem,
        lambda chosen, config: chosen.launch(*operands, dw, **options, **config),
        dw,
        partial(_choose, accumulate=accumulate, size=dw.element_size(), whole=whole),
        accumulate,
        whole,
    )


def _choose(problem: Problem, accumulate: bool, size: int, whole: bool) -> Choice:
    """`size`: bytes of a number of the result; `whole`: whether it begins at 16 bytes, as the copy engine wants."""
    implementation, config = choose(problem)
    if accumulate and not implementation.space:  # a library would need another pass over the gradient
        name, config = _own(problem)
        implementation = implementations(problem.operator)[name]
    if implementation.name == "warp_specialized" and (not whole or size > (2 if _few(problem) else 4)):
        # Of few rows the result is the traffic: in float32 the plain kernel writes 3.6 TB/s, the specialised one 3.5,
        # and 3.3 and 3.4 if groups are as a router makes them.
        implementation, config = implementations(problem.operator)["triton"], KNOWN[_few(problem)]
    return implementation, config


def _few(problem: Problem) -> bool:
    return problem.rows < 256 * problem.groups


def _own(problem: Problem) -> tuple[str, dict[str, Any]]:
    if wgrad_specialized.takes(problem):
        return "warp_specialized", wgrad_specialized.KNOWN[_few(problem)]
    return "triton", KNOWN[_few(problem)]


def default(problem: Problem) -> tuple[str, dict[str, Any]]:
    if problem.operator == "gemm_wgrad" and wgrad_cublaslt_takes(problem):
        return "cublaslt", {}
    return _own(problem)


def launch_plain(dyt_fp8: Tensor, *operands: Tensor, launch, **knobs: int) -> None:
    """The other implementations' `launch` on a single group."""
    blocks = dyt_fp8.shape[1] // TILE
    first = torch.arange(0, blocks + 1, blocks, dtype=torch.int32, device=dyt_fp8.device)
    *scales_and_xt, out = operands
    launch(dyt_fp8, *scales_and_xt, first, out[None], **knobs)


def launch_grouped(dyt_fp8: Tensor, *operands: Tensor, launch, **knobs: int) -> None:
    """The other implementations' `launch` on the groups that end at `offs`."""
    *scales_and_xt, offs, out = operands
    _, first = tile_map(offs, dyt_fp8.shape[1], TILE)
    launch(dyt_fp8, *scales_and_xt, first, out, **knobs)


def launch(
    dyt_fp8: Tensor,
    dyt_scale_inv: Tensor,
    xt_fp8: Tensor,
    xt_scale_inv: Tensor,
    first: Tensor,
    out: Tensor,
    *,
    chunk: int,
    accumulate: bool = False,
    **knobs: int,
) -> None:
    """Group e's blocks of 128 rows are first[e] to first[e + 1]."""
    config, (E, N, K) = Config(**knobs), out.shape
    dyt_scale_inv, xt_scale_inv = column_major(dyt_scale_inv), column_major(xt_scale_inv)
    grid = (ceil_div(N, config.block_m) * ceil_div(ceil_div(K, config.columns), chunk), E)
    _wgrad_kernel[grid](
        descriptor(aligned(dyt_fp8), config.rows), descriptor(aligned(xt_fp8), config.columns), out,
        dyt_scale_inv, xt_scale_inv, first, N, K, dyt_scale_inv.stride(1), xt_scale_inv.stride(1),
        config.rows, config.columns, config.halves, config.band, chunk, accumulate,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def wgrad_cublaslt_takes(problem: Problem) -> bool:
    """`cublaslt_takes` of the product dyᵀ x, whose rows are dy's columns."""
    return cublaslt_takes(Problem("gemm", problem.N, problem.K, problem.rows))


def variant(config: dict[str, Any], dw: str = F32, accumulate: bool = False) -> Variant:
    knobs = dict(config)
    chunk, c = knobs.pop("chunk"), Config(**knobs)
    operands = {"dyt_scale_inv_ptr": F32, "xt_scale_inv_ptr": F32, "first_ptr": I32, "dw_ptr": dw}
    operands |= described("dyt_desc", "xt_desc", c)
    constants = tile_constants(c) | {"CHUNK": chunk, "ACCUMULATE": accumulate}
    return Variant(_wgrad_kernel, operands, constants, c.num_warps, c.num_stages)


def _implementations(plain_or_grouped: Callable[..., None], dw: str) -> tuple[Implementation, ...]:
    """`dw`: of the types of result, the one that the tuner measures (tuning/workloads.py)."""
    return (
        Implementation(
            "triton", SPACE, partial(plain_or_grouped, launch=launch), valid=valid, variant=partial(variant, dw=dw),
            known=KNOWN,
        ),
        Implementation(
            "warp_specialized", wgrad_specialized.SPACE, partial(plain_or_grouped, launch=wgrad_specialized.launch),
            wgrad_specialized.takes, variant=partial(wgrad_specialized.variant, dw=dw), known=wgrad_specialized.KNOWN,
        ),
    )  # fmt: skip


IMPLEMENTATIONS = {
    "gemm_wgrad": (
        *_implementations(launch_plain, F32),
        Implementation("cublaslt", {}, partial(cublaslt, w_tiled=True), takes=wgrad_cublaslt_takes),
    ),
    "grouped_gemm_wgrad": _implementations(launch_grouped, BF16),
}


def variants() -> Iterator[Variant]:
    for config in KNOWN:
        yield variant(config, BF16)
        yield variant(config)
        yield variant(config, accumulate=True)
