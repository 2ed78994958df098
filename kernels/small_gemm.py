"""FP8 GEMM for few rows (decode): y = x wᵀ, M up to 128, where reading w is the time."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv3c.kernels.gemm import aligned, descriptor, promote
from dsv3c.kernels.offline import BF16, F32, Variant
from dsv3c.kernels.quantize import column_major
from dsv3c.numerics import ceil_div


@triton.jit
def _scales(x_scale_inv_ptr, w_scale_inv_ptr, rows, M, block, last, x_scale_inv_step, BLOCKS: tl.constexpr):
    x_scales, w_scales = (), ()
    for j in tl.static_range(BLOCKS):
        mine = block + j < last
        x_at = x_scale_inv_ptr + (block + j) * x_scale_inv_step + rows
        x_scales = x_scales + (tl.load(x_at, mask=(rows < M) & mine, other=0.0),)
        w_scales = w_scales + (tl.load(w_scale_inv_ptr + block + j, mask=mine, other=0.0),)
    return x_scales, w_scales


@triton.jit
def _multiply(w, x, scale, acc, SWAP: tl.constexpr):
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


@triton.jit(do_not_specialize=["M", "x_scale_inv_step"])
def _small_gemm_kernel(
    x_desc, w_desc, y_ptr, x_scale_inv_ptr, w_scale_inv_ptr, M, N, K, x_scale_inv_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    if SPLITS > 1:
        gdc_launch_dependents()
    column, row, split = tl.program_id(0) * COLUMNS, tl.program_id(2) * HALVES * ROWS, tl.program_id(1)
    blocks = tl.cdiv(K, 128)
    share = tl.cdiv(blocks, SPLITS)
    first = split * share
    last = tl.minimum(first + share, blocks)
    rows = row + tl.arange(0, ROWS)
    w_scale_inv_ptr += column // 128 * blocks
    acc0 = tl.zeros((COLUMNS, ROWS) if SWAP else (ROWS, COLUMNS), tl.float32)
    acc1 = acc0
    x_next, w_next = _scales(x_scale_inv_ptr, w_scale_inv_ptr, rows, M, first, last, x_scale_inv_step, BLOCKS)
    if HALVES == 2:
        x1_next, _ = _scales(x_scale_inv_ptr, w_scale_inv_ptr, rows + ROWS, M, first, last, x_scale_inv_step, BLOCKS)
    for i in range(first, last, BLOCKS):
        x_scales, w_scales = x_next, w_next
        n = i + BLOCKS
        x_next, w_next = _scales(x_scale_inv_ptr, w_scale_inv_ptr, rows, M, n, last, x_scale_inv_step, BLOCKS)
        if HALVES == 2:
            x1_scales = x1_next
            x1_next, _ = _scales(x_scale_inv_ptr, w_scale_inv_ptr, rows + ROWS, M, n, last, x_scale_inv_step, BLOCKS)
        for j in tl.static_range(BLOCKS):
            w = w_desc.load([column, (i + j) * 128])
            x = x_desc.load([row, (i + j) * 128])
            if HALVES == 2:
                x1 = x_desc.load([row + ROWS, (i + j) * 128])
            acc0 = _multiply(w, x, x_scales[j] * w_scales[j], acc0, SWAP)
            if HALVES == 2:
                acc1 = _multiply(w, x1, x1_scales[j] * w_scales[j], acc1, SWAP)
    columns = column + tl.arange(0, COLUMNS)
    y_ptr += split.to(tl.int64) * M * N
    _store(y_ptr, acc0, rows, columns, M, N, SWAP)
    if HALVES == 2:
        _store(y_ptr, acc1, rows + ROWS, columns, M, N, SWAP)


@triton.jit(do_not_specialize=["size"])
def _add_splits_kernel(part_ptr, y_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y = Σ part[s], in the order of s."""
    gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    acc = tl.load(part_ptr + at, mask=mask, other=0.0)
    for s in tl.static_range(1, SPLITS):
        acc += tl.load(part_ptr + s * size + at, mask=mask, other=0.0)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


class Config(NamedTuple):
    rows: int
    columns: int
    halves: int
    blocks: int
    splits: int
    swap: bool
    num_warps: int
    num_stages: int


def launch(x_fp8, x_scale_inv, w_fp8, w_scale_inv, out, config: Config, pdl: bool = True) -> None:
    (M, K), N = x_fp8.shape, len(w_fp8)
    x_scale_inv = column_major(x_scale_inv)
    part = out if config.splits == 1 else out.new_empty((config.splits, M, N), dtype=torch.float32)
    grid = (ceil_div(N, config.columns), config.splits, ceil_div(M, config.rows * config.halves))
    _small_gemm_kernel[grid](
        descriptor(aligned(x_fp8), config.rows), descriptor(aligned(w_fp8), config.columns), part,
        x_scale_inv, w_scale_inv.contiguous(), M, N, K, x_scale_inv.stride(1),
        config.rows, config.columns, config.halves, config.blocks, config.splits, config.swap,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if config.splits > 1:
        _add_splits_kernel[(ceil_div(M * N, 1024),)](part, out, M * N, config.splits, 1024, launch_pdl=pdl)


def variant(config: Config) -> Variant:
    operands = {
        "x_desc": f"tensordesc<fp8e4nv[{config.rows}, 128]>",
        "w_desc": f"tensordesc<fp8e4nv[{config.columns}, 128]>",
        "y_ptr": BF16 if config.splits == 1 else F32, "x_scale_inv_ptr": F32, "w_scale_inv_ptr": F32,
    }
    constants = {"ROWS": config.rows, "COLUMNS": config.columns, "HALVES": config.halves, "BLOCKS": config.blocks, "SPLITS": config.splits, "SWAP": config.swap}
    return Variant(_small_gemm_kernel, operands, constants, config.num_warps, config.num_stages)
