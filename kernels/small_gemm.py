"""FP8 GEMM for few rows (decode): y = x wᵀ, M up to 128, where reading w is the time."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv3c.kernels.gemm import aligned, descriptor, promote
from dsv3c.kernels.offline import BF16, F32, Variant
from dsv3c.kernels.quantize import column_major
from dsv3c.numerics import TILE, ceil_div


@triton.jit
def _multiply(w, x, scale, acc, SWAP: tl.constexpr):
    if SWAP:
        return promote(tl.dot(w, x.T), scale[None, :], acc)
    else:
        return promote(tl.dot(x, w.T), scale[:, None], acc)


@triton.jit(do_not_specialize=["M", "x_scale_inv_step"])
def _small_gemm_kernel(
    x_desc, w_desc, y_ptr, x_scale_inv_ptr, w_scale_inv_ptr, M, N, K, x_scale_inv_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    if SPLITS > 1:
        gdc_launch_dependents()
    column, row, split = tl.program_id(0) * COLUMNS, tl.program_id(2) * ROWS, tl.program_id(1)
    blocks = tl.cdiv(K, 128)
    share = tl.cdiv(blocks, SPLITS)
    first = split * share
    last = tl.minimum(first + share, blocks)
    rows = row + tl.arange(0, ROWS)
    inside = rows < M
    x_scale_inv_ptr += rows
    w_scale_inv_ptr += column // 128 * blocks
    acc = tl.zeros((COLUMNS, ROWS) if SWAP else (ROWS, COLUMNS), tl.float32)
    x0 = tl.load(x_scale_inv_ptr + first * x_scale_inv_step, mask=inside & (first < last), other=0.0)
    w0 = tl.load(w_scale_inv_ptr + first, mask=first < last, other=0.0)
    if BLOCKS >= 2:
        x1 = tl.load(x_scale_inv_ptr + (first + 1) * x_scale_inv_step, mask=inside & (first + 1 < last), other=0.0)
        w1 = tl.load(w_scale_inv_ptr + first + 1, mask=first + 1 < last, other=0.0)
    if BLOCKS == 4:
        x2 = tl.load(x_scale_inv_ptr + (first + 2) * x_scale_inv_step, mask=inside & (first + 2 < last), other=0.0)
        w2 = tl.load(w_scale_inv_ptr + first + 2, mask=first + 2 < last, other=0.0)
        x3 = tl.load(x_scale_inv_ptr + (first + 3) * x_scale_inv_step, mask=inside & (first + 3 < last), other=0.0)
        w3 = tl.load(w_scale_inv_ptr + first + 3, mask=first + 3 < last, other=0.0)
    for i in range(first, last, BLOCKS):
        a0, b0 = w_desc.load([column, i * 128]), x_desc.load([row, i * 128])
        s0, t0 = x0, w0
        n = i + BLOCKS
        x0 = tl.load(x_scale_inv_ptr + n * x_scale_inv_step, mask=inside & (n < last), other=0.0)
        w0 = tl.load(w_scale_inv_ptr + n, mask=n < last, other=0.0)
        if BLOCKS >= 2:
            a1, b1 = w_desc.load([column, i * 128 + 128]), x_desc.load([row, i * 128 + 128])
            s1, t1 = x1, w1
            x1 = tl.load(x_scale_inv_ptr + (n + 1) * x_scale_inv_step, mask=inside & (n + 1 < last), other=0.0)
            w1 = tl.load(w_scale_inv_ptr + n + 1, mask=n + 1 < last, other=0.0)
        if BLOCKS == 4:
            a2, b2 = w_desc.load([column, i * 128 + 256]), x_desc.load([row, i * 128 + 256])
            a3, b3 = w_desc.load([column, i * 128 + 384]), x_desc.load([row, i * 128 + 384])
            s2, t2 = x2, w2
            s3, t3 = x3, w3
            x2 = tl.load(x_scale_inv_ptr + (n + 2) * x_scale_inv_step, mask=inside & (n + 2 < last), other=0.0)
            w2 = tl.load(w_scale_inv_ptr + n + 2, mask=n + 2 < last, other=0.0)
            x3 = tl.load(x_scale_inv_ptr + (n + 3) * x_scale_inv_step, mask=inside & (n + 3 < last), other=0.0)
            w3 = tl.load(w_scale_inv_ptr + n + 3, mask=n + 3 < last, other=0.0)
        acc = _multiply(a0, b0, s0 * t0, acc, SWAP)
        if BLOCKS >= 2:
            acc = _multiply(a1, b1, s1 * t1, acc, SWAP)
        if BLOCKS == 4:
            acc = _multiply(a2, b2, s2 * t2, acc, SWAP)
            acc = _multiply(a3, b3, s3 * t3, acc, SWAP)
    columns = column + tl.arange(0, COLUMNS)
    out = y_ptr + (split.to(tl.int64) * M + rows[:, None]) * N + columns[None, :]
    if SWAP:
        acc = tl.trans(acc)
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (columns[None, :] < N))


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
    blocks: int
    splits: int
    swap: bool
    num_warps: int
    num_stages: int


def launch(x_fp8, x_scale_inv, w_fp8, w_scale_inv, out, config: Config, pdl: bool = True) -> None:
    (M, K), N = x_fp8.shape, len(w_fp8)
    x_scale_inv = column_major(x_scale_inv)
    part = out if config.splits == 1 else out.new_empty((config.splits, M, N), dtype=torch.float32)
    grid = (ceil_div(N, config.columns), config.splits, ceil_div(M, config.rows))
    _small_gemm_kernel[grid](
        descriptor(aligned(x_fp8), config.rows), descriptor(aligned(w_fp8), config.columns), part,
        x_scale_inv, w_scale_inv.contiguous(), M, N, K, x_scale_inv.stride(1),
        config.rows, config.columns, config.blocks, config.splits, config.swap,
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
    constants = {"ROWS": config.rows, "COLUMNS": config.columns, "BLOCKS": config.blocks, "SPLITS": config.splits, "SWAP": config.swap}
    return Variant(_small_gemm_kernel, operands, constants, config.num_warps, config.num_stages)
