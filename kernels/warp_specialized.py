"""FP8 GEMMs with block scales for many rows: y = x wᵀ, dense and by group, with the warps of a program specialised.

What plain Triton (`gemm.py`) cannot say: one warp only starts copies, two groups of four warps only compute, and they
wait for each other through barriers in shared memory. A program computes tiles of 128 rows one after the other, each
consumer 64 rows of them. So one consumer multiplies while the other promotes, copies for the next tile run while the
last one is stored, and 128×256 fits, whose operands are 48 KiB for 8.4 MFLOP (twice 128×128: 64). The size counts: what
the L2 cache gives and what memory puts into it is 9 to 9.7 TB/s together, by group at any length. (H200, V3's shapes at
M = 4096: 962–1180 TFLOPS. DeepGEMM 2.6.1 shares copies between two multiprocessors; this was 0.87 of it when tiles of
192 columns took 5 to 7 % longer.)

By group a program draws its next tile from a counter: tiles take different times, and only those that are begun
together find each other's x and w in the L2 cache. Groups of one tile, where reading w is the time, and longer ones,
where the products are, take turns in lots. (Zipf's counts over 256 groups: 5 to 13 % less time than tiles dealt out.)

A half of a consumer's part is one tensor core product, 64×128 (or 64×64). It must lie in one column of the weight's
blocks. Of 256 columns only one half's product is alive at a time: the promotion is volatile, as in `gemm.py`. Of 192
there are registers for both, and one is promoted while the other is multiplied. That takes 5 to 7 % less time, by group
less than 256 columns, though it copies more (8 groups of 4096 rows: tensor cores 80 % busy, 74 with 256). The order of
sums and the roundings are those of `gemm.py` too, and so are the bits of the result.
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

from dsv3c.kernels import gemm, grouped_gemm
from dsv3c.kernels.groups import tiles_by_length
from dsv3c.kernels.implementations import Implementation, Problem
from dsv3c.kernels.launch import Descriptor, launched
from dsv3c.kernels.offline import BF16, F32, I32, Variant
from dsv3c.kernels.quantize import column_major
from dsv3c.numerics import TILE, ceil_div

ROWS = 128  # of a tile: 64 for each of two consumers
LOT = gl.constexpr(64)  # tiles of short groups, or of long ones, that are drawn one after the other
FP8_TILES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
BF16_TILES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


class Config(NamedTuple):
    """Changes the speed and never the numbers."""

    columns: int  # of a tile: a half of 128, and another of 64 or 128 beside it
    num_stages: int  # blocks of the contraction in flight
    band: int  # rows of tiles that are walked together; 0: all, and each program takes tiles that follow each other

    @property
    def narrow(self) -> int:
        """Columns of the other half."""
        return self.columns - 128


SPACE = {"columns": (192, 256), "num_stages": (3, 4, 5), "band": (0, 4, 8, 16, 32)}
GROUPED_SPACE = SPACE | {"band": SPACE["band"][1:]}  # a program's tiles are drawn one by one
# On an H200, in this order: most dense shapes; groups, N = 2112, 16384 and 24576; K = 512; as the first, of few tiles.
KNOWN = tuple(
    config._asdict() for config in (Config(256, 3, 16), Config(192, 4, 8), Config(192, 4, 0), Config(256, 4, 8))
)
GROUPED_KNOWN = tuple(config for config in KNOWN if config["band"])


@gluon.jit
def _promote(product, scale_inv, acc):
    """acc + product · scale_inv, not to be moved."""
    product, scale_inv = gl.broadcast(product, gl.expand_dims(scale_inv, 1))
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, scale_inv, acc], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _walk(problem, BAND: gl.constexpr):
    """A program's tiles as first, end and step; by group it takes the first, and draws the others."""
    num_m, num_n, _M, _N, _blocks = problem
    program, programs = gl.program_id(0), gl.num_programs(0)
    first, end, step = program, num_m * num_n, programs
    if BAND == 0:
        first, end, step = program * end // programs, (program + 1) * end // programs, 1
    return first, end, step


@gluon.jit
def _take_turns(tile, short, long):
    """Lots of `short` tiles of one kind and of `long` ones of another, spread evenly; then what is left of either.
    Whether a tile is a long one, and its number among its kind."""
    lots, long_lots = short // LOT + long // LOT, long // LOT
    lot, rest = tile // LOT, tile - lots * LOT
    before = lot * long_lots // gl.maximum(lots, 1)
    is_long = (lot + 1) * long_lots // gl.maximum(lots, 1) > before
    number = gl.where(is_long, before, lot - before) * LOT + tile % LOT
    left = short % LOT
    is_long = gl.where(rest < 0, is_long, rest >= left)
    number = gl.where(rest < 0, number, rest + gl.where(is_long, long_lots * LOT - left, short - left))
    return is_long, number


@gluon.jit
def _locate(tile, problem, groups, COLUMNS: gl.constexpr, BAND: gl.constexpr, GROUPED: gl.constexpr):
    """A tile's first row and the end of its group's rows, its group, and the first columns of its halves."""
    num_m, num_n, M, _N, _blocks = problem
    first_m, num, band = 0, num_m, BAND
    if GROUPED:
        _tiles_ptr, _bound, _drawn_ptr, num_short = groups
        num_long = num_m - num_short
        is_long, tile = _take_turns(tile, num_short * num_n, num_long * num_n)
        first_m, num = gl.where(is_long, num_short, 0), gl.where(is_long, num_long, num_short)
        band = gl.where(is_long, BAND, BAND // 2)
    tile = gl.maximum(gl.minimum(tile, num * num_n - 1), 0)  # there may be no next, or none at all
    first, height = 0, gl.maximum(num, 1)
    if BAND > 0:
        first = tile // (band * num_n) * band
        height = gl.maximum(gl.minimum(num - first, band), 1)
    m, n = first_m + first + (tile - first * num_n) % height, (tile - first * num_n) // height
    row, end, e = m * 128, M, 0
    if GROUPED:
        tiles_ptr, bound, _drawn_ptr, _num_short = groups
        there = m < num_m
        e = gl.load(tiles_ptr + m, mask=there, other=0)
        row = gl.load(tiles_ptr + bound + m, mask=there, other=0)
        end = gl.load(tiles_ptr + 2 * bound + m, mask=there, other=0)
    column0, column1 = n * COLUMNS, n * COLUMNS + 128
    if COLUMNS == 192:  # the wide half is the one that begins with a block
        column0, column1 = column0 + n % 2 * 64, column1 - n % 2 * 128
    return row, end, e, column0, column1


@gluon.jit
def _produce(
    shared, descs, COLUMNS: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, GROUPED: gl.constexpr
):  # fmt: skip
    """Copies blocks of x, and those of w unless they are the same as in the tile before and still there. By group it
    draws the next tile, and leaves it to the consumers beside a tile's last block."""
    problem, groups, operands, barriers = shared
    x_desc, w0_desc, w1_desc = descs
    x_buf, w0_buf, w1_buf, next_buf = operands
    full, empty = barriers
    _num_m, _num_n, _M, N, blocks = problem
    _tiles_ptr, _bound, drawn_ptr, _num_short = groups
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    block = 0
    last_w0, last_w1 = -N, -N  # where no w begins, and no constant: see `block` in `_consume`
    tile, end, step = _walk(problem, BAND)
    while tile < end:
        next_tile = tile + step
        if GROUPED:
            next_tile = step + gl.atomic_add(drawn_ptr, 1, sem="relaxed")
        row, _end, e, column0, column1 = _locate(tile, problem, groups, COLUMNS, BAND, GROUPED)
        w0, w1 = e * N + column0, e * N + column1
        # Both halves, since one may be outside: where the next group's w begins.
        new = (w0 != last_w0) | (w1 != last_w1) | (blocks != STAGES)
        last_w0, last_w1 = w0, w1
        for k in range(blocks):
            stage = block % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), block // STAGES % 2 ^ 1)
            if GROUPED and k == blocks - 1:
                next_buf.index(stage).store(gl.full((1,), next_tile, gl.int32, ONE))
            mbarrier.expect(ready, (128 + COLUMNS) * 128, pred=new)
            mbarrier.expect(ready, 128 * 128, pred=~new)
            tma.async_copy_global_to_shared(x_desc, [row, k * 128], ready, x_buf.index(stage))
            tma.async_copy_global_to_shared(w0_desc, [w0, k * 128], ready, w0_buf.index(stage), pred=new)
            tma.async_copy_global_to_shared(w1_desc, [w1, k * 128], ready, w1_buf.index(stage), pred=new)
            block += 1
        tile = next_tile


@gluon.jit
def _begin(
    tile, problem, groups, scales, rows, zero, COLUMNS: gl.constexpr, BAND: gl.constexpr, GROUPED: gl.constexpr,
    GAP: gl.constexpr, MINE: gl.constexpr,
):  # fmt: skip
    """Where a consumer's part of a tile goes, where its scales lie (x's rows, w's halves), and the first of them."""
    _num_m, _num_n, M, N, blocks = problem
    x_ptr, _x_step, w_ptr = scales
    row, end, e, column0, column1 = _locate(tile, problem, groups, COLUMNS, BAND, GROUPED)
    row += MINE
    last = gl.cdiv(N, 128) - 1  # a half may be outside
    w_ptr += e * (last + 1) * blocks
    x_ptr += row
    w_ptr0 = w_ptr + gl.minimum(column0 // 128, last) * blocks
    w_ptr1 = w_ptr + gl.minimum(column1 // 128, last) * blocks
    next_x = gl.load(x_ptr + rows, mask=rows < M - row, other=0.0)
    following = (next_x, gl.load(w_ptr0 + zero), gl.load(w_ptr1 + zero))
    column0 += (column0 + 128) // 256 * GAP
    column1 += (column1 + 128) // 256 * GAP
    return (row, end, column0, column1), (x_ptr, w_ptr0, w_ptr1), following


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
def _drawn(slot):
    """The tile that the producer left there."""
    return gl.max(slot.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _consume(
    shared, scales, y, COLUMNS: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, GROUPED: gl.constexpr,
    GAP: gl.constexpr, MINE: gl.constexpr,
):  # fmt: skip
    """Rows MINE to MINE + 64 of each tile."""
    problem, groups, operands, barriers = shared
    _x_scale_inv_ptr, x_step, _w_scale_inv_ptr = scales
    y_ptr, y0_desc, y1_desc, y0_buf, y1_buf = y
    x_buf, w0_buf, w1_buf, next_buf = operands
    full, empty = barriers
    _num_m, _num_n, M, N, blocks = problem
    WIDTH: gl.constexpr = 64 if COLUMNS == 192 else 128
    L0: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    L1: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32])
    product0 = gl.zeros((64, 128), gl.float32, L0)
    product1 = gl.zeros((64, WIDTH), gl.float32, L1)
    rows = gl.arange(0, 64, gl.SliceLayout(1, L0))
    # Nought, but not known to be the same for all threads: else the compiler would load w's scales into uniform
    # registers, and wait for them at once.
    zero = gl.minimum(N + rows, 0)
    tile, last, step = _walk(problem, BAND)
    place, pointers, following = _begin(tile, problem, groups, scales, rows, zero, COLUMNS, BAND, GROUPED, GAP, MINE)
    block = 0  # counted one by one: Triton folds away what a loop adds if it was not made in the partition (3.6, 3.7)
    while tile < last:
        tile += step
        row, end, column0, column1 = place
        if GROUPED and row >= end:
            for LAST in gl.static_range(2):
                for _ in range(1 if LAST else blocks - 1):
                    stage = block % STAGES
                    mbarrier.wait(full.index(stage), block // STAGES % 2)
                    if LAST:
                        tile = _drawn(next_buf.index(stage))
                    mbarrier.arrive(empty.index(stage), count=1)
                    block += 1
            place, pointers, following = _begin(
                tile, problem, groups, scales, rows, zero, COLUMNS, BAND, GROUPED, GAP, MINE
            )
        else:
            x_ptr, w_ptr0, w_ptr1 = pointers
            next_x, next0, next1 = following
            acc0 = gl.zeros((64, 128), gl.float32, L0)
            acc1 = gl.zeros((64, WIDTH), gl.float32, L1)
            for LAST in gl.static_range(2):  # the last block apart: one half is stored while the other is multiplied
                for _ in range(1 if LAST else blocks - 1):
                    stage = block % STAGES
                    scale0 = next_x * next0
                    scale1 = gl.convert_layout(next_x * next1, gl.SliceLayout(1, L1))
                    if not LAST:
                        x_ptr += x_step
                        w_ptr0 += 1
                        w_ptr1 += 1
                        next_x = gl.load(x_ptr + rows, mask=rows < M - row, other=0.0)
                        next0, next1 = gl.load(w_ptr0 + zero), gl.load(w_ptr1 + zero)
                    mbarrier.wait(full.index(stage), block // STAGES % 2)
                    if GROUPED and LAST:
                        tile = _drawn(next_buf.index(stage))
                    x = x_buf.index(stage).slice(MINE, 64)
                    w0, w1 = w0_buf.index(stage).permute((1, 0)), w1_buf.index(stage).permute((1, 0))
                    product0 = warpgroup_mma(x, w0, product0, use_acc=False, is_async=True)
                    if COLUMNS == 256:
                        product0 = warpgroup_mma_wait(0, deps=[product0])
                        acc0 = _promote(product0, scale0, acc0)
                        other = warpgroup_mma(x, w1, product0, use_acc=False, is_async=True)
                    else:
                        other = warpgroup_mma(x, w1, product1, use_acc=False, is_async=True)
                        product0 = warpgroup_mma_wait(1, deps=[product0])
                        acc0 = _promote(product0, scale0, acc0)
                    if LAST:
                        _store(acc0, y0_desc, y_ptr, y0_buf, row, end, column0, N, GROUPED)
                        place, pointers, following = _begin(
                            tile, problem, groups, scales, rows, zero, COLUMNS, BAND, GROUPED, GAP, MINE
                        )
                    other = warpgroup_mma_wait(0, deps=[other])
                    mbarrier.arrive(empty.index(stage), count=1)
                    acc1 = _promote(other, scale1, acc1)
                    if COLUMNS == 256:
                        product0 = other
                    else:
                        product1 = other
                    block += 1
            _store(acc1, y1_desc, y_ptr, y1_buf, row, end, column1, N, GROUPED)
    tma.store_wait(0)


@launched
@gluon.jit(do_not_specialize=["M", "bound", "x_step"])
def _warp_specialized_gemm_kernel(
    x_desc, w0_desc, w1_desc, y0_desc, y1_desc, y_ptr, x_scale_inv_ptr, w_scale_inv_ptr, tiles_ptr, counts_ptr, M, N, K,
    bound, x_step, COLUMNS: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, GROUPED: gl.constexpr,
    GAP: gl.constexpr,
):  # fmt: skip
    num_m, num_n, blocks = gl.cdiv(M, 128), gl.cdiv(N, COLUMNS), gl.cdiv(K, 128)
    groups = (tiles_ptr, bound, None, 0)
    if GROUPED:
        num_m = gl.load(counts_ptr)
        groups = (tiles_ptr, bound, counts_ptr + 2, gl.load(counts_ptr + 1))
    x_buf = gl.allocate_shared_memory(gl.float8e4nv, (STAGES, 128, 128), x_desc.layout)
    w0_buf = gl.allocate_shared_memory(gl.float8e4nv, (STAGES, 128, 128), w0_desc.layout)
    above0_buf = gl.allocate_shared_memory(gl.bfloat16, (64, 128), y0_desc.layout)
    below0_buf = gl.allocate_shared_memory(gl.bfloat16, (64, 128), y0_desc.layout)
    above1_buf, below1_buf = above0_buf, below0_buf
    if COLUMNS == 256:
        w1_buf = gl.allocate_shared_memory(gl.float8e4nv, (STAGES, 128, 128), w1_desc.layout)
    if COLUMNS == 192:
        w1_buf = gl.allocate_shared_memory(gl.float8e4nv, (STAGES, 64, 128), w1_desc.layout)
        above1_buf = gl.allocate_shared_memory(gl.bfloat16, (64, 64), y1_desc.layout)
        below1_buf = gl.allocate_shared_memory(gl.bfloat16, (64, 64), y1_desc.layout)
    next_buf = gl.allocate_shared_memory(gl.int32, (STAGES, 1), gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, (STAGES, 1), mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, (STAGES, 1), mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    shared = ((num_m, num_n, M, N, blocks), groups, (x_buf, w0_buf, w1_buf, next_buf), (full, empty))
    scales = (x_scale_inv_ptr, x_step, w_scale_inv_ptr)
    above, below = (y_ptr, y0_desc, y1_desc, above0_buf, above1_buf), (y_ptr, y0_desc, y1_desc, below0_buf, below1_buf)
    gl.warp_specialize(
        [
            (_consume, (shared, scales, above, COLUMNS, STAGES, BAND, GROUPED, GAP, 0)),
            (_consume, (shared, scales, below, COLUMNS, STAGES, BAND, GROUPED, GAP, 64)),
            (_produce, (shared, (x_desc, w0_desc, w1_desc), COLUMNS, STAGES, BAND, GROUPED)),
        ],
        [4, 1],
        [240, 24],
    )


def launch(x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, out: Tensor, **knobs: int) -> None:
    """y = x wᵀ."""
    if out.dtype == torch.bfloat16:
        _launch(x_fp8, x_scale_inv, w_fp8, w_scale_inv, out, Config(**knobs), ceil_div(len(out), ROWS))
    else:
        gemm.launch(x_fp8, x_scale_inv, w_fp8, w_scale_inv, out, **gemm.KNOWN[-1])  # the same bits


def launch_heads(
    x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, out_RHD: Tensor, **knobs: int
) -> None:
    """y = x wᵀ, by head of 2·128 features, the first and the last 128 of each in `out`; what lies between is left."""
    gap = out_RHD.shape[2] - 2 * TILE
    out = out_RHD.flatten(1)
    _launch(x_fp8, x_scale_inv, w_fp8, w_scale_inv, out, Config(**knobs), ceil_div(len(out), ROWS), gap=gap)


def launch_grouped(
    x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, offs: Tensor, out: Tensor, **knobs: int
) -> None:
    """y = x wᵀ by group."""
    if out.dtype == torch.bfloat16:
        tiles, count = tiles_by_length(offs, len(out), ROWS)
        _launch(x_fp8, x_scale_inv, w_fp8, w_scale_inv, out, Config(**knobs), tiles.shape[1], tiles, count)
    else:
        grouped_gemm.launch(x_fp8, x_scale_inv, w_fp8, w_scale_inv, offs, out, **gemm.KNOWN[-1])


def _launch(
    x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, out: Tensor, config: Config, num_m: int,
    tiles: Tensor | None = None, count: Tensor | None = None, gap: int = 0,
) -> None:  # fmt: skip
    M, K, N = len(out), x_fp8.shape[1], w_fp8.shape[-2]
    x_scale_inv = column_major(x_scale_inv)
    x_fp8, w_fp8 = gemm.aligned(x_fp8), gemm.aligned(w_fp8.contiguous()).reshape(-1, K)
    grid = (min(num_m * ceil_div(N, config.columns), gemm.multiprocessors()),)
    _warp_specialized_gemm_kernel[grid](
        Descriptor(x_fp8, (ROWS, TILE), FP8_TILES),
        Descriptor(w_fp8, (TILE, TILE), FP8_TILES),
        Descriptor(w_fp8, (config.narrow, TILE), FP8_TILES),
        Descriptor(out, (ROWS // 2, TILE), BF16_TILES),
        Descriptor(out, (ROWS // 2, config.narrow), BF16_TILES),
        out, x_scale_inv, w_scale_inv.contiguous(), tiles, count, M, N, K, num_m,
        x_scale_inv.stride(1), config.columns, config.num_stages, config.band, tiles is not None, gap,
        num_warps=4,
    )  # fmt: skip


def takes(problem: Problem) -> bool:
    """The copy engine stores rows of y whose length is a multiple of 16 bytes; lots are counted with 32 bits."""
    tiles = (ceil_div(problem.rows, ROWS) + problem.groups) * ceil_div(problem.N, min(SPACE["columns"]))
    return problem.N % 8 == 0 and (tiles // LOT.value + 2) ** 2 < 2**31 and gemm.hopper()


def variant(grouped: bool, config: dict[str, Any]) -> Variant:
    c = Config(**config)
    arguments = {
        "x_desc": f"tensordesc<fp8e4nv[{ROWS}, {TILE}],{FP8_TILES!r}>",
        "w0_desc": f"tensordesc<fp8e4nv[{TILE}, {TILE}],{FP8_TILES!r}>",
        "w1_desc": f"tensordesc<fp8e4nv[{c.narrow}, {TILE}],{FP8_TILES!r}>",
        "y0_desc": f"tensordesc<bf16[{ROWS // 2}, {TILE}],{BF16_TILES!r}>",
        "y1_desc": f"tensordesc<bf16[{ROWS // 2}, {c.narrow}],{BF16_TILES!r}>",
        "y_ptr": BF16,
        "x_scale_inv_ptr": F32,
        "w_scale_inv_ptr": F32,
    }
    constants = {"COLUMNS": c.columns, "STAGES": c.num_stages, "BAND": c.band, "GROUPED": grouped, "GAP": 0}
    if grouped:
        arguments |= {"tiles_ptr": I32, "counts_ptr": I32}
    else:
        constants |= {"tiles_ptr": None, "counts_ptr": None}
    return Variant(_warp_specialized_gemm_kernel, arguments, constants, num_stages=c.num_stages)


_DENSE, _GROUPED = (
    Implementation(
        "warp_specialized", space, call, takes, variant=partial(variant, grouped), known=known,
        tile=lambda config: (ROWS, config["columns"]),
    )
    for space, call, grouped, known in (
        (SPACE, launch, False, KNOWN),
        (GROUPED_SPACE, launch_grouped, True, GROUPED_KNOWN),
    )
)  # fmt: skip
IMPLEMENTATIONS = {"gemm": (_DENSE,), "grouped_gemm": (_GROUPED,)}


def variants() -> Iterator[Variant]:
    for implementation in (_DENSE, _GROUPED):
        yield from map(implementation.variant, implementation.known)
