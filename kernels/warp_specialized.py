"""FP8 GEMMs with block scales for many rows: y = x wᵀ, dense and by group, with the warps of a program specialised.

What plain Triton (`gemm.py`) cannot say: one warp only starts copies, two groups of four warps only compute, and they
wait for each other through barriers in shared memory. A program computes tiles of 128 rows by 192 columns one after the
other, each consumer 64 rows of them. So one consumer multiplies while the other promotes, and copies for the next tile
run while the last one is stored.

The 192 columns are one tensor core product, in inline PTX, since Triton's tensors have powers of two as sizes. Shared
memory gives 128 bytes a clock; what is multiplied and copied would take 138 of them at the tensor cores' rate, and 160
with products of 128 and 64 columns beside each other.

What the tensor cores wait for (H200, 8 groups of 4096 rows, K = 7168, back to back at 700 W; the share of time they are
busy, from TFLOPS and clock, of a form that copies 128 scales at once):

- x's scales. Loaded by the consumers a block ahead, they come too late from the L2 cache: 72 %, whichever products,
  barriers and order of the consumers. Copied into shared memory beside x: 75 %.
- The L2 cache. Two programs of a cluster, one below the other, each copy half of w's block for both: 79 to 81 %, 8 %
  less time in all; nothing while the scales came late. What is left over of pairs of tiles in each group is computed in
  vain, so groups of few rows stay with single programs. So do dense products, since the loop has become shorter: there
  clusters were 1 % faster to 6 % slower.

DeepGEMM 2.6.1 had 84 % there and took 5 % less time. The copy engine faults unless it begins at 16 bytes, so here it
copies 256 scales from a multiple of four rows on.

Tiles rarely fill the last wave. Where they leave two thirds of it empty, each is dealt out in three parts of 64
columns, which take half as long. (4096 x 4096, K = 7168: 204 → 187 µs; 2048 x 2112: 71 → 57.)

By group a single program draws its next tile from a counter: tiles take different times, and only those that are begun
together find each other's x and w in the L2 cache. Some programs begin with groups of one tile, where reading w is the
time, and the others with longer ones, where the products are; then they help each other. What they share is what the L2
cache can give: with Zipf's counts over 256 groups of 128 rows copies alone take 92 % of the time, at 86 % of its rate.
So w of short groups, read once, is the first to leave the cache, and columns past w's end are not copied. (3 to 7 %
less time there; 1 to 3 % with few or equal groups.) Pairs are dealt out. Drawn as well, and with x shared by two tiles
of a short group, pairs copy in 12 to 28 % less time; but their producer's registers do not suffice, the consumers' loop
comes out 8 to 10 % slower, and nothing is left of it.

The order of sums and the roundings are those of `gemm.py`, and so are the bits of the result.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from dsv3c.kernels import gemm, grouped_gemm
from dsv3c.kernels.cluster import (
    EVICT_FIRST,
    EVICT_NORMAL,
    arrive,
    copy_hinted,
    copy_through,
    copy_to_both,
    expect,
    hinted_copy_through,
    meet,
    of_other,
    start_of_shared,
    wait,
)
from dsv3c.kernels.groups import tiles_by_length
from dsv3c.kernels.implementations import Implementation, Problem, Tile
from dsv3c.kernels.launch import Descriptor, launched
from dsv3c.kernels.offline import BF16, F32, I32, Variant
from dsv3c.kernels.quantize import column_major
from dsv3c.kernels.tile_order import COLUMNS, PART, by_length, draw, first_drawn, locate, walk, whole_tiles
from dsv3c.kernels.wgmma import multiply, multiply_part, promote, read
from dsv3c.numerics import TILE, ceil_div

ROWS = 128  # of a tile: 64 for each of two consumers
STAGES = gl.constexpr(4)  # blocks of the contraction in flight; there is no room for five
FP8_TILES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
BF16_TILES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
COPY_W = hinted_copy_through("_warp_specialized_gemm_kernel_param_5")
COPY_W_TO_BOTH = copy_through("_warp_specialized_gemm_kernel_param_5")

# Bytes from the beginning of shared memory, where blocks of x are: of w, 96 KiB; results of both consumers, 48; x's
# scales; barriers.
W_AT = gl.constexpr(64 * 1024)
RESULTS_AT = gl.constexpr(160 * 1024)
SCALES_AT = gl.constexpr(208 * 1024)
FULL_AT = gl.constexpr(212 * 1024)
EMPTY_AT = gl.constexpr(213 * 1024)


class Config(NamedTuple):
    """Changes the speed and never the numbers."""

    band: int  # rows of tiles that are walked together; 0: all, and each program takes tiles that follow each other
    cluster: int = 1  # programs that share copies of w, by group


SPACE = {"band": (0, 4, 8, 16, 32)}
GROUPED_SPACE = {"band": SPACE["band"][1:], "cluster": (1, 2)}
KNOWN = tuple({"band": band} for band in (8, 16, 0))
GROUPED_KNOWN = tuple(Config(8, cluster)._asdict() for cluster in (2, 1))  # long groups, short ones


@gluon.jit
def _stage(block):
    """Where a block lies: `%`, since numbers may be negative, would take four instructions more before each product,
    one after the other."""
    return block & STAGES - 1


@gluon.jit
def _produce(shared, descs, BAND: gl.constexpr, GROUPED: gl.constexpr, CLUSTER: gl.constexpr):
    """Copies blocks of x, its scales and w; of w's, in a cluster, one half of each part for both programs. A single
    program's by group also draws the next tile, and leaves it to the consumers beside a tile's last block."""
    problem, groups, operands, barriers = shared
    x_desc, w_desc, scale_desc = descs
    x_buf, w_buf, scale_buf, next_buf = operands
    full, empty = barriers
    _num_m, _num_n, M, N, blocks, _whole = problem
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    if CLUSTER == 2:
        meet()
    start = start_of_shared()
    half = gl.program_id(0) % CLUSTER * 32
    block = 0  # counted one by one: Triton folds away what a loop adds if it was not made in the partition (3.6, 3.7)
    tile, end, step = walk(problem, BAND, CLUSTER)
    short, long = 0, 0
    if GROUPED and CLUSTER == 1:
        short, long, _share = by_length(problem, groups)
        tile, end = first_drawn(problem, groups)
    while tile < end:
        next_tile = tile + step
        if GROUPED and CLUSTER == 1:
            next_tile = draw(problem, groups)
        row, _end, e, column, is_part = locate(tile, problem, groups, BAND, GROUPED, CLUSTER)
        w_row = e * N + column
        parts = gl.minimum(gl.cdiv(N - column, PART), 3)  # by group; behind them lies the next expert's w
        # What is read once makes room first for what is read again; where nothing is, it costs 1 to 5 %.
        hint = gl.where((tile < short) & (long > 0), EVICT_FIRST, EVICT_NORMAL)
        scale_row = gl.minimum(row, M - 1) // 4 * 4  # where 16 bytes begin: elsewhere the copy engine faults
        for k in range(blocks):
            stage = _stage(block)
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), block // STAGES % 2 ^ 1)
            if (GROUPED and CLUSTER == 1) and k == blocks - 1:
                next_buf.index(stage).store(gl.full((1,), next_tile, gl.int32, ONE))
            if GROUPED:
                expect(start + FULL_AT + 8 * stage, (128 + parts * PART) * 128 + 1024)
            elif is_part:
                mbarrier.expect(ready, (128 + PART) * 128 + 1024)
            else:
                mbarrier.expect(ready, (128 + COLUMNS) * 128 + 1024)
            tma.async_copy_global_to_shared(scale_desc, [k, scale_row], ready, scale_buf.index(stage))
            tma.async_copy_global_to_shared(x_desc, [row, k * 128], ready, x_buf.index(stage))
            for i in gl.static_range(3):
                if GROUPED:
                    if i < parts:
                        w_at = start + W_AT + ((stage * 3 + i) * PART + half) * 128
                        if CLUSTER == 1:
                            copy_hinted(COPY_W, w_row + PART * i, k * 128, w_at, start + FULL_AT + 8 * stage, hint)
                        else:
                            copy_to_both(
                                COPY_W_TO_BOTH, w_row + PART * i + half, k * 128, w_at, start + FULL_AT + 8 * stage
                            )
                elif i == 0 or not is_part:
                    w_to = w_buf.index(stage * 3 + i)
                    tma.async_copy_global_to_shared(w_desc, [w_row + PART * i, k * 128], ready, w_to)
            block += 1
        tile = next_tile
    if CLUSTER == 2:  # the other may still arrive here
        for _ in range(STAGES):
            mbarrier.wait(empty.index(_stage(block)), block // STAGES % 2 ^ 1)
            block += 1


@gluon.jit
def _begin(
    tile, problem, groups, w_ptr, zero, BAND: gl.constexpr, GROUPED: gl.constexpr, MINE: gl.constexpr,
    CLUSTER: gl.constexpr,
):  # fmt: skip
    """Where a consumer's part of a tile goes; where w's scales lie, in its first and last column of blocks, and the
    first of them."""
    _num_m, _num_n, _M, N, blocks, _whole = problem
    row, end, e, column, is_part = locate(tile, problem, groups, BAND, GROUPED, CLUSTER)
    last = gl.cdiv(N, 128) - 1  # a part may be outside
    w_ptr += e * (last + 1) * blocks
    w0_ptr = w_ptr + gl.minimum(column // 128, last) * blocks
    w1_ptr = w_ptr + gl.minimum(column // 128 + 1, last) * blocks
    return (row + MINE, end, column, is_part), (w0_ptr, w1_ptr), (gl.load(w0_ptr + zero), gl.load(w1_ptr + zero))


@gluon.jit
def _store(acc, y_desc, y_ptr, y_buf, row, end, column, N, GROUPED: gl.constexpr):
    """One part to rows row.. of y, those from `end` on left alone."""
    y_buf.store(acc.to(gl.bfloat16))
    if not GROUPED or row + 64 <= end:
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [row, column], y_buf)
    else:
        COALESCED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        rows = gl.expand_dims(row + gl.arange(0, 64, gl.SliceLayout(1, COALESCED)), 1)
        columns = gl.expand_dims(column + gl.arange(0, 64, gl.SliceLayout(0, COALESCED)), 0)
        gl.store(y_ptr + rows.to(gl.int64) * N + columns, y_buf.load(COALESCED), mask=(rows < end) & (columns < N))


@gluon.jit
def _drawn(slot):
    """The tile that the producer left there."""
    return gl.max(slot.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _skip(full, empty, next_buf, block, blocks):
    """Lets the blocks of a tile go by of which a consumer has no rows; the tile that follows."""
    for i in range(blocks - 1):
        wait(full + 8 * _stage(block + i), (block + i) // STAGES % 2)
        arrive(empty + 8 * _stage(block + i))
    last = block + blocks - 1
    stage = _stage(last)
    wait(full + 8 * stage, last // STAGES % 2)
    tile = _drawn(next_buf.index(stage))
    arrive(empty + 8 * stage)
    return tile


@gluon.jit
def _consume(
    shared, w_ptr, y, BAND: gl.constexpr, GROUPED: gl.constexpr, GAP: gl.constexpr, MINE: gl.constexpr,
    CLUSTER: gl.constexpr,
):  # fmt: skip
    """Rows MINE to MINE + 64 of each tile."""
    problem, groups, operands, _barriers = shared
    y_ptr, y_desc, y_buf = y
    _x_buf, _w_buf, _scale_buf, next_buf = operands
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32])
    _num_m, _num_n, _M, N, blocks, _whole = problem
    start = start_of_shared()
    full, empty = start + FULL_AT, start + EMPTY_AT
    others = empty
    if CLUSTER == 2:
        meet()
        others = of_other(empty)
    rows = gl.arange(0, 64, gl.SliceLayout(1, L))
    # Nought, but not known to be the same for all threads: else the compiler would load w's scales into uniform
    # registers, and wait for them at once.
    zero = gl.minimum(N + rows, 0)
    tile, last, step = walk(problem, BAND, CLUSTER)
    if GROUPED and CLUSTER == 1:
        tile, last = first_drawn(problem, groups)
    place, pointers, following = _begin(tile, problem, groups, w_ptr, zero, BAND, GROUPED, MINE, CLUSTER)
    block = 0
    while tile < last:
        tile += step
        row, end, column, is_part = place
        if (GROUPED and CLUSTER == 1) and row >= end:
            tile = _skip(full, empty, next_buf, block, blocks)
            block += blocks
            place, pointers, following = _begin(tile, problem, groups, w_ptr, zero, BAND, GROUPED, MINE, CLUSTER)
        elif not GROUPED and is_part:
            w0_ptr, _w1_ptr = pointers
            next0, _next1 = following
            acc0 = gl.zeros((64, 64), gl.float32, L)
            for k in range(blocks):
                stage = _stage(block)
                wait(full + 8 * stage, block // STAGES % 2)
                scale0 = read(start + SCALES_AT + (MINE + row % 4 + rows) * 4 + stage * 1024) * next0
                p0 = multiply_part(start + (stage * 128 + MINE) * 128, start + W_AT + stage * (COLUMNS * 128), L)
                arrive(empty + 8 * stage)
                block += 1
                next0 = gl.load(w0_ptr + gl.minimum(k + 1, blocks - 1) + zero)
                acc0 = promote(p0, scale0, acc0)
            place, pointers, following = _begin(tile, problem, groups, w_ptr, zero, BAND, GROUPED, MINE, CLUSTER)
            tma.store_wait(0)
            _store(acc0, y_desc, y_ptr, y_buf.index(0), row, end, column + (column + 128) // 256 * GAP, N, GROUPED)
        else:
            w0_ptr, w1_ptr = pointers
            next0, next1 = following
            acc0 = gl.zeros((64, 64), gl.float32, L)
            acc1 = gl.zeros((64, 64), gl.float32, L)
            acc2 = gl.zeros((64, 64), gl.float32, L)
            scales_at = start + SCALES_AT + (MINE + row % 4 + rows) * 4
            aligned = column % 128 == 0  # to w's blocks: the part in the middle belongs to the first
            wait(full + 8 * _stage(block), block // STAGES % 2)
            for LAST in gl.static_range(2):
                for _ in range(1 if LAST else blocks - 1):
                    stage = _stage(block)
                    x_scale_inv = read(scales_at + stage * 1024)
                    p0, p1, p2 = multiply(start + (stage * 128 + MINE) * 128, start + W_AT + stage * (COLUMNS * 128), L)
                    if (GROUPED and CLUSTER == 1) and LAST:
                        tile = _drawn(next_buf.index(stage))
                    arrive(empty + 8 * stage)
                    if CLUSTER == 2:
                        arrive(others + 8 * stage)
                    block += 1
                    scale0, scale2 = x_scale_inv * next0, x_scale_inv * next1
                    if not LAST:
                        w0_ptr += 1
                        w1_ptr += 1
                        next0, next1 = gl.load(w0_ptr + zero), gl.load(w1_ptr + zero)
                    acc0 = promote(p0, scale0, acc0)
                    acc1 = promote(p1, gl.where(aligned, scale0, scale2), acc1)
                    acc2 = promote(p2, scale2, acc2)
                    if not LAST:  # at the end, so that the compiler asks before it promotes, and is told when it has
                        wait(full + 8 * _stage(block), block // STAGES % 2)
            place, pointers, following = _begin(tile, problem, groups, w_ptr, zero, BAND, GROUPED, MINE, CLUSTER)
            tma.store_wait(0)
            gap0, gap1, gap2 = (column + 128) // 256 * GAP, (column + 192) // 256 * GAP, (column + 256) // 256 * GAP
            _store(acc0, y_desc, y_ptr, y_buf.index(0), row, end, column + gap0, N, GROUPED)
            _store(acc1, y_desc, y_ptr, y_buf.index(1), row, end, column + 64 + gap1, N, GROUPED)
            _store(acc2, y_desc, y_ptr, y_buf.index(2), row, end, column + 128 + gap2, N, GROUPED)
    tma.store_wait(0)


@gluon.jit
def _fill_up(CLUSTER: gl.constexpr):
    """What the three warps beside the producer do: all warps of a cluster have to meet."""
    if CLUSTER == 2:
        meet()


@launched
@gluon.jit(do_not_specialize=["M", "bound"])
def _warp_specialized_gemm_kernel(
    x_desc, w_desc, scale_desc, y_desc, y_ptr, w_scale_inv_ptr, tiles_ptr, counts_ptr, M, N, K, bound,
    BAND: gl.constexpr, GROUPED: gl.constexpr, GAP: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    num_m, num_n, blocks = gl.cdiv(M, 128), gl.cdiv(N, COLUMNS), gl.cdiv(K, 128)
    whole = whole_tiles(num_m * num_n, BAND)
    groups = (tiles_ptr, bound, None, 0)
    if GROUPED:
        num_m = gl.load(counts_ptr)
        groups = (tiles_ptr, bound, counts_ptr + 2, gl.load(counts_ptr + 1))
        whole = num_m * num_n
    KIB: gl.constexpr = EMPTY_AT // 1024 + 1
    memory = gl.allocate_shared_memory(gl.float8e4nv, (KIB, 8, 128), x_desc.layout)
    x_buf = memory._reinterpret(gl.float8e4nv, (STAGES, 128, 128), x_desc.layout)
    w_buf = memory.index(W_AT // 1024)._reinterpret(gl.float8e4nv, (STAGES * 3, 64, 128), x_desc.layout)
    above_buf = memory.index(RESULTS_AT // 1024)._reinterpret(gl.bfloat16, (3, 64, 64), y_desc.layout)
    below_buf = memory.index(RESULTS_AT // 1024 + 24)._reinterpret(gl.bfloat16, (3, 64, 64), y_desc.layout)
    scale_buf = memory.index(SCALES_AT // 1024)._reinterpret(gl.float32, (STAGES, 1, 256), scale_desc.layout)
    full = memory.index(FULL_AT // 1024)._reinterpret(gl.int64, (STAGES, 1), mbarrier.MBarrierLayout())
    empty = memory.index(EMPTY_AT // 1024)._reinterpret(gl.int64, (STAGES, 1), mbarrier.MBarrierLayout())
    next_buf = gl.allocate_shared_memory(gl.int32, (STAGES, 1), gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=8 * CLUSTER)  # the warps that compute, here and there
    shared = ((num_m, num_n, M, N, blocks, whole), groups, (x_buf, w_buf, scale_buf, next_buf), (full, empty))
    above, below = (y_ptr, y_desc, above_buf), (y_ptr, y_desc, below_buf)
    gl.warp_specialize(
        [
            (_consume, (shared, w_scale_inv_ptr, above, BAND, GROUPED, GAP, 0, CLUSTER)),
            (_consume, (shared, w_scale_inv_ptr, below, BAND, GROUPED, GAP, 64, CLUSTER)),
            (_produce, (shared, (x_desc, w_desc, scale_desc), BAND, GROUPED, CLUSTER)),
            (_fill_up, (CLUSTER,)),
            (_fill_up, (CLUSTER,)),
        ],
        [4, 1, 1, 2],
        [240, 24, 24, 24],
    )


def launch(x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, out: Tensor, **knobs: int) -> None:
    """y = x wᵀ."""
    if out.dtype == torch.bfloat16:
        _launch(x_fp8, x_scale_inv, w_fp8, w_scale_inv, out, Config(**knobs))
    else:
        gemm.launch(x_fp8, x_scale_inv, w_fp8, w_scale_inv, out, **gemm.KNOWN[-1])  # the same bits


def launch_heads(
    x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, out_RHD: Tensor, **knobs: int
) -> None:
    """y = x wᵀ, by head of 2·128 features, the first and the last 128 of each in `out`; what lies between is left."""
    gap = out_RHD.shape[2] - 2 * TILE
    out = out_RHD.flatten(1)
    _launch(x_fp8, x_scale_inv, w_fp8, w_scale_inv, out, Config(**knobs), gap=gap)


def launch_grouped(
    x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, offs: Tensor, out: Tensor, **knobs: int
) -> None:
    """y = x wᵀ by group."""
    if out.dtype == torch.bfloat16:
        config = Config(**knobs)
        tiles, count = tiles_by_length(offs, len(out), ROWS * config.cluster)
        _launch(x_fp8, x_scale_inv, w_fp8, w_scale_inv, out, config, tiles, count)
    else:
        grouped_gemm.launch(x_fp8, x_scale_inv, w_fp8, w_scale_inv, offs, out, **gemm.KNOWN[-1])


def _launch(
    x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, out: Tensor, config: Config,
    tiles: Tensor | None = None, count: Tensor | None = None, gap: int = 0,
) -> None:  # fmt: skip
    M, K, N = len(out), x_fp8.shape[1], w_fp8.shape[-2]
    x_fp8, w_fp8 = gemm.aligned(x_fp8), gemm.aligned(w_fp8.contiguous()).reshape(-1, K)
    num_m = ceil_div(M, ROWS) if tiles is None else tiles.shape[1]
    parts = 3 if tiles is None and config.band else 1
    programs = num_m * ceil_div(N, COLUMNS.value) * parts
    grid = (min(programs, max(gemm.multiprocessors() // config.cluster, 1)),)
    _warp_specialized_gemm_kernel[grid](
        Descriptor(x_fp8, (ROWS, TILE), FP8_TILES),
        Descriptor(w_fp8, (PART.value // config.cluster, TILE), FP8_TILES),
        Descriptor(_aligned(x_scale_inv), (1, 2 * ROWS), SCALES),
        Descriptor(out, (ROWS // 2, PART.value), BF16_TILES),
        out, w_scale_inv.contiguous(), tiles, count, M, N, K, num_m,
        config.band, tiles is not None, gap, config.cluster, num_warps=4,
    )  # fmt: skip


def _aligned(scale_inv: Tensor) -> Tensor:
    """Block by block, each block's scales from an address on that is a multiple of 16."""
    by_block = column_major(scale_inv).T
    if by_block.stride(0) % 4 or by_block.data_ptr() % 16:
        blocks, rows = by_block.shape
        by_block = by_block.new_empty(blocks, ceil_div(rows, 4) * 4)[:, :rows].copy_(by_block)
    return by_block


def takes(problem: Problem) -> bool:
    """The copy engine stores rows of y whose length is a multiple of 16 bytes."""
    return problem.N % 8 == 0 and gemm.hopper()


def variant(grouped: bool, config: dict[str, Any]) -> Variant:
    c = Config(**config)
    arguments = {
        "x_desc": f"tensordesc<fp8e4nv[{ROWS}, {TILE}],{FP8_TILES!r}>",
        "w_desc": f"tensordesc<fp8e4nv[{PART.value // c.cluster}, {TILE}],{FP8_TILES!r}>",
        "scale_desc": f"tensordesc<fp32[1, {2 * ROWS}],{SCALES!r}>",
        "y_desc": f"tensordesc<bf16[{ROWS // 2}, {PART.value}],{BF16_TILES!r}>",
        "y_ptr": BF16,
        "w_scale_inv_ptr": F32,
    }
    constants = {"BAND": c.band, "GROUPED": grouped, "GAP": 0, "CLUSTER": c.cluster}
    if grouped:
        arguments |= {"tiles_ptr": I32, "counts_ptr": I32}
    else:
        constants |= {"tiles_ptr": None, "counts_ptr": None}
    return Variant(_warp_specialized_gemm_kernel, arguments, constants)


_DENSE = Implementation(
    "warp_specialized", SPACE, launch, takes, variant=partial(variant, False), known=KNOWN,
    tile=lambda config: Tile(ROWS, COLUMNS.value, parts=3 if config["band"] else 1),
)  # fmt: skip
_GROUPED = Implementation(
    "warp_specialized", GROUPED_SPACE, launch_grouped, takes, variant=partial(variant, True), known=GROUPED_KNOWN,
    tile=lambda config: Tile(ROWS * config["cluster"], COLUMNS.value, config["cluster"]),
)  # fmt: skip
IMPLEMENTATIONS = {"gemm": (_DENSE,), "grouped_gemm": (_GROUPED,)}


def variants() -> Iterator[Variant]:
    for implementation in (_DENSE, _GROUPED):
        yield from map(implementation.variant, implementation.known)
