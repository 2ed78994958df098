"""FP8 GEMMs with block scales for many rows: y = x wᵀ, dense and by group, with the warps of a program specialised.

What plain Triton (`gemm.py`) cannot say: one warp only starts copies, two groups of four warps only compute, and each
waits for the other through barriers in shared memory. A program computes tiles of 128 rows one after the other, a
consumer 64 rows of each; so one consumer multiplies while the other promotes, copies for the next tile run while the
last one is stored, and 128×256 fits, which needs 48 KiB of operands for 8.4 MFLOP (128×128: 64). The scales of x come
with their rows through shared memory: at a load from the L2 cache, late under this traffic, all would wait.

A half is one tensor core product, 64×128 (or 64×64), which must lie in one column of the weight's blocks, and only one
half's product is alive at a time: the promotion is volatile, as in `gemm.py`. Order of sums and roundings are those of
`gemm.py` too, and so are the bits of the result.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dsv3c.kernels.gemm import aligned, hopper, multiprocessors
from dsv3c.kernels.groups import tile_map
from dsv3c.kernels.implementations import Implementation, Problem
from dsv3c.kernels.offline import F32, I32, BF16, Variant
from dsv3c.kernels.quantize import column_major
from dsv3c.numerics import TILE, ceil_div

ROWS = 128  # of a tile: 64 for each of two consumers
BYTES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
HALVES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
FLOATS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


class Config(NamedTuple):
    """Changes the speed and never the numbers."""

    columns: int  # of a tile: 128 and, beside them, 0, 64 or 128 more
    num_stages: int  # blocks of the contraction in flight
    band: int  # rows of tiles that are walked together


SPACE = {"columns": (128, 192, 256), "num_stages": (3, 4, 5, 6, 7), "band": (4, 8, 16, 32)}


@gluon.jit
def _promote(product, scale_inv, acc):
    """acc + product · scale_inv, not to be moved."""
    product, scale_inv = gl.broadcast(product, gl.expand_dims(scale_inv, 1))
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, scale_inv, acc], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _locate(tile, problem, COLUMNS: gl.constexpr, BAND: gl.constexpr, GROUPED: gl.constexpr):
    """A tile's first row and the end of its group's rows, its group, the first columns of its halves, and where their
    scales of w begin."""
    num_m, num_n, M, N, blocks, w_scale_inv_ptr, tiles_ptr, bound = problem
    tile = gl.maximum(gl.minimum(tile, num_m * num_n - 1), 0)  # there may be no next, or none at all
    first = tile // (BAND * num_n) * BAND
    height = gl.maximum(gl.minimum(num_m - first, BAND), 1)
    m, n = first + (tile - first * num_n) % height, (tile - first * num_n) // height
    row, end, e = m * 128, M, 0
    if GROUPED:
        there = m < num_m
        e = gl.load(tiles_ptr + m, mask=there, other=0)
        row = gl.load(tiles_ptr + bound + m, mask=there, other=0)
        end = gl.load(tiles_ptr + 2 * bound + m, mask=there, other=0)
    column0, column1 = n * COLUMNS, n * COLUMNS + 128
    if COLUMNS == 192:  # the wide half is the one that begins with a block
        column0, column1 = column0 + n % 2 * 64, column1 - n % 2 * 128
    last = gl.cdiv(N, 128) - 1  # a half may be outside
    w_ptr0 = w_scale_inv_ptr + (e * (last + 1) + gl.minimum(column0 // 128, last)) * blocks
    w_ptr1 = w_scale_inv_ptr + (e * (last + 1) + gl.minimum(column1 // 128, last)) * blocks
    return row, end, e, column0, column1, w_ptr0, w_ptr1


@gluon.jit
def _produce(
    problem, descs, operands, barriers, COLUMNS: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
    GROUPED: gl.constexpr,
):  # fmt: skip
    x_desc, w0_desc, w1_desc, scale_desc = descs
    x_buf, w0_buf, w1_buf, scale_buf = operands
    full, empty = barriers
    num_m, num_n, M, N, blocks, w_scale_inv_ptr, tiles_ptr, bound = problem
    block = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        row, end, e, column0, column1, w_ptr0, w_ptr1 = _locate(tile, problem, COLUMNS, BAND, GROUPED)
        for k in range(blocks):
            stage = block % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), block // STAGES % 2 ^ 1)
            mbarrier.expect(ready, (128 + COLUMNS) * 128 + 128 * 4)
            tma.async_copy_global_to_shared(x_desc, [row, k * 128], ready, x_buf.index(stage))
            tma.async_copy_global_to_shared(w0_desc, [e * N + column0, k * 128], ready, w0_buf.index(stage))
            if COLUMNS > 128:
                tma.async_copy_global_to_shared(w1_desc, [e * N + column1, k * 128], ready, w1_buf.index(stage))
            tma.async_copy_global_to_shared(scale_desc, [k * M + row], ready, scale_buf.index(stage))
            block += 1


@gluon.jit
def _store(acc, y_desc, y_ptr, y_buf, row, end, column, N, GROUPED: gl.constexpr):
    """One half to rows row.. of y, those from `end` on left alone."""
    tma.store_wait(0)
    y_buf.store(acc.to(gl.bfloat16))
    if not GROUPED or row + 64 <= end:
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [row, column], y_buf)
    else:
        COALESCED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        rows = gl.expand_dims(row + gl.arange(0, 64, gl.SliceLayout(1, COALESCED)), 1)
        columns = gl.expand_dims(column + gl.arange(0, y_buf.shape[1], gl.SliceLayout(0, COALESCED)), 0)
        gl.store(y_ptr + rows.to(gl.int64) * N + columns, y_buf.load(COALESCED), mask=(rows < end) & (columns < N))


@gluon.jit
def _consume(
    problem, y, y0_buf, y1_buf, operands, barriers, COLUMNS: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
    GROUPED: gl.constexpr, MINE: gl.constexpr,
):  # fmt: skip
    """Rows MINE to MINE + 64 of each tile."""
    y_ptr, y0_desc, y1_desc = y
    x_buf, w0_buf, w1_buf, scale_buf = operands
    full, empty = barriers
    num_m, num_n, M, N, blocks, w_scale_inv_ptr, tiles_ptr, bound = problem
    WIDTH: gl.constexpr = 64 if COLUMNS == 192 else 128
    L0: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    L1: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32])
    product0 = gl.zeros((64, 128), gl.float32, L0)
    product1 = gl.zeros((64, WIDTH), gl.float32, L1)
    # Nought, but not known to be the same for all threads: else the compiler loads w's scales into uniform registers, and
    # waits for them at once.
    zero0 = gl.minimum(N + gl.arange(0, 64, gl.SliceLayout(1, L0)), 0)
    zero1 = gl.minimum(N + gl.arange(0, 64, gl.SliceLayout(1, L1)), 0)
    row, end, e, column0, column1, w_ptr0, w_ptr1 = _locate(gl.program_id(0), problem, COLUMNS, BAND, GROUPED)
    next0, next1 = gl.load(w_ptr0 + zero0), gl.load(w_ptr1 + zero1)
    block = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        this_row, this_end, this_column0, this_column1 = row + MINE, end, column0, column1
        if GROUPED and this_row >= this_end:
            for _ in range(blocks):
                mbarrier.wait(full.index(block % STAGES), block // STAGES % 2)
                mbarrier.arrive(empty.index(block % STAGES), count=1)
                block += 1
            row, end, e, column0, column1, w_ptr0, w_ptr1 = _locate(
                tile + gl.num_programs(0), problem, COLUMNS, BAND, GROUPED
            )
            next0, next1 = gl.load(w_ptr0 + zero0), gl.load(w_ptr1 + zero1)
        else:
            acc0 = gl.zeros((64, 128), gl.float32, L0)
            acc1 = gl.zeros((64, WIDTH), gl.float32, L1)
            for LAST in gl.static_range(2):  # the last block apart: one half is stored while the other is multiplied
                for _ in range(1 if LAST else blocks - 1):
                    stage = block % STAGES
                    scale0, scale1 = next0, next1
                    if not LAST:
                        w_ptr0 += 1
                        w_ptr1 += 1
                        next0, next1 = gl.load(w_ptr0 + zero0), gl.load(w_ptr1 + zero1)
                    mbarrier.wait(full.index(stage), block // STAGES % 2)
                    x = x_buf.index(stage).slice(MINE, 64)
                    scales = scale_buf.index(stage).slice(MINE, 64)
                    w0 = w0_buf.index(stage).permute((1, 0))
                    product0 = warpgroup_mma(x, w0, product0, use_acc=False, is_async=True)
                    scale0 *= scales.load(gl.SliceLayout(1, L0))
                    scale1 *= scales.load(gl.SliceLayout(1, L1))
                    product0 = warpgroup_mma_wait(0, deps=[product0])
                    if COLUMNS == 128:
                        mbarrier.arrive(empty.index(stage), count=1)
                    acc0 = _promote(product0, scale0, acc0)
                    if COLUMNS > 128:
                        w1 = w1_buf.index(stage).permute((1, 0))
                        other = product0 if COLUMNS == 256 else product1
                        other = warpgroup_mma(x, w1, other, use_acc=False, is_async=True)
                    if LAST:
                        _store(acc0, y0_desc, y_ptr, y0_buf, this_row, this_end, this_column0, N, GROUPED)
                        row, end, e, column0, column1, w_ptr0, w_ptr1 = _locate(
                            tile + gl.num_programs(0), problem, COLUMNS, BAND, GROUPED
                        )
                        next0, next1 = gl.load(w_ptr0 + zero0), gl.load(w_ptr1 + zero1)
                    if COLUMNS > 128:
                        other = warpgroup_mma_wait(0, deps=[other])
                        mbarrier.arrive(empty.index(stage), count=1)
                        acc1 = _promote(other, scale1, acc1)
                        if COLUMNS == 256:
                            product0 = other
                        else:
                            product1 = other
                    block += 1
            if COLUMNS > 128:
                _store(acc1, y1_desc, y_ptr, y1_buf, this_row, this_end, this_column1, N, GROUPED)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "E", "bound"])
def _warp_specialized_kernel(
    x_desc, w0_desc, w1_desc, y0_desc, y1_desc, scale_desc, y_ptr, w_scale_inv_ptr, tiles_ptr, first_ptr, M, N, K, E,
    bound, COLUMNS: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    num_m, num_n, blocks = gl.cdiv(M, 128), gl.cdiv(N, COLUMNS), gl.cdiv(K, 128)
    if GROUPED:
        num_m = gl.load(first_ptr + E)
    x_buf = gl.allocate_shared_memory(gl.float8e4nv, (STAGES, 128, 128), x_desc.layout)
    w0_buf = gl.allocate_shared_memory(gl.float8e4nv, (STAGES, 128, 128), w0_desc.layout)
    scale_buf = gl.allocate_shared_memory(gl.float32, (STAGES, 128), scale_desc.layout)
    above0_buf = gl.allocate_shared_memory(gl.bfloat16, (64, 128), y0_desc.layout)
    below0_buf = gl.allocate_shared_memory(gl.bfloat16, (64, 128), y0_desc.layout)
    w1_buf, above1_buf, below1_buf = w0_buf, above0_buf, below0_buf
    if COLUMNS == 256:
        w1_buf = gl.allocate_shared_memory(gl.float8e4nv, (STAGES, 128, 128), w1_desc.layout)
    if COLUMNS == 192:
        w1_buf = gl.allocate_shared_memory(gl.float8e4nv, (STAGES, 64, 128), w1_desc.layout)
        above1_buf = gl.allocate_shared_memory(gl.bfloat16, (64, 64), y1_desc.layout)
        below1_buf = gl.allocate_shared_memory(gl.bfloat16, (64, 64), y1_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, (STAGES, 1), mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, (STAGES, 1), mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    problem = (num_m, num_n, M, N, blocks, w_scale_inv_ptr, tiles_ptr, bound)
    operands, barriers = (x_buf, w0_buf, w1_buf, scale_buf), (full, empty)
    y, descs = (y_ptr, y0_desc, y1_desc), (x_desc, w0_desc, w1_desc, scale_desc)
    gl.warp_specialize(
        [
            (_consume, (problem, y, above0_buf, above1_buf, operands, barriers, COLUMNS, STAGES, BAND, GROUPED, 0)),
            (_consume, (problem, y, below0_buf, below1_buf, operands, barriers, COLUMNS, STAGES, BAND, GROUPED, 64)),
            (_produce, (problem, descs, operands, barriers, COLUMNS, STAGES, BAND, GROUPED)),
        ],
        [4, 1],
        [240, 24],
    )


def launch(
    x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, offs: Tensor | None, out: Tensor, **knobs: int
) -> None:
    """y = x wᵀ, by group if there are `offs`."""
    config = Config(**knobs)
    (R, K), N = x_fp8.shape, w_fp8.shape[-2]
    tiles = first = None
    E = bound = 0
    num_m = ceil_div(R, ROWS)
    if offs is not None:
        E = len(offs)
        tiles, first = tile_map(offs, R, ROWS)
        num_m = bound = tiles.shape[1]
    scale_inv = column_major(x_scale_inv).t().reshape(-1)
    if scale_inv.data_ptr() % 16:
        scale_inv = scale_inv.clone()
    x_fp8, w_fp8 = aligned(x_fp8), aligned(w_fp8.contiguous()).reshape(-1, w_fp8.shape[-1])
    describe = TensorDescriptor.from_tensor
    narrow = 64 if config.columns == 192 else 128
    grid = (min(num_m * ceil_div(N, config.columns), multiprocessors()),)
    _warp_specialized_kernel[grid](
        describe(x_fp8, [128, 128], BYTES), describe(w_fp8, [128, 128], BYTES), describe(w_fp8, [narrow, 128], BYTES),
        describe(out, [64, 128], HALVES), describe(out, [64, narrow], HALVES), describe(scale_inv, [128], FLOATS),
        out, w_scale_inv.contiguous(), tiles, first, R, N, K, E, bound,
        config.columns, config.num_stages, config.band, offs is not None, num_warps=4,
    )  # fmt: skip
