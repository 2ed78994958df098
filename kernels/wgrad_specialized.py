"""Weight gradients with the warps of a program specialised as in `warp_specialized.py`.

dw = dyᵀ x of one weight or of each group's. One warp copies operands and both their scales into shared memory; two
groups of four warps each compute 128 columns of a tile, two products of 64×128 below each other, one of which is
multiplied while the other consumer promotes. Both operands have a scale per row (`wgrad.py`), so that promotion takes
two instructions a value, and a thread 32 scales of columns for each product. Those and the products' operands come from
shared memory, which was the limit (72 % busy, the tensor cores 55 %) as long as a consumer had 64 rows of all columns
and read twice the scales: 5 to 9 % slower. Order of sums and roundings are those of `wgrad.py`, and so are the bits.
(H200, 4096 rows, float32: 814–1005 TFLOPS, 1.01 of cuBLASLt as a geometric mean over V3's shapes.)

A half of a result leaves through shared memory while the next one is computed. In BF16 there is room for two a
consumer: all programs finish a tile at the same time, and the memory takes longer than a half does (8 groups of 4096
rows: 970–1046 TFLOPS; when it was tried, 930–980, with one buffer 830–890).

Where tiles are many and short, a program draws the next one from a counter. All take the same time, but multiprocessors
do not get the same share of memory: of few rows, where the result is the traffic, the slowest would keep the others
waiting. (256 groups of 128 rows: 3.6 TB/s written in BF16, with tiles dealt out 2.9–3.1.) Of few tiles the counter's
own launch costs more than it saves.

To accumulate into a gradient, a tile of it is copied to where the result will leave from, while the products are
computed, and added last: dw + Σ, one rounding.
"""

from collections.abc import Iterator
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

from dsv3c.kernels.gemm import aligned, hopper, multiprocessors, swizzle
from dsv3c.kernels.implementations import Problem
from dsv3c.kernels.launch import Descriptor, launched
from dsv3c.kernels.offline import BF16, F32, I32, Variant
from dsv3c.kernels.quantize import column_major
from dsv3c.numerics import TILE, ceil_div

DRAWN = 64  # tiles of a program from which on they are drawn
TICKETS = gl.constexpr(4)  # tiles that a program has drawn before it computes them
FP8_TILES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
FLOATS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]))


class Config(NamedTuple):
    """Changes the speed and never the numbers."""

    num_stages: int  # blocks of the contraction in flight
    band: int  # rows of tiles that are walked together


SPACE = {"num_stages": (2, 3), "band": (1, 4, 8, 16)}
KNOWN = ({"num_stages": 3, "band": 16}, {"num_stages": 3, "band": 1})


def takes(problem: Problem) -> bool:
    """The copy engine stores whole tiles, of groups that lie behind each other, and wants 16-byte alignment."""
    aligned = problem.N % (4 if problem.groups == 1 else TILE) == 0 and problem.K % 8 == 0
    return aligned and hopper()


@gluon.jit
def _promote(product, row_scale, column_scale, acc):
    """acc + product · (row_scale · column_scale), not to be moved."""
    product, scale = gl.broadcast(product, row_scale[:, None] * column_scale[None, :])
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, scale, acc], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _locate(tile, sizes, BAND: gl.constexpr):
    """A tile's group, first row and first column, and which blocks of the contraction are its."""
    first_ptr, N, K, _E = sizes
    num_m, num_n = gl.cdiv(N, 128), gl.cdiv(K, 256)
    e = tile // (num_m * num_n)
    m, n = swizzle(tile % (num_m * num_n), num_m, num_n, BAND)
    return e, m * 128, n * 256, gl.load(first_ptr + e), gl.load(first_ptr + e + 1)


@gluon.jit
def _produce(sizes, descs, drawn_ptr, tickets, operands, barriers, STAGES: gl.constexpr, BAND: gl.constexpr):
    """Copies the operands of tile after tile, and draws the next one for the consumers."""
    _first_ptr, N, K, E = sizes
    dyt_desc, xt_desc, row_desc, column_desc = descs
    dyt_buf, xt0_buf, xt1_buf, row_buf, column0_buf, column1_buf = operands
    full, empty = barriers
    ticket_buf, drawn, taken = tickets
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    count = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < E * gl.cdiv(N, 128) * gl.cdiv(K, 256):
        next_tile = tile + gl.num_programs(0)
        if drawn_ptr is not None:
            next_tile = gl.num_programs(0) + gl.atomic_add(drawn_ptr, 1, sem="relaxed")
        _e, row, column, first, last = _locate(tile, sizes, BAND)
        for block in range(first, last):
            stage = count % STAGES
            ready = full.index(stage)
            scales = block * K + column
            mbarrier.wait(empty.index(stage), count // STAGES % 2 ^ 1)
            mbarrier.expect(ready, 384 * (128 + 4))
            tma.async_copy_global_to_shared(dyt_desc, [row, block * 128], ready, dyt_buf.index(stage))
            tma.async_copy_global_to_shared(row_desc, [block * N + row], ready, row_buf.index(stage))
            tma.async_copy_global_to_shared(xt_desc, [column, block * 128], ready, xt0_buf.index(stage))
            tma.async_copy_global_to_shared(column_desc, [scales], ready, column0_buf.index(stage))
            tma.async_copy_global_to_shared(xt_desc, [column + 128, block * 128], ready, xt1_buf.index(stage))
            tma.async_copy_global_to_shared(column_desc, [scales + 128], ready, column1_buf.index(stage))
            count += 1
        mbarrier.wait(taken.index(turn % TICKETS), turn // TICKETS % 2 ^ 1)
        ticket_buf.index(turn % TICKETS).store(gl.full((1,), next_tile, gl.int32, ONE))
        mbarrier.arrive(drawn.index(turn % TICKETS), count=1)
        turn += 1
        tile = next_tile


@gluon.jit
def _take(tickets, turn):
    """The tile that the producer drew."""
    ticket_buf, drawn, taken = tickets
    mbarrier.wait(drawn.index(turn % TICKETS), turn // TICKETS % 2)
    tile = gl.max(ticket_buf.index(turn % TICKETS).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(taken.index(turn % TICKETS), count=1)
    return tile


@gluon.jit
def _fetch(dw, row, column, sent, BUFFERS: gl.constexpr):
    """Copies 64×128 of the gradient to where the result will leave from."""
    dw_desc, dw_buf, dw_ready = dw
    ready = dw_ready.index(sent % BUFFERS)
    tma.store_wait(0)
    mbarrier.expect(ready, 64 * 128 * 4)
    tma.async_copy_global_to_shared(dw_desc, [row, column], ready, dw_buf.index(sent % BUFFERS))


@gluon.jit
def _store(dw, acc, row, column, sent, BUFFERS: gl.constexpr, ACCUMULATE: gl.constexpr):
    """A consumer's half number `sent`, added to what was fetched if ACCUMULATE."""
    dw_desc, dw_buf, dw_ready = dw
    buf = dw_buf.index(sent % BUFFERS)
    if ACCUMULATE:
        mbarrier.wait(dw_ready.index(sent % BUFFERS), sent // BUFFERS % 2)
        acc += buf.load(PRODUCT)
    else:
        tma.store_wait(BUFFERS - 1)
    buf.store(acc.to(dw_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dw_desc, [row, column], buf)


@gluon.jit
def _consume(
    sizes, dw, tickets, operands, barriers, STAGES: gl.constexpr, BUFFERS: gl.constexpr, BAND: gl.constexpr,
    ACCUMULATE: gl.constexpr, MINE: gl.constexpr,
):  # fmt: skip
    """Columns MINE to MINE + 128 of each tile."""
    _first_ptr, N, K, E = sizes
    dyt_buf, xt_buf, row_buf, column_buf = operands
    full, empty = barriers
    ROW: gl.constexpr = gl.SliceLayout(1, PRODUCT)
    COLUMN: gl.constexpr = gl.SliceLayout(0, PRODUCT)
    product = gl.zeros((64, 128), gl.float32, PRODUCT)
    count = 0
    sent = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < E * gl.cdiv(N, 128) * gl.cdiv(K, 256):
        e, row, column, first, last = _locate(tile, sizes, BAND)
        row += e * N
        column += MINE
        if ACCUMULATE:
            _fetch(dw, row, column, sent, BUFFERS)
        acc0 = gl.zeros((64, 128), gl.float32, PRODUCT)
        acc1 = gl.zeros((64, 128), gl.float32, PRODUCT)
        for _ in range(first, last):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), count // STAGES % 2)
            above, below = dyt_buf.index(stage).slice(0, 64), dyt_buf.index(stage).slice(64, 64)
            xt = xt_buf.index(stage).permute((1, 0))
            product = warpgroup_mma(above, xt, product, use_acc=False, is_async=True)
            column_scale = column_buf.index(stage).load(COLUMN)
            row_scale0 = row_buf.index(stage).slice(0, 64).load(ROW)
            row_scale1 = row_buf.index(stage).slice(64, 64).load(ROW)
            product = warpgroup_mma_wait(0, deps=[product])
            acc0 = _promote(product, row_scale0, column_scale, acc0)
            product = warpgroup_mma(below, xt, product, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(empty.index(stage), count=1)
            acc1 = _promote(product, row_scale1, column_scale, acc1)
            count += 1
        _store(dw, acc0, row, column, sent, BUFFERS, ACCUMULATE)
        sent += 1
        if ACCUMULATE:
            _fetch(dw, row + 64, column, sent, BUFFERS)
        _store(dw, acc1, row + 64, column, sent, BUFFERS, ACCUMULATE)
        sent += 1
        tile = _take(tickets, turn)
        turn += 1
    tma.store_wait(0)


@launched
@gluon.jit(do_not_specialize=["E"])
def _wgrad_specialized_kernel(
    dyt_desc, xt_desc, row_desc, column_desc, dw_desc, first_ptr, drawn_ptr, N, K, E, STAGES: gl.constexpr,
    BAND: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    BUFFERS: gl.constexpr = 4 // dw_desc.dtype.itemsize
    dyt_buf = gl.allocate_shared_memory(gl.float8e4nv, (STAGES, 128, 128), dyt_desc.layout)
    xt0_buf = gl.allocate_shared_memory(gl.float8e4nv, (STAGES, 128, 128), xt_desc.layout)
    xt1_buf = gl.allocate_shared_memory(gl.float8e4nv, (STAGES, 128, 128), xt_desc.layout)
    row_buf = gl.allocate_shared_memory(gl.float32, (STAGES, 128), row_desc.layout)
    column0_buf = gl.allocate_shared_memory(gl.float32, (STAGES, 128), row_desc.layout)
    column1_buf = gl.allocate_shared_memory(gl.float32, (STAGES, 128), row_desc.layout)
    left_buf = gl.allocate_shared_memory(dw_desc.dtype, (BUFFERS, 64, 128), dw_desc.layout)
    right_buf = gl.allocate_shared_memory(dw_desc.dtype, (BUFFERS, 64, 128), dw_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, (STAGES, 1), mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, (STAGES, 1), mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    left_ready, right_ready = None, None
    if ACCUMULATE:  # barriers that nobody uses would have their memory reused, which goes wrong (tests: `barriers`)
        left_ready = gl.allocate_shared_memory(gl.int64, (BUFFERS, 1), mbarrier.MBarrierLayout())
        right_ready = gl.allocate_shared_memory(gl.int64, (BUFFERS, 1), mbarrier.MBarrierLayout())
        for i in gl.static_range(BUFFERS):
            mbarrier.init(left_ready.index(i), count=1)
            mbarrier.init(right_ready.index(i), count=1)
    ticket_buf = gl.allocate_shared_memory(gl.int32, (TICKETS, 1), gl.SwizzledSharedLayout(1, 1, 1, [0]))
    drawn = gl.allocate_shared_memory(gl.int64, (TICKETS, 1), mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, (TICKETS, 1), mbarrier.MBarrierLayout())
    for i in gl.static_range(TICKETS):
        mbarrier.init(drawn.index(i), count=1)
        mbarrier.init(taken.index(i), count=2)
    sizes, barriers, tickets = (first_ptr, N, K, E), (full, empty), (ticket_buf, drawn, taken)
    descs = (dyt_desc, xt_desc, row_desc, column_desc)
    operands = (dyt_buf, xt0_buf, xt1_buf, row_buf, column0_buf, column1_buf)
    left, right = (dw_desc, left_buf, left_ready), (dw_desc, right_buf, right_ready)
    left_operands = (dyt_buf, xt0_buf, row_buf, column0_buf)
    right_operands = (dyt_buf, xt1_buf, row_buf, column1_buf)
    gl.warp_specialize(
        [
            (_consume, (sizes, left, tickets, left_operands, barriers, STAGES, BUFFERS, BAND, ACCUMULATE, 0)),
            (_consume, (sizes, right, tickets, right_operands, barriers, STAGES, BUFFERS, BAND, ACCUMULATE, 128)),
            (_produce, (sizes, descs, drawn_ptr, tickets, operands, barriers, STAGES, BAND)),
        ],
        [4, 1],
        [240, 24],
    )


def tiles_of(dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * dtype.itemsize, rank=2)


def launch(
    dyt_fp8: Tensor, dyt_scale_inv: Tensor, xt_fp8: Tensor, xt_scale_inv: Tensor, first: Tensor, out: Tensor, *,
    accumulate: bool = False, **knobs: int,
) -> None:  # fmt: skip
    """Group e's blocks of 128 rows are first[e] to first[e + 1]."""
    config, (E, N, K) = Config(**knobs), out.shape
    scales = (column_major(s).t().reshape(-1) for s in (dyt_scale_inv, xt_scale_inv))
    tiles = E * ceil_div(N, TILE) * ceil_div(K, 2 * TILE)
    programs = min(tiles, multiprocessors())
    drawn = first.new_zeros(1) if tiles >= DRAWN * programs else None
    _wgrad_specialized_kernel[(programs,)](
        Descriptor(aligned(dyt_fp8), (TILE, TILE), FP8_TILES), Descriptor(aligned(xt_fp8), (TILE, TILE), FP8_TILES),
        *(Descriptor(s.clone() if s.data_ptr() % 16 else s, (TILE,), FLOATS) for s in scales),
        Descriptor(out.view(E * N, K), (64, TILE), tiles_of(out.dtype)), first, drawn, N, K, E,
        config.num_stages, config.band, accumulate, num_warps=4,
    )  # fmt: skip


def variant(config: dict[str, Any], dw: str = BF16, accumulate: bool = False, drawn: bool = False) -> Variant:
    c = Config(**config)
    layout = tiles_of(torch.bfloat16 if dw == BF16 else torch.float32)
    operand, scale = f"tensordesc<fp8e4nv[{TILE}, {TILE}],{FP8_TILES!r}>", f"tensordesc<fp32[{TILE}],{FLOATS!r}>"
    arguments = {"dyt_desc": operand, "xt_desc": operand, "row_desc": scale, "column_desc": scale}
    arguments |= {"dw_desc": f"tensordesc<{dw.lstrip('*')}[64, {TILE}],{layout!r}>", "first_ptr": I32}
    constants = {"STAGES": c.num_stages, "BAND": c.band, "ACCUMULATE": accumulate}
    if drawn:
        arguments["drawn_ptr"] = I32
    else:
        constants["drawn_ptr"] = None
    return Variant(_wgrad_specialized_kernel, arguments, constants, num_stages=c.num_stages)


def variants() -> Iterator[Variant]:
    yield from (variant(config, drawn=drawn) for config in KNOWN for drawn in (False, True))
    yield variant(KNOWN[0], F32)
    yield variant(KNOWN[1], F32, drawn=True)
    yield variant(KNOWN[0], F32, True)
