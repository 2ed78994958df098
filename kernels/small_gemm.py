"""FP8 GEMM for few rows, as in decoding: y = x wᵀ and dx = dy w with up to 128 rows, where reading w is the time.

Floor: the bytes of w at the speed of a copy, and 3 µs for a launch. Two things keep a kernel from it. A tile of w is
multiplied by all of x, which every program reads again from the L2 cache: with 64 rows, tiles of 64 rows of w double
the traffic into the multiprocessors, tiles of 256 add a quarter. And a multiprocessor has only a few tiles, hence
little to do while it waits. So:

- `splits` programs share the contraction of a tile. Their sums go to a workspace, and a second kernel adds them in
  order, launched while the first still runs and waiting on the device for its end (programmatic dependent launch). The
  number of splits decides the order of the sum, so each is an implementation of its own; one split has the bits of
  `gemm.py`.
- the scales of the next one, two or four blocks of the contraction are loaded ahead, since loads that are not operands
  are not pipelined, and waiting for each would cost more than the block.
- up to 32 rows, operands are swapped, yᵀ = w xᵀ: 64 rows, which a tensor core instruction needs, are then w's.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv3c.kernels.gemm import aligned, descriptor, promote
from dsv3c.kernels.implementations import Implementation, Problem
from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import BF16, F32, Variant
from dsv3c.kernels.quantize import column_major
from dsv3c.numerics import TILE, ceil_div

SPLITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
SUMS = 1024  # of a program of the second kernel


class Config(NamedTuple):
    """How a tile is computed. Changes the speed and never the numbers."""

    rows: int  # of x; below 64 with the operands swapped
    columns: int  # of a half
    halves: int  # beside each other, so that a tile of x is read once for both
    blocks: int  # of the contraction, whose scales are loaded together
    num_warps: int
    num_stages: int  # so many times `blocks` blocks of the contraction in flight


SPACE = {
    "rows": (16, 32, 64, 128),
    "columns": (64, 128),
    "halves": (1, 2),
    "blocks": (1, 2, 4),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5, 6, 8, 12),
}


def valid(config: dict[str, Any]) -> bool:
    """Accumulators and a product must fit into the registers, operands into shared memory; a half begins a block."""
    c = Config(**config)
    fit = (c.halves + 1) * c.rows * c.columns <= 128 * 32 * c.num_warps
    operands = (c.rows + c.halves * c.columns) * TILE * c.blocks * c.num_stages
    return fit and operands <= 220 << 10 and (c.halves == 1 or c.columns == TILE)


@triton.jit
def _scales(scale_inv_ptr, at, mask, step, block, last, BLOCKS: tl.constexpr):
    """Scales at `at` of blocks `block` to `block` + BLOCKS; zero from `last` on."""
    scales = ()
    for j in tl.static_range(BLOCKS):
        here = scale_inv_ptr + (block + j) * step + at
        scales = scales + (tl.load(here, mask=mask & (block + j < last), other=0.0),)  # noqa: RUF005 Triton does not unpack
    return scales


@triton.jit
def _multiply(x, w, scale, acc, SWAP: tl.constexpr):
    if SWAP:
        return promote(tl.dot(w, x.T), scale[None, :], acc)
    else:
        return promote(tl.dot(x, w.T), scale[:, None], acc)


@triton.jit
def _store(y_ptr, acc, rows, columns, M, N, SWAP: tl.constexpr):
    if SWAP:
        acc = tl.trans(acc)
    out = y_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


@launched
@triton.jit(do_not_specialize=["M", "x_scale_inv_step"])
def _small_gemm_kernel(
    x_desc, w_desc, y_ptr, x_scale_inv_ptr, w_scale_inv_ptr, M, N, K, x_scale_inv_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """y [SPLITS, M, N]: each split's part of the contraction."""
    if SPLITS > 1:
        gdc_launch_dependents()
    SWAP: tl.constexpr = ROWS < 64
    column, split, row = tl.program_id(0) * HALVES * COLUMNS, tl.program_id(1), tl.program_id(2) * ROWS
    blocks = tl.cdiv(K, 128)
    share = tl.cdiv(blocks, SPLITS)
    first = split * share
    last = tl.minimum(first + share, blocks)
    rows = row + tl.arange(0, ROWS)
    w_row0 = column // 128 * blocks
    w_row1 = w_row0 + tl.where(column + 128 < N, blocks, 0)  # the second half may be outside
    acc0 = tl.zeros((COLUMNS, ROWS) if SWAP else (ROWS, COLUMNS), tl.float32)
    acc1 = acc0
    x_next = _scales(x_scale_inv_ptr, rows, rows < M, x_scale_inv_step, first, last, BLOCKS)
    w0_next = _scales(w_scale_inv_ptr, w_row0, True, 1, first, last, BLOCKS)
    w1_next = _scales(w_scale_inv_ptr, w_row1, HALVES == 2, 1, first, last, BLOCKS)
    for i in range(first, last, BLOCKS):
        x_scales, w0_scales, w1_scales = x_next, w0_next, w1_next
        n = i + BLOCKS
        x_next = _scales(x_scale_inv_ptr, rows, rows < M, x_scale_inv_step, n, last, BLOCKS)
        w0_next = _scales(w_scale_inv_ptr, w_row0, True, 1, n, last, BLOCKS)
        w1_next = _scales(w_scale_inv_ptr, w_row1, HALVES == 2, 1, n, last, BLOCKS)
        for j in tl.static_range(BLOCKS):
            x = x_desc.load([row, (i + j) * 128])
            w0 = w_desc.load([column, (i + j) * 128])
            if HALVES == 2:
                w1 = w_desc.load([column + COLUMNS, (i + j) * 128])
            acc0 = _multiply(x, w0, x_scales[j] * w0_scales[j], acc0, SWAP)
            if HALVES == 2:
                acc1 = _multiply(x, w1, x_scales[j] * w1_scales[j], acc1, SWAP)
    columns = column + tl.arange(0, COLUMNS)
    y_ptr += split.to(tl.int64) * M * N
    _store(y_ptr, acc0, rows, columns, M, N, SWAP)
    if HALVES == 2:
        _store(y_ptr, acc1, rows, columns + COLUMNS, M, N, SWAP)


@launched
@triton.jit(do_not_specialize=["size"])
def _add_splits_kernel(parts_ptr, y_ptr, size, SPLITS: tl.constexpr, SUMS: tl.constexpr):
    """y [size]: the sum of parts [SPLITS, size], first to last."""
    gdc_wait()
    at = tl.program_id(0) * SUMS + tl.arange(0, SUMS)
    total = tl.load(parts_ptr + at, mask=at < size, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts_ptr + split * size + at, mask=at < size, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < size)


def launch(
    x_fp8: Tensor,
    x_scale_inv: Tensor,
    w_fp8: Tensor,
    w_scale_inv: Tensor,
    out: Tensor,
    *,
    splits: int,
    **knobs: int,
) -> None:
    config, (M, K), N = Config(**knobs), x_fp8.shape, len(w_fp8)
    x_scale_inv = column_major(x_scale_inv)
    parts = out if splits == 1 else out.new_empty((splits, M, N), dtype=torch.float32)
    grid = (ceil_div(N, config.halves * config.columns), splits, ceil_div(M, config.rows))
    _small_gemm_kernel[grid](
        descriptor(aligned(x_fp8), config.rows), descriptor(aligned(w_fp8), config.columns), parts,
        x_scale_inv, w_scale_inv.contiguous(), M, N, K, x_scale_inv.stride(1),
        config.rows, config.columns, config.halves, config.blocks, splits,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        _add_splits_kernel[(ceil_div(M * N, SUMS),)](parts, out, M * N, splits, SUMS, launch_pdl=True)


def takes(splits: int, problem: Problem) -> bool:
    """Few rows, at least two blocks of the contraction for each split, and a workspace that 32 bits address."""
    few = problem.rows <= 128 and splits * problem.rows * problem.N < 2**31
    return few and (splits == 1 or 2 * TILE * splits <= problem.K)


def variant(splits: int, config: dict[str, Any]) -> Variant:
    c = Config(**config)
    operands = {
        "x_desc": f"tensordesc<fp8e4nv[{c.rows}, 128]>",
        "w_desc": f"tensordesc<fp8e4nv[{c.columns}, 128]>",
        "y_ptr": BF16 if splits == 1 else F32,
        "x_scale_inv_ptr": F32,
        "w_scale_inv_ptr": F32,
    }
    constants = {"ROWS": c.rows, "COLUMNS": c.columns, "HALVES": c.halves, "BLOCKS": c.blocks, "SPLITS": splits}
    return Variant(_small_gemm_kernel, operands, constants, c.num_warps, c.num_stages)


def _implementation(splits: int) -> Implementation:
    name = "few_rows" if splits == 1 else f"split_{splits}"
    return Implementation(
        name, SPACE, partial(launch, splits=splits), partial(takes, splits), valid, partial(variant, splits), KNOWN
    )


# By the rows of x (16, 32, 64, 128): where one wave of the 132 multiprocessors holds all programs, and where not.
ONE_WAVE = ((16, 64, 1, 4, 4, 3), (32, 64, 1, 4, 4, 3), (64, 64, 1, 4, 4, 3), (64, 64, 1, 2, 4, 3))
MORE = ((16, 64, 1, 2, 4, 3), (32, 64, 1, 2, 4, 3), (64, 64, 1, 2, 4, 2), (128, 64, 1, 1, 4, 3))
KNOWN = tuple(dict(zip(SPACE, values, strict=True)) for values in ONE_WAVE + MORE)


def default(problem: Problem) -> tuple[str, dict[str, Any]]:
    """Without a table: as many splits as leave each multiprocessor a program, or two that are half as tall as x."""
    size = sum(problem.rows > rows for rows in SPACE["rows"][:-1])
    tall = size == len(ONE_WAVE) - 1
    programs, wave = ceil_div(problem.N, 64) * (1 + tall), 132 * (1 + tall)
    splits = max(s for s in SPLITS if s == 1 or (s * programs <= wave and takes(s, problem)))
    config = KNOWN[size if splits * programs <= wave else size + len(ONE_WAVE)]
    return "few_rows" if splits == 1 else f"split_{splits}", config


IMPLEMENTATIONS = {"gemm": tuple(_implementation(splits) for splits in SPLITS)}


def variants() -> Iterator[Variant]:
    for config in KNOWN:
        yield from (variant(splits, config) for splits in (1, 4))
    sums = {"parts_ptr": F32, "y_ptr": BF16}
    yield Variant(_add_splits_kernel, sums, {"SPLITS": 4, "SUMS": SUMS})
