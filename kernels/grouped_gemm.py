"""The experts' FP8 GEMMs: each group of rows with its own expert's weight. Tiles as in `gemm.py`.

Where the groups end is known to the device only (`offs`, int32), so the host launches for the worst case, and
programs read from `groups.tile_map` which rows and which expert are theirs. Tiles may start at any row: the copy
engine loads whole tiles, with rows of the next group in them, and the store is masked. Weight gradients contract over
rows instead; there each group starts at a multiple of 128 (layout of `quantize_tile_t`), with zeros between.

Two regimes. All experts of V3 on one GPU have about 128 rows each at 4096 tokens: the weights, read once, are the
traffic, and tiles should not be much taller than a group. A GPU's share at EP32 is 8 experts with 4096 rows:
compute-bound.
"""

import torch
import triton
import triton.language as tl
from dsv3c.kernels.gemm import (
    SPACE,
    SPACE_TILED,
    Config,
    aligned,
    descriptor,
    store_tile,
    swizzle,
    tile_product,
    transpose,
)
from dsv3c.kernels.groups import tile_map
from dsv3c.kernels.quantize import column_major
from torch import Tensor

from dsv3c.numerics import TILE, ceil_div


@triton.jit
def _grouped_gemm_kernel(
    x_desc, w_desc, y_ptr, x_scale_inv_ptr, w_scale_inv_ptr, tiles_ptr, first_ptr, E, bound, N, K, x_scale_inv_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    num_m, num_n, blocks = tl.load(first_ptr + E), tl.cdiv(N, COLUMNS), tl.cdiv(K, 128)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = swizzle(tile, num_m, num_n)
        e = tl.load(tiles_ptr + m)
        row = tl.load(tiles_ptr + bound + m)
        end = tl.load(tiles_ptr + 2 * bound + m)
        column = n * COLUMNS
        w_ptr = w_scale_inv_ptr + (e * tl.cdiv(N, 128) + column // 128) * blocks
        acc0, acc1 = tile_product(
            x_desc, w_desc, x_scale_inv_ptr, w_ptr, row, end, e * N + column, e * N + N, 1, x_scale_inv_step,
            0, blocks, ROWS, COLUMNS, HALVES, False,
        )  # fmt: skip
        store_tile(y_ptr, acc0, acc1, row, end, column, N, ROWS, COLUMNS, HALVES)


@triton.jit
def _grouped_wgrad_kernel(
    dyt_desc, xt_desc, dw_ptr, dyt_scale_inv_ptr, xt_scale_inv_ptr, first_ptr, N, K, dyt_step, xt_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    m, n = swizzle(tl.program_id(0), tl.cdiv(N, HALVES * ROWS), tl.cdiv(K, COLUMNS))
    row, column = m * HALVES * ROWS, n * COLUMNS
    first_block = tl.load(first_ptr + e)
    blocks = tl.load(first_ptr + e + 1) - first_block
    acc0, acc1 = tile_product(
        dyt_desc, xt_desc, dyt_scale_inv_ptr + first_block * dyt_step, xt_scale_inv_ptr + first_block * xt_step,
        row, N, column, K, xt_step, dyt_step, first_block, blocks, ROWS, COLUMNS, HALVES, True,
    )  # fmt: skip
    store_tile(dw_ptr + e.to(tl.int64) * N * K, acc0, acc1, row, N, column, K, ROWS, COLUMNS, HALVES)


def grouped_gemm(
    x_fp8: Tensor,
    x_scale_inv: Tensor,
    w_fp8: Tensor,
    w_scale_inv: Tensor,
    offs: Tensor,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """Launcher of `dsv3c::grouped_gemm`."""
    rows = len(x_fp8) / len(offs)
    config = SPACE[2] if rows <= 64 else SPACE[3] if rows <= 512 else SPACE[5]
    launch(x_fp8, x_scale_inv, w_fp8, w_scale_inv, offs, out, config)


def grouped_gemm_dgrad(
    dy_fp8: Tensor,
    dy_scale_inv: Tensor,
    w_fp8: Tensor,
    w_scale_inv: Tensor,
    offs: Tensor,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """Launcher of `dsv3c::grouped_gemm_dgrad`."""
    grouped_gemm(dy_fp8, dy_scale_inv, transpose(w_fp8), w_scale_inv.mT, offs, dtype, out)


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
    launch_wgrad(dyt_fp8, dyt_scale_inv, xt_fp8, xt_scale_inv, offs, out, SPACE_TILED[1])


def launch(
    x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, offs: Tensor, out: Tensor, config: Config
) -> None:
    """y = x wᵀ by group."""
    (R, K), (E, N, _) = x_fp8.shape, w_fp8.shape
    if out.numel() == 0:
        return
    if K == 0:
        out.zero_()
        return
    tiles, first = tile_map(offs, R, config.block_m)
    x_scale_inv, w_fp8 = column_major(x_scale_inv), aligned(w_fp8.contiguous())
    bound = tiles.shape[1]
    _grouped_gemm_kernel[(bound * ceil_div(N, config.columns),)](
        descriptor(aligned(x_fp8), config.rows), descriptor(w_fp8.flatten(0, 1), config.columns), out, x_scale_inv,
        w_scale_inv.contiguous(), tiles, first, E, bound, N, K, x_scale_inv.stride(1),
        config.rows, config.columns, config.halves, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def launch_wgrad(
    dyt_fp8: Tensor,
    dyt_scale_inv: Tensor,
    xt_fp8: Tensor,
    xt_scale_inv: Tensor,
    offs: Tensor,
    out: Tensor,
    config: Config,
) -> None:
    """dw = dyᵀ x by group."""
    E, N, K = out.shape
    if out.numel() == 0:
        return
    _, first = tile_map(offs, dyt_fp8.shape[1], TILE)
    dyt_scale_inv, xt_scale_inv = column_major(dyt_scale_inv), column_major(xt_scale_inv)
    _grouped_wgrad_kernel[(ceil_div(N, config.block_m) * ceil_div(K, config.columns), E)](
        descriptor(aligned(dyt_fp8), config.rows), descriptor(aligned(xt_fp8), config.columns), out,
        dyt_scale_inv, xt_scale_inv, first, N, K, dyt_scale_inv.stride(1), xt_scale_inv.stride(1),
        config.rows, config.columns, config.halves, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
