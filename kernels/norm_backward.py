"""The gradient of RMSNorm, memory-bound: 6 bytes a value, 8 with the gradient that reaches x beside the norm.

The weight's gradient is a sum over rows. One program a multiprocessor (two of narrow rows) adds up those of its rows
in registers, and a second launch, which begins as the first one ends, adds up the programs'. No atomics: the order
is always the same.

With so few programs most of a row's time would be spent waiting. So the copy engine brings rows up to three turns
ahead, and the weight stays in registers.

H200, 4096 rows, in the time of a copy of as many bytes: of 7168 columns 0.91, 0.88 without the second gradient (16384
rows 0.97); of 2048 0.85 and 0.87; of 1536 0.87 and 0.86; of 512 0.77. Rows narrower than 7168 are marked as what makes
room in the L2 cache first: of 1536 columns 19.2 -> 18.6 and 22.6 -> 21.9 us, of 2048 23.2 -> 22.3 and 26.8 -> 26.3; of
512 no difference; 7168 columns would take longer (68.2 -> 71.1, 16384 rows 233 -> 252). The sum with all of a thread's
loads, 16 bytes each, on their way at once: 0.83 -> 0.84 of 1536. The second launch let in with a program's last turn
and not with its first: 18.5 -> 18.0 and 21.7 -> 21.1, 16384 rows 47.9 -> 46.6; why it disturbs is not known.

By programs that load a row, compute and store it, of 7168, 2048, 1536 and 512 columns: 0.84, 0.76, 0.72, 0.63. Slower
at 7168: two programs a multiprocessor (0.76), 16 warps (0.88), the last sum by 8 columns a program (0.89); at 1536: two
programs (0.74), 16 warps (0.73), eight rows a turn (0.73), a row a warp with barriers of its own, two or three turns at
a time (24.7 and 19.0 us for 18.5), five or eight (19.0, 20.0), a copy for a row (18.5) or for all rows of a turn (18.8;
by 128 programs 20.2), each thread with columns of all rows (20.0); at 2048: a row a turn (0.67). The second launch:
waiting alone takes 0.4 to 1.1 us; polling for the programs' sums instead 0.5 to 2.8 more.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv3c.kernels.bulk import copy, expect, set_up
from dsv3c.kernels.cluster import start_of_shared, wait
from dsv3c.kernels.gemm import aligned, multiprocessors
from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import F32, I32, Variant
from dsv3c.kernels.tiles import as_words, high, low, pack
from dsv3c.numerics import ceil_div

WARPS = 8
WIDE = 7168  # columns
SUMMED, PARTS = 1024, 5  # numbers at a time, 16 bytes a thread; times, all on their way before the first is added
SHARED = 216 << 10  # bytes of rows
# Columns at most, rows of a turn, turns whose rows there is room for.
TURNS = ((896, 8, 4), (1792, 4, 4), (2048, 4, 3), (3584, 2, 4), (16384, 1, 4))
_wait_for_all = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6


@gluon.jit
def _bring(
    ptr, stride, start, R, target, barrier,
    K: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, ONCE: gl.constexpr,
):  # fmt: skip
    """Has ROWS rows from `start` on copied, chunk by chunk."""
    THREAD: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    PIECES: gl.constexpr = 1 if ROWS == 1 else (K // 2 + WIDTH - 1) // WIDTH  # chunks of a single row are contiguous
    thread = gl.arange(0, 32 * gl.num_warps(), THREAD)
    inner, piece = thread // PIECES, thread % PIECES
    size = gl.minimum(2 * K - piece * (4 * WIDTH), 2 * K if PIECES == 1 else 4 * WIDTH)
    source = ptr + (start + inner).to(gl.int64) * stride + piece * WIDTH
    mine = (inner < ROWS) & (start + inner < R)
    copy(target + (piece * ROWS + inner) * (4 * WIDTH), source, size, barrier, mine, ONCE)


@gluon.jit
def _bring_all(
    dy_ptr, x_ptr, dsum_ptr, dy_stride, x_stride, dsum_stride, start, R, target, barrier,
    K: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, OPERANDS: gl.constexpr, ROW: gl.constexpr,
    ONCE: gl.constexpr,
):  # fmt: skip
    """Has the rows of a turn copied, if there are any."""
    expect(barrier, gl.minimum(gl.maximum(R - start, 0), ROWS) * (OPERANDS * 2 * K))
    _bring(dy_ptr, dy_stride, start, R, target, barrier, K, ROWS, WIDTH, ONCE)
    _bring(x_ptr, x_stride, start, R, target + ROW, barrier, K, ROWS, WIDTH, ONCE)
    if dsum_ptr is not None:
        _bring(dsum_ptr, dsum_stride, start, R, target + 2 * ROW, barrier, K, ROWS, WIDTH, ONCE)


@launched
@gluon.jit(do_not_specialize=["R", "dy_stride", "x_stride", "dsum_stride"])
def _norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dsum_ptr, dx_ptr, partial_ptr, R, dy_stride, x_stride, dsum_stride,
    K: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, ONCE: gl.constexpr,
):  # fmt: skip
    """ROWS rows a turn, in chunks of WIDTH words; strides in words."""
    ACROSS: gl.constexpr = gl.num_warps() // ROWS  # warps of a row
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4 if ROWS > 1 else 2], [1, 32], [ROWS, ACROSS], [1, 0])
    PARTS: gl.constexpr = gl.BlockedLayout([1, ACROSS], [1, 32], [ROWS, ACROSS], [1, 0])
    COLUMN: gl.constexpr = gl.BlockedLayout([ROWS, 1 if ROWS > 1 else 4], [1, 32], [1, gl.num_warps()], [1, 0])
    CHUNKS: gl.constexpr = (K // 2 + WIDTH - 1) // WIDTH
    OPERANDS: gl.constexpr = 2 if dsum_ptr is None else 3
    ROW: gl.constexpr = CHUNKS * ROWS * WIDTH * 4  # bytes of an operand's rows of a turn
    rows = gl.allocate_shared_memory(
        gl.int32, [STAGES * OPERANDS * CHUNKS + 1, ROWS, WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    parts = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS, ACROSS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    base = start_of_shared()
    full = base + STAGES * OPERANDS * ROW  # barriers
    for stage in gl.static_range(STAGES):
        set_up(full + 8 * stage)
    _wait_for_all()
    first, step = gl.program_id(0) * ROWS, gl.num_programs(0) * ROWS
    for stage in gl.static_range(STAGES - 1):
        _bring_all(
            dy_ptr, x_ptr, dsum_ptr, dy_stride, x_stride, dsum_stride, first + stage * step, R,
            base + stage * OPERANDS * ROW, full + 8 * stage, K, ROWS, WIDTH, OPERANDS, ROW, ONCE,
        )  # fmt: skip
    word = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))[None, :]
    inner = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    weights, evens, odds = (), (), ()  # the last two of the weight's gradient
    for chunk in gl.static_range(CHUNKS):
        weights += (gl.load(weight_ptr + word + chunk * WIDTH, mask=word + chunk * WIDTH < K // 2, other=0),)
        evens += (gl.full([ROWS, WIDTH], 0.0, gl.float32, LAYOUT),)
        odds += (gl.full([ROWS, WIDTH], 0.0, gl.float32, LAYOUT),)
    ahead = gl.load(rstd_ptr + first + inner, mask=first + inner < R, other=0.0)
    stage, before, phase = 0, STAGES - 1, 0
    for start in range(first, R, step):
        row = start + inner
        rstd = ahead[:, None]
        ahead = gl.load(rstd_ptr + row + step, mask=row + step < R, other=0.0)
        wait(full + 8 * stage, phase)
        known = (row < R)[:, None]
        xs, dys, sums = (), (), gl.full([ROWS, WIDTH], 0.0, gl.float32, LAYOUT)
        evens_before, odds_before = evens, odds
        evens, odds = (), ()
        for chunk in gl.static_range(CHUNKS):
            inside = known & (word + chunk * WIDTH < K // 2)
            dy = gl.where(inside, rows.index(stage * (OPERANDS * CHUNKS) + chunk).load(LAYOUT), 0)
            x = gl.where(inside, rows.index(stage * (OPERANDS * CHUNKS) + CHUNKS + chunk).load(LAYOUT), 0)
            even, odd = low(dy) * (low(x) * rstd), high(dy) * (high(x) * rstd)
            sums += low(weights[chunk]) * even + high(weights[chunk]) * odd
            evens += (evens_before[chunk] + even,)
            odds += (odds_before[chunk] + odd,)
            xs += (x,)
            dys += (dy,)
        parts.index(stage).store(gl.sum(gl.reshape(sums, (ROWS, ACROSS, WIDTH // ACROSS)), 2))  # of a warp
        _wait_for_all()  # and no thread needs the rows of the turn before any more
        total = gl.sum(parts.index(stage).load(PARTS), 1)
        mean = gl.convert_layout(total / K, gl.SliceLayout(1, LAYOUT), assert_trivial=True)[:, None]
        _bring_all(
            dy_ptr, x_ptr, dsum_ptr, dy_stride, x_stride, dsum_stride, start + (STAGES - 1) * step, R,
            base + before * (OPERANDS * ROW), full + 8 * before, K, ROWS, WIDTH, OPERANDS, ROW, ONCE,
        )  # fmt: skip
        if ROWS > 1 and start + step >= R:  # as soon as the first turn, it takes up to 4 % longer
            gdc_launch_dependents()
        dx_row = dx_ptr + row[:, None].to(gl.int64) * (K // 2)
        for chunk in gl.static_range(CHUNKS):
            inside = known & (word + chunk * WIDTH < K // 2)
            even = rstd * (low(dys[chunk]) * low(weights[chunk]) - low(xs[chunk]) * rstd * mean)
            odd = rstd * (high(dys[chunk]) * high(weights[chunk]) - high(xs[chunk]) * rstd * mean)
            if dsum_ptr is not None:
                dsum = rows.index(stage * (OPERANDS * CHUNKS) + 2 * CHUNKS + chunk).load(LAYOUT)
                even += low(dsum)
                odd += high(dsum)
            gl.store(dx_row + word + chunk * WIDTH, pack(even, odd), mask=inside)
        before = stage
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    if ROWS == 1:
        gdc_launch_dependents()
    column = gl.arange(0, 2 * WIDTH, gl.SliceLayout(0, COLUMN))
    partial_ptr += gl.program_id(0).to(gl.int64) * K
    for chunk in gl.static_range(CHUNKS):
        terms = gl.reshape(gl.join(evens[chunk], odds[chunk]), (ROWS, 2 * WIDTH))
        sums = gl.sum(gl.convert_layout(terms, COLUMN), 0)  # a thread has a column
        gl.store(partial_ptr + chunk * 2 * WIDTH + column, sums, mask=column < K - chunk * 2 * WIDTH)
    rows._keep_alive()  # nothing else may lie where barriers are


@launched
@triton.jit(do_not_specialize=["P"])
def _sum_programs_kernel(partial_ptr, out_ptr, P, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    gdc_wait()
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for part in tl.static_range(PARTS):
        row = part * ROWS + tl.arange(0, ROWS)
        inside = (row[:, None] < P) & (column[None, :] < K)
        total += tl.load(partial_ptr + row[:, None] * K + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=column < K)


def rms_norm_backward(
    dy_RK: Tensor, x_RK: Tensor, weight_K: Tensor, rstd_R: Tensor, dsum_RK: Tensor | None, out: tuple[Tensor, Tensor]
) -> None:
    """Launcher of `dsv3c::rms_norm_backward`."""
    dx_RK, dweight_K = out
    R, K = dx_RK.shape
    if dx_RK.numel() == 0:
        dweight_K.zero_()
        return
    each, rows, width, stages = _program(K, dsum_RK is not None)
    most = each * multiprocessors()
    programs = min(ceil_div(R, rows), most)
    partial = x_RK.new_empty((programs, K), dtype=torch.float32)
    dy, x, dsum = (None if t is None else aligned(t).view(torch.int32) for t in (dy_RK, x_RK, dsum_RK))
    _norm_backward_kernel[(programs,)](
        dy, x, as_words(weight_K), rstd_R.contiguous(), dsum, as_words(dx_RK), partial, R, dy.stride(0), x.stride(0),
        0 if dsum is None else dsum.stride(0), K, rows, width, stages, K < WIDE, num_warps=WARPS,
    )  # fmt: skip
    columns = 32 if most * 32 <= PARTS * SUMMED else 16  # by `most`: any number of rows has one kernel
    _sum_programs_kernel[(ceil_div(K, columns),)](
        partial, dweight_K, programs, K, SUMMED // columns, columns, ceil_div(most * columns, SUMMED),
        num_warps=8, launch_pdl=True,
    )  # fmt: skip


def _program(K: int, add: bool) -> tuple[int, int, int, int]:
    """Programs of a multiprocessor; rows of a turn, words of a chunk, and turns whose rows there is room for."""
    if K <= 512 and not add:
        return 2, 8, 256, 3
    rows, turns = next((rows, turns) for most, rows, turns in TURNS if most >= K)
    width = 256 if rows > 2 else 512
    turn = (3 if add else 2) * rows * 4 * ceil_div(K // 2, width) * width
    return 1, rows, width, min(turns, SHARED // turn)


def variants() -> Iterator[Variant]:
    for K, add in ((7168, False), (7168, True), (2048, True), (1536, False), (1536, True), (512, False)):
        _, rows, width, stages = _program(K, add)
        yield Variant(
            _norm_backward_kernel,
            {"dy_ptr": I32, "x_ptr": I32, "weight_ptr": I32, "rstd_ptr": F32, "dx_ptr": I32, "partial_ptr": F32}
            | ({"dsum_ptr": I32} if add else {}),
            {"K": K, "ROWS": rows, "WIDTH": width, "STAGES": stages, "ONCE": K < WIDE}
            | ({} if add else {"dsum_ptr": None}),
            num_warps=WARPS,
        )
    for columns, parts in ((16, 5), (32, 5)):  # of 264 and 132 programs
        yield Variant(
            _sum_programs_kernel,
            {"partial_ptr": F32, "out_ptr": F32},
            {"ROWS": SUMMED // columns, "COLUMNS": columns, "PARTS": parts},
            num_warps=8,
        )
