"""FP8 GEMMs with block scales: y = x wᵀ and dx = dy w (dw is in `wgrad.py`).

The contraction goes in blocks of 128, the tile size: one chain of tensor core instructions, whose sum is then
promoted, acc += product · x_scale_inv · w_scale_inv in float32 on the ordinary cores. (The tensor cores keep only
about 14 bits of a sum, V3 report §3.3.2.) FP8 operands must have the contraction contiguous, so dx needs wᵀ,
transposed here on the fly.

The tensor cores would wait during the promotion, so two programs share a multiprocessor: one multiplies while the other
promotes. For that a tile of 128×128 has to live in 4 warps: two halves of 64×128, one product at a time, so that two
accumulators and one product fit in 255 registers. The promotion is a volatile instruction; else the compiler starts the
second product before it has used up the first, and spills. (H200, V3's shapes at M = 4096 but K = 512: 835–1108 TFLOPS.
One program of 8 warps for the same tile: 579–773. Two halves of 128×128 in 8 warps, a quarter less traffic: 682–959.)

cuBLASLt, behind `torch.nn.functional.scaled_mm`, has the same semantics and is taken whenever its alignments hold;
elsewhere (dx of q_a and kv_a: K = 2112) `warp_specialized.py` is.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import ScalingType, pad

from dsv3c.kernels.implementations import Implementation, Problem, Tile, start
from dsv3c.kernels.launch import Descriptor, launched
from dsv3c.kernels.offline import BF16, F32, I32, Variant
from dsv3c.kernels.quantize import column_major, dense, packed
from dsv3c.numerics import E4M3, TILE, ceil_div, round_up


class Config(NamedTuple):
    """How a tile is computed. Changes the speed and never the numbers."""

    rows: int  # of a half
    columns: int
    halves: int  # one below the other; the tile has halves · rows rows
    num_warps: int
    num_stages: int  # blocks of the contraction in flight
    band: int = 8  # rows of tiles that are walked together, see `swizzle`
    programs: int = 0  # a multiprocessor's, each with many tiles; 0: a program a tile

    @property
    def block_m(self) -> int:
        return self.halves * self.rows


SPACE = {
    "rows": (64, 128),
    "columns": (32, 64, 128),
    "halves": (1, 2),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5, 6),
    "band": (4, 8, 16),
    "programs": (0, 1, 2),
}
# Without a table. Each compiles for sm_90 without spills in its loop, with 3.6 and 3.7 of Triton (tested). On an H200:
# the first for up to 64 rows, the third for few rows a group (4.1 TB/s of weights), the last for everything else.
BUILT_IN = (Config(64, 64, 1, 4, 4), Config(64, 128, 1, 4, 3), Config(64, 128, 1, 4, 4), Config(64, 128, 2, 4, 3))
KNOWN = tuple(config._asdict() for config in BUILT_IN)


def tile_of(config: dict[str, Any]) -> Tile:
    return Tile(config["halves"] * config["rows"], config["columns"])


def valid(config: dict[str, Any]) -> bool:
    """An accumulator and a product, each of a half, must fit into the registers of its warps."""
    return config["rows"] * config["columns"] <= 64 * 128 * config["num_warps"] // 4


@triton.jit
def promote(product, scale_inv, acc):
    """acc + product · scale_inv, not to be moved."""
    product, scale_inv = tl.broadcast(product, scale_inv)
    return tl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, scale_inv, acc], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit
def tile_product(
    x_desc, w_desc, x_scale_inv_ptr, w_scale_inv_ptr, x_row, x_end, w_row, num_blocks, x_scale_inv_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """x[x_row:] · w[w_row:]ᵀ over `num_blocks` blocks of 128, in float32; a pair of halves.

    Rows of x from x_end on are others': their sums must not be stored. The pointers are to the scales of x's row 0
    and of w_row's block, in the first block of the contraction.
    """
    rows = x_row + tl.arange(0, ROWS)
    above, below = rows < x_end, rows + ROWS < x_end
    x_scale_inv_ptr += rows
    acc0 = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc1 = acc0
    next0 = tl.load(x_scale_inv_ptr, mask=above, other=0.0)
    next1 = next0
    if HALVES == 2:
        next1 = tl.load(x_scale_inv_ptr + ROWS, mask=below, other=0.0)
    for i in range(num_blocks):
        w = w_desc.load([w_row, i * 128])
        x0 = x_desc.load([x_row, i * 128])
        if HALVES == 2:
            x1 = x_desc.load([x_row + ROWS, i * 128])
        w_scale_inv = tl.load(w_scale_inv_ptr)
        scale0, scale1 = next0, next1
        w_scale_inv_ptr += 1
        x_scale_inv_ptr += x_scale_inv_step
        more = i + 1 < num_blocks
        next0 = tl.load(x_scale_inv_ptr, mask=above & more, other=0.0)
        if HALVES == 2:
            next1 = tl.load(x_scale_inv_ptr + ROWS, mask=below & more, other=0.0)
        acc0 = promote(tl.dot(x0, w.T), scale0[:, None] * w_scale_inv, acc0)
        if HALVES == 2:
            acc1 = promote(tl.dot(x1, w.T), scale1[:, None] * w_scale_inv, acc1)
    return acc0, acc1


@triton.jit
def store_tile(y_ptr, acc0, acc1, row, end, column, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr):
    """Both halves to row-major y [.., N], rows from `end` on left alone."""
    rows = row + tl.arange(0, ROWS)[:, None]
    columns = column + tl.arange(0, COLUMNS)[None, :]
    out = y_ptr + rows.to(tl.int64) * N + columns
    tl.store(out, acc0.to(y_ptr.dtype.element_ty), mask=(rows < end) & (columns < N))
    if HALVES == 2:
        rows += ROWS
        out = y_ptr + rows.to(tl.int64) * N + columns
        tl.store(out, acc1.to(y_ptr.dtype.element_ty), mask=(rows < end) & (columns < N))


@triton.jit
def output_tile(
    x_desc, w_desc, y_ptr, x_scale_inv_ptr, w_scale_inv_ptr, row, end, w_row, column, N, num_blocks, x_scale_inv_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Product and store. A last tile is often short; then its lower half, all of it rows from `end` on, is left out."""
    if HALVES == 1 or end - row <= ROWS:
        acc0, _ = tile_product(
            x_desc, w_desc, x_scale_inv_ptr, w_scale_inv_ptr, row, end, w_row, num_blocks, x_scale_inv_step,
            ROWS, COLUMNS, 1,
        )  # fmt: skip
        store_tile(y_ptr, acc0, acc0, row, end, column, N, ROWS, COLUMNS, 1)
    else:
        acc0, acc1 = tile_product(
            x_desc, w_desc, x_scale_inv_ptr, w_scale_inv_ptr, row, end, w_row, num_blocks, x_scale_inv_step,
            ROWS, COLUMNS, 2,
        )  # fmt: skip
        store_tile(y_ptr, acc0, acc1, row, end, column, N, ROWS, COLUMNS, 2)


@triton.jit
def swizzle(tile, num_m, num_n, band=8):
    """Number → (m, n), `band` rows of tiles at a time, so that tiles in flight share operands in the L2 cache."""
    first = tile // (band * num_n) * band
    height = tl.minimum(num_m - first, band)
    tile -= first * num_n
    return first + tile % height, tile // height


# Numbers of tokens are not specialised: many would compile anew, and where loads of scales get vectorised, it spills.
@launched
@triton.jit(do_not_specialize=["M", "x_scale_inv_step"])
def _gemm_kernel(
    x_desc, w_desc, y_ptr, x_scale_inv_ptr, w_scale_inv_ptr, M, N, K, x_scale_inv_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    num_m, num_n, blocks = tl.cdiv(M, HALVES * ROWS), tl.cdiv(N, COLUMNS), tl.cdiv(K, 128)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = swizzle(tile, num_m, num_n, BAND)
        row, column = m * HALVES * ROWS, n * COLUMNS
        output_tile(
            x_desc, w_desc, y_ptr, x_scale_inv_ptr, w_scale_inv_ptr + column // 128 * blocks, row, M, column, column, N,
            blocks, x_scale_inv_step, ROWS, COLUMNS, HALVES,
        )  # fmt: skip


@launched
@triton.jit
def _transpose_kernel(w_ptr, t_ptr, rows4, columns4, ROWS4: tl.constexpr, COLUMNS4: tl.constexpr):
    """Bytes of w [4·rows4, 4·columns4], as words of 4 columns, to its transpose as words of 4 rows; one matrix a z."""
    row = tl.program_id(1) * ROWS4 + tl.arange(0, ROWS4)[:, None]
    column = tl.program_id(0) * COLUMNS4 + tl.arange(0, COLUMNS4)[None, :]
    matrix = tl.program_id(2).to(tl.int64) * rows4 * columns4 * 4
    inside = (row < rows4) & (column < columns4)
    w_ptr += matrix + (4 * row).to(tl.int64) * columns4 + column
    a = tl.load(w_ptr, mask=inside)
    b = tl.load(w_ptr + columns4, mask=inside)
    c = tl.load(w_ptr + 2 * columns4, mask=inside)
    d = tl.load(w_ptr + 3 * columns4, mask=inside)
    t_ptr += matrix + (4 * column).to(tl.int64) * rows4 + row
    ab, cd = _permute(a, b, 0x5140), _permute(c, d, 0x5140)
    tl.store(t_ptr, _permute(ab, cd, 0x5410), mask=inside)
    tl.store(t_ptr + rows4, _permute(ab, cd, 0x7632), mask=inside)
    ab, cd = _permute(a, b, 0x7362), _permute(c, d, 0x7362)
    tl.store(t_ptr + 2 * rows4, _permute(ab, cd, 0x5410), mask=inside)
    tl.store(t_ptr + 3 * rows4, _permute(ab, cd, 0x7632), mask=inside)


@triton.jit
def _permute(a, b, SELECT: tl.constexpr):
    """Four of the eight bytes of a (0–3) and b (4–7), lowest digit first."""
    select = tl.full(a.shape, SELECT, tl.int32)
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, select], dtype=tl.int32, is_pure=True, pack=1
    )


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it, such that the copy engine takes its rows: 16-byte aligned, contiguous within."""
    if x.stride(-1) == 1 and x.stride(-2) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    *batch, R, K = x.shape
    return x.new_empty(*batch, R, round_up(K, 16))[..., :K].copy_(x)


def descriptor(x_RK: Tensor, rows: int) -> Descriptor:
    return Descriptor(x_RK, (rows, TILE))


def transpose(w_NK: Tensor) -> Tensor:
    """FP8 [.., N, K] → contiguous [.., K, N]; nothing to do for the view of a transposed copy."""
    *batch, N, K = w_NK.shape
    if w_NK.mT.is_contiguous():
        return w_NK.mT
    if N % 4 or K % 4:
        return w_NK.view(torch.uint8).mT.contiguous().view(E4M3)
    t_KN = w_NK.new_empty(*batch, K, N)
    grid = (ceil_div(K, TILE), ceil_div(N, TILE), w_NK.numel() // (N * K))
    words = dense(w_NK).view(torch.int32), t_KN.view(torch.int32)
    _transpose_kernel[grid](*words, N // 4, K // 4, TILE // 4, TILE // 4)
    return t_KN


def gemm(
    x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, dtype: torch.dtype, out: Tensor
) -> None:
    """Launcher of `dsv3c::gemm`."""
    M, K = x_fp8.shape
    if M == 0 or K == 0 or out.numel() == 0:
        out.zero_()
        return
    problem = Problem("gemm", M, len(w_fp8), K)

    def chosen(implementation: Implementation, config: Mapping[str, Any]) -> None:
        rows = slice(None if implementation.takes(problem) else 128)  # it is for few, and here to be compiled
        implementation.launch(x_fp8[rows], x_scale_inv[rows], w_fp8, w_scale_inv, out[rows], **config)

    start(problem, chosen, out)


def gemm_dgrad(
    dy_fp8: Tensor, dy_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, dtype: torch.dtype, out: Tensor
) -> None:
    """Launcher of `dsv3c::gemm_dgrad`."""
    gemm(dy_fp8, dy_scale_inv, transpose(w_fp8), w_scale_inv.mT, dtype, out)


def launch(x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, out: Tensor, **knobs: int) -> None:
    """Our kernel."""
    config = Config(**knobs)
    (M, K), N = x_fp8.shape, len(w_fp8)
    x_scale_inv = column_major(x_scale_inv)
    _gemm_kernel[grid(config, ceil_div(M, config.block_m) * ceil_div(N, config.columns))](
        descriptor(aligned(x_fp8), config.rows), descriptor(aligned(w_fp8), config.columns), out,
        x_scale_inv, w_scale_inv.contiguous(), M, N, K, x_scale_inv.stride(1),
        config.rows, config.columns, config.halves, config.band,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def grid(config: Config, tiles: int) -> tuple[int]:
    """With a program a tile, the loop over tiles, run once, is there because it makes the assembler spill less."""
    return (min(tiles, config.programs * multiprocessors()) if config.programs else tiles,)


@cache
def multiprocessors() -> int:
    return torch.cuda.get_device_properties().multi_processor_count


def cublaslt_takes(problem: Problem) -> bool:
    """Whether cuBLASLt has this product. Other numbers of rows it refuses (CUBLAS_STATUS_NOT_SUPPORTED, CUDA 13.0)."""
    return problem.rows % 4 == 0 and problem.N % 16 == 0 and problem.K % TILE == 0 and hopper()


@cache
def hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


def cublaslt(
    x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, out: Tensor, *, w_tiled: bool = False
) -> None:
    """cuBLASLt; w's scales are of 1×128 tiles if `w_tiled`, else of 128×128 blocks.

    It wants those as (K-blocks rounded up to 4, N-blocks), strides (1, that); others give silently wrong results
    (pytorch #166752). Its results are BF16 or float32.
    """
    if out.dtype not in (torch.bfloat16, torch.float32):
        wide = out.new_empty(out.shape, dtype=torch.float32)
        cublaslt(x_fp8, x_scale_inv, w_fp8, w_scale_inv, wide, w_tiled=w_tiled)
        out.copy_(wide)
        return
    if w_tiled:
        w_recipe, w_scale_inv = ScalingType.BlockWise1x128, packed(w_scale_inv)
    else:
        w_recipe = ScalingType.BlockWise128x128
        padding = -w_scale_inv.shape[1] % 4
        w_scale_inv = dense(pad(w_scale_inv, (0, padding)) if padding else w_scale_inv).t()
    # What F.scaled_mm calls; that has no `out`.
    torch.ops.aten._scaled_mm_v2.out(
        dense(x_fp8), dense(w_fp8).t(), [packed(x_scale_inv)], [ScalingType.BlockWise1x128.value],
        [], [w_scale_inv], [w_recipe.value], [], None, out.dtype, out=out,
    )  # fmt: skip


def default(problem: Problem) -> tuple[str, dict[str, Any]]:
    from dsv3c.kernels import small_gemm, warp_specialized  # which are built on this file

    if problem.rows <= 128:
        return small_gemm.default(problem)
    if cublaslt_takes(problem):
        return "cublaslt", {}
    return ("warp_specialized", warp_specialized.KNOWN[0]) if warp_specialized.takes(problem) else ("triton", KNOWN[-1])


def variant(config: dict[str, Any]) -> Variant:
    c = Config(**config)
    scales = {"x_scale_inv_ptr": F32, "w_scale_inv_ptr": F32}
    operands = described("x_desc", "w_desc", c) | {"y_ptr": BF16} | scales
    return Variant(_gemm_kernel, operands, tile_constants(c), c.num_warps, c.num_stages)


IMPLEMENTATIONS = {
    "gemm": (
        Implementation("triton", SPACE, launch, valid=valid, variant=variant, known=KNOWN, tile=tile_of),
        Implementation("cublaslt", {}, cublaslt, takes=cublaslt_takes),
    )
}


def variants() -> Iterator[Variant]:
    yield Variant(_transpose_kernel, {"w_ptr": I32, "t_ptr": I32}, {"ROWS4": 32, "COLUMNS4": 32})
    for config in KNOWN:
        yield variant(config)


def described(a: str, b: str, config: Config) -> dict[str, str]:
    """Types of the descriptors of two operands."""
    return {a: f"tensordesc<fp8e4nv[{config.rows}, 128]>", b: f"tensordesc<fp8e4nv[{config.columns}, 128]>"}


def tile_constants(config: Config) -> dict[str, int]:
    """The constants that `config` stands for."""
    return {"ROWS": config.rows, "COLUMNS": config.columns, "HALVES": config.halves, "BAND": config.band}
