"""The experts' FP8 GEMMs: each group of rows with its own expert's weight. Tiles as in `gemm.py`.

Where the groups end is known to the device only (`offs`, int32), so the host launches for the worst case, and
programs read from `groups.tile_map` which rows and which expert are theirs. Tiles may start at any row: the copy
engine loads whole tiles, with rows of the next group in them, and the store is masked. Weight gradients contract over
rows instead; there each group starts at a multiple of 128 (layout of `quantize_tile_t`), with zeros between.

So there is no masked layout for decode, with room for the most rows an expert could get: a captured launch serves
whatever `offs` holds when it is replayed (`test_in_a_cuda_graph` in tests/kernels/test_on_gpu.py and
test_warp_specialized.py; most experts without a row: `test_fewer_rows_than_groups`).

Two regimes. All experts of V3 on one GPU have about 128 rows each at 4096 tokens: the weights, read once, are the
traffic, and tiles should not be much taller than a group. A GPU's share at EP32 is 8 experts with 4096 rows:
compute-bound.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels.gemm import (
    KNOWN,
    SPACE,
    Config,
    aligned,
    described,
    descriptor,
    grid,
    output_tile,
    swizzle,
    tile_constants,
    tile_of,
    transpose,
    valid,
)
from dsv3c.kernels.groups import tile_map
from dsv3c.kernels.implementations import Implementation, Problem, start
from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import BF16, F32, I32, Variant
from dsv3c.kernels.quantize import column_major
from dsv3c.numerics import ceil_div


@launched
@triton.jit(do_not_specialize=["E", "bound", "x_scale_inv_step"])
def _grouped_gemm_kernel(
    x_desc, w_desc, y_ptr, x_scale_inv_ptr, w_scale_inv_ptr, tiles_ptr, first_ptr, E, bound, N, K, x_scale_inv_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    num_m, num_n, blocks = tl.load(first_ptr + E), tl.cdiv(N, COLUMNS), tl.cdiv(K, 128)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = swizzle(tile, num_m, num_n, BAND)
        e = tl.load(tiles_ptr + m)
        row = tl.load(tiles_ptr + bound + m)
        end = tl.load(tiles_ptr + 2 * bound + m)
        column = n * COLUMNS
        w_ptr = w_scale_inv_ptr + (e * tl.cdiv(N, 128) + column // 128) * blocks
        output_tile(
            x_desc, w_desc, y_ptr, x_scale_inv_ptr, w_ptr, row, end, e * N + column, column, N, blocks,
            x_scale_inv_step, ROWS, COLUMNS, HALVES,
        )  # fmt: skip


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
    (R, K), N = x_fp8.shape, w_fp8.shape[1]
    if R == 0 or K == 0 or out.numel() == 0:
        out.zero_()
        return
    operands = x_fp8, x_scale_inv, w_fp8, w_scale_inv, offs, out
    problem = Problem("grouped_gemm", R, N, K, len(offs))
    start(problem, lambda chosen, config: chosen.launch(*operands, **config), out)


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


def launch(
    x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, offs: Tensor, out: Tensor, **knobs: int
) -> None:
    """y = x wᵀ by group."""
    config = Config(**knobs)
    (R, K), (E, N, _) = x_fp8.shape, w_fp8.shape
    tiles, first = tile_map(offs, R, config.block_m)
    x_scale_inv, w_fp8 = column_major(x_scale_inv), aligned(w_fp8.contiguous())
    bound = tiles.shape[1]
    _grouped_gemm_kernel[grid(config, bound * ceil_div(N, config.columns))](
        descriptor(aligned(x_fp8), config.rows), descriptor(w_fp8.flatten(0, 1), config.columns), out, x_scale_inv,
        w_scale_inv.contiguous(), tiles, first, E, bound, N, K, x_scale_inv.stride(1),
        config.rows, config.columns, config.halves, config.band,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def default(problem: Problem) -> tuple[str, dict[str, Any]]:
    from dsv3c.kernels import warp_specialized  # which is built on this file

    if problem.rows <= 64 * problem.groups or not warp_specialized.takes(problem):
        return "triton", KNOWN[2 if problem.rows <= 64 * problem.groups else -1]
    long = problem.rows >= 512 * problem.groups  # what is left over of pairs of tiles counts less
    return "warp_specialized", warp_specialized.GROUPED_KNOWN[0 if long else 1]


def variant(config: dict[str, Any]) -> Variant:
    c = Config(**config)
    operands = described("x_desc", "w_desc", c) | {"y_ptr": BF16, "x_scale_inv_ptr": F32}
    operands |= {"w_scale_inv_ptr": F32, "tiles_ptr": I32, "first_ptr": I32}
    return Variant(_grouped_gemm_kernel, operands, tile_constants(c), c.num_warps, c.num_stages)


IMPLEMENTATIONS = {
    "grouped_gemm": (Implementation("triton", SPACE, launch, valid=valid, variant=variant, known=KNOWN, tile=tile_of),)
}


def variants() -> Iterator[Variant]:
    for config in KNOWN:
        yield variant(config)
