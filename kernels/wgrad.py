"""Weight gradients, dw = dyᵀ x, of one weight or of each group's: the contraction runs over rows (tokens).

Both operands come transposed and in 1×128 tiles along the rows (`quantize_tile_t`), each group's rows from a multiple
of 128 on, with zeros between. So both have a scale per row and block of 128 of the contraction, and none per tile of
the output:
promotion costs a multiplication more than in `gemm.py`, and registers for the scales.

With all experts of V3 on one GPU most groups have one or two blocks of 128 rows, and the traffic is the result. A
program then would mostly wait: for where its group begins, for its operands, for its stores. So it computes `chunk`
tiles beside each other in one loop over tiles and blocks, in which the loads run ahead over the end of a tile.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels.gemm import (
    Config,
    aligned,
    cublaslt,
    cublaslt_takes,
    described,
    descriptor,
    promote,
    store_tile,
    swizzle,
    tile_constants,
    valid,
)
from dsv3c.kernels.groups import tile_map
from dsv3c.kernels.implementations import Implementation, Problem, choose
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
    {"rows": 64, "columns": columns, "halves": 2, "num_warps": 4, "num_stages": 3, "band": 8, "chunk": chunk}
    for columns, chunk in ((128, 1), (64, 16))
)


@triton.jit
def _wgrad_kernel(
    dyt_desc, xt_desc, dw_ptr, dyt_scale_inv_ptr, xt_scale_inv_ptr, first_ptr, N, K, dyt_step, xt_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr, BAND: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    num_n = tl.cdiv(K, COLUMNS)
    m, chunk = swizzle(tl.program_id(0), tl.cdiv(N, HALVES * ROWS), tl.cdiv(num_n, CHUNK), BAND)
    row, first_n = m * HALVES * ROWS, chunk * CHUNK
    tiles = tl.minimum(num_n - first_n, CHUNK)
    first_block = tl.load(first_ptr + e)
    blocks = tl.load(first_ptr + e + 1) - first_block
    dw_ptr += e.to(tl.int64) * N * K
    rows = row + tl.arange(0, ROWS)
    acc0 = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc1 = acc0
    if CHUNK > 1 and blocks == 0:
        for n in range(first_n, first_n + tiles):
            store_tile(dw_ptr, acc0, acc1, row, N, n * COLUMNS, K, ROWS, COLUMNS, HALVES)
    for step in range(tiles * blocks):
        if CHUNK > 1:
            n, block = first_n + step // blocks, first_block + step % blocks
        else:
            n, block = first_n, first_block + step
        xt = xt_desc.load([n * COLUMNS, block * 128])
        dyt0 = dyt_desc.load([row, block * 128])
        if HALVES == 2:
            dyt1 = dyt_desc.load([row + ROWS, block * 128])
        scales = dyt_scale_inv_ptr + block * dyt_step + rows
        scale0 = tl.load(scales, mask=rows < N, other=0.0)[:, None]
        if HALVES == 2:
            scale1 = tl.load(scales + ROWS, mask=rows + ROWS < N, other=0.0)[:, None]
        columns = n * COLUMNS + tl.arange(0, COLUMNS)
        xt_scale_inv = tl.load(xt_scale_inv_ptr + block * xt_step + columns, mask=columns < K, other=0.0)[None, :]
        acc0 = promote(tl.dot(dyt0, xt.T), scale0 * xt_scale_inv, acc0)
        if HALVES == 2:
            acc1 = promote(tl.dot(dyt1, xt.T), scale1 * xt_scale_inv, acc1)
        if CHUNK > 1 and step % blocks == blocks - 1:
            store_tile(dw_ptr, acc0, acc1, row, N, n * COLUMNS, K, ROWS, COLUMNS, HALVES)
            acc0 = tl.zeros((ROWS, COLUMNS), tl.float32)
            acc1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    if CHUNK == 1:
        store_tile(dw_ptr, acc0, acc1, row, N, first_n * COLUMNS, K, ROWS, COLUMNS, HALVES)


def gemm_wgrad(
    dyt_fp8: Tensor, dyt_scale_inv: Tensor, xt_fp8: Tensor, xt_scale_inv: Tensor, dtype: torch.dtype, out: Tensor
) -> None:
    """Launcher of `dsv3c::gemm_wgrad`."""
    P, (N, K) = dyt_fp8.shape[1], out.shape
    if P == 0 or out.numel() == 0:
        out.zero_()
        return
    implementation, config = choose(Problem("gemm_wgrad", P, N, K))
    implementation.launch(dyt_fp8, dyt_scale_inv, xt_fp8, xt_scale_inv, out, **config)


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
    P, (E, N, K) = dyt_fp8.shape[1], out.shape
    if P == 0 or out.numel() == 0:
        out.zero_()
        return
    implementation, config = choose(Problem("grouped_gemm_wgrad", P - TILE * E, N, K, E))  # rows: see `padded_rows`
    implementation.launch(dyt_fp8, dyt_scale_inv, xt_fp8, xt_scale_inv, offs, out, **config)


def launch_plain(
    dyt_fp8: Tensor, dyt_scale_inv: Tensor, xt_fp8: Tensor, xt_scale_inv: Tensor, out: Tensor, **knobs: int
) -> None:
    first = torch.arange(2, dtype=torch.int32, device=out.device) * (dyt_fp8.shape[1] // TILE)
    launch(dyt_fp8, dyt_scale_inv, xt_fp8, xt_scale_inv, first, out[None], **knobs)


def launch_grouped(
    dyt_fp8: Tensor,
    dyt_scale_inv: Tensor,
    xt_fp8: Tensor,
    xt_scale_inv: Tensor,
    offs: Tensor,
    out: Tensor,
    **knobs: int,
) -> None:
    _, first = tile_map(offs, dyt_fp8.shape[1], TILE)
    launch(dyt_fp8, dyt_scale_inv, xt_fp8, xt_scale_inv, first, out, **knobs)


def launch(
    dyt_fp8: Tensor,
    dyt_scale_inv: Tensor,
    xt_fp8: Tensor,
    xt_scale_inv: Tensor,
    first: Tensor,
    out: Tensor,
    *,
    chunk: int,
    **knobs: int,
) -> None:
    """Group e's blocks of 128 rows are first[e] to first[e + 1]."""
    config, (E, N, K) = Config(**knobs), out.shape
    dyt_scale_inv, xt_scale_inv = column_major(dyt_scale_inv), column_major(xt_scale_inv)
    grid = (ceil_div(N, config.block_m) * ceil_div(ceil_div(K, config.columns), chunk), E)
    _wgrad_kernel[grid](
        descriptor(aligned(dyt_fp8), config.rows), descriptor(aligned(xt_fp8), config.columns), out,
        dyt_scale_inv, xt_scale_inv, first, N, K, dyt_scale_inv.stride(1), xt_scale_inv.stride(1),
        config.rows, config.columns, config.halves, config.band, chunk,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def default(problem: Problem) -> tuple[str, dict[str, Any]]:
    if problem.operator == "gemm_wgrad":
        return ("cublaslt", {}) if wgrad_cublaslt_takes(problem) else ("triton", KNOWN[0])
    return "triton", KNOWN[1 if problem.rows < 256 * problem.groups else 0]


def wgrad_cublaslt_takes(problem: Problem) -> bool:
    """`cublaslt_takes` of the product dyᵀ x, whose rows are dy's columns."""
    return cublaslt_takes(Problem("gemm", problem.N, problem.K, problem.rows))


def variant(config: dict[str, Any], dw: str = F32) -> Variant:
    knobs = dict(config)
    chunk, c = knobs.pop("chunk"), Config(**knobs)
    operands = {"dyt_scale_inv_ptr": F32, "xt_scale_inv_ptr": F32, "first_ptr": I32, "dw_ptr": dw}
    operands |= described("dyt_desc", "xt_desc", c)
    return Variant(_wgrad_kernel, operands, tile_constants(c) | {"CHUNK": chunk}, c.num_warps, c.num_stages)


IMPLEMENTATIONS = {
    "gemm_wgrad": (
        Implementation("triton", SPACE, launch_plain, valid=valid, variant=variant, known=KNOWN),
        Implementation("cublaslt", {}, partial(cublaslt, w_tiled=True), takes=wgrad_cublaslt_takes),
    ),
    "grouped_gemm_wgrad": (Implementation("triton", SPACE, launch_grouped, valid=valid, variant=variant, known=KNOWN),),
}


def variants() -> Iterator[Variant]:
    for config in KNOWN:
        yield variant(config, BF16)
        yield variant(config)
