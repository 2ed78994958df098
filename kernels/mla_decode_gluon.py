"""The kernel of `mla_decode.py`: 64 rows' attention to a span of keys, with specialised warps.

One warp loads; two warp groups of 240 registers a thread hold 256 columns of the output each, in 128 registers. They
take keys in units of two tiles of 64: the even group computes scores and probabilities of the first tile, the odd one
of the second, and each hands them to the other through shared memory, over the rope columns of the tile, which nobody
needs by then. Queries and two tiles take 27 buffers of 64×64 numbers; there is no room for a third tile. So both groups
multiply with a tile as soon as its probabilities are there, so that it can be loaded again; its left and right half, as
the group that holds those columns is done with them. Half a tile is waited for in two pieces (H200, 128 heads, batch
128, 16384 keys: 558 TFLOPS; in one piece, 402).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsv3c.kernels.launch import launched

BUFFER = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
OUT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
FLAT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
LANES = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))  # 64 numbers, in each warp all of them
ROW, OUT_ROW = gl.constexpr(gl.SliceLayout(1, SCORES)), gl.constexpr(gl.SliceLayout(1, OUT))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _first_segment(lengths_ptr, B, R, BATCH: gl.constexpr):
    """This program's group, 64 rows and span [unit, stop), and the sequence its span begins in with that one's first
    unit. Empty sequences have a unit, in which their zeros are written."""
    tiles = gl.cdiv(R, 64)
    group, tile = gl.program_id(0) // tiles, gl.program_id(0) % tiles
    batch = gl.arange(0, BATCH, FLAT)
    units = gl.maximum(gl.cdiv(gl.load(lengths_ptr + batch, mask=batch < B, other=0), 128), 1)
    ends = gl.associative_scan(gl.where(batch < B, units, 0), 0, _add)
    stop = gl.max(ends, 0)
    span = gl.cdiv(stop, gl.num_programs(0) // tiles)
    unit = group * span
    begun = ends <= unit
    b, start = gl.sum(begun.to(gl.int32), 0), gl.max(gl.where(begun, ends, 0), 0)
    return group, tile, unit, gl.minimum(unit + span, stop), b, start


@gluon.jit
def _load_columns(desc, row, column, full, buffer, COUNT: gl.constexpr):
    for i in gl.static_range(COUNT // 64):
        tma.async_copy_global_to_shared(desc, [row, column + 64 * i], full, buffer.slice(64 * i, 64, dim=1))


@gluon.jit
def _load_half(desc, row, column, full, tile: gl.constexpr, half):
    for i in gl.static_range(2):
        mbarrier.expect(full.index(2 * tile + i), 64 * 128 * 2)
        part = half.index(tile).slice(128 * i, 128, dim=1)
        _load_columns(desc, row, column + 128 * i, full.index(2 * tile + i), part, 128)


@gluon.jit
def _load_rope(desc, row, full, tile: gl.constexpr, rope):
    mbarrier.expect(full.index(tile), 64 * 64 * 2)
    _load_columns(desc, row, 512, full.index(tile), rope.index(tile), 64)


@gluon.jit
def _load(problem, where, buffers, bars, q_desc, cache_desc, table_ptr, max_pages):
    """The loading warp. Pages behind a sequence's end are its last one again."""
    lengths_ptr, T, H, _ = problem
    _, tile, unit, stop, b, start = where
    q_left, q_right, q_rope, left, right, rope, _, _, _ = buffers
    q_full, q_empty, full_left, full_right, full_rope, empty_left, empty_right, _, _ = bars
    first = unit
    segments = 0
    while unit < stop:
        length = gl.load(lengths_ptr + b)
        end = start + gl.maximum(gl.cdiv(length, 128), 1)
        row = (b * T * H) + tile * 64
        mbarrier.wait(q_empty, (segments & 1) ^ 1)
        mbarrier.expect(q_full, 64 * 576 * 2)
        _load_columns(q_desc, row, 0, q_full, q_left.index(0), 256)
        _load_columns(q_desc, row, 256, q_full, q_right.index(0), 256)
        _load_columns(q_desc, row, 512, q_full, q_rope.index(0), 64)
        pages_ptr = table_ptr + b.to(gl.int64) * max_pages
        page, last = (unit - start) * 2, gl.maximum(gl.cdiv(length, 64), 1) - 1
        row0 = gl.load(pages_ptr + page) * 64
        row1 = gl.load(pages_ptr + gl.minimum(page + 1, last)) * 64
        while unit < gl.minimum(stop, end):
            page += 2
            next0 = gl.load(pages_ptr + gl.minimum(page, last)) * 64
            next1 = gl.load(pages_ptr + gl.minimum(page + 1, last)) * 64
            free = ((unit - first) & 1) ^ 1
            mbarrier.wait(empty_left.index(0), free)
            _load_half(cache_desc, row0, 0, full_left, 0, left)
            mbarrier.wait(empty_right.index(0), free)
            _load_rope(cache_desc, row0, full_rope, 0, rope)
            _load_half(cache_desc, row0, 256, full_right, 0, right)
            mbarrier.wait(empty_right.index(1), free)
            _load_half(cache_desc, row1, 256, full_right, 1, right)
            mbarrier.wait(empty_left.index(1), free)
            _load_rope(cache_desc, row1, full_rope, 1, rope)
            _load_half(cache_desc, row1, 0, full_left, 1, left)
            row0 = next0
            row1 = next1
            unit += 1
        segments += 1
        start = end
        b += 1


@gluon.jit
def _dot_half(scores, q, k, full, tile: gl.constexpr, phase):
    for i in gl.static_range(2):
        mbarrier.wait(full.index(2 * tile + i), phase)
        part = k.slice(128 * i, 128, dim=1).permute((1, 0))
        scores = warpgroup_mma(q.slice(128 * i, 128, dim=1), part, scores, is_async=True)
    return scores


@gluon.jit
def _scores(buffers, bars, phase, zero, tile: gl.constexpr):
    """q kᵀ [64, 64] of a tile, its columns in the order in which they come."""
    q_left, q_right, q_rope, left, right, rope, _, _, _ = buffers
    _, _, full_left, full_right, full_rope, _, _, _, _ = bars
    scores = gl.zeros([64, 64], gl.float32, SCORES)
    if tile == 0:
        scores = _dot_half(scores, q_left.index(zero), left.index(zero), full_left, 0, phase)
    else:
        scores = _dot_half(scores, q_right.index(zero), right.index(zero + 1), full_right, 1, phase)
    mbarrier.wait(full_rope.index(tile), phase)
    part = rope.index(zero + tile).permute((1, 0))
    scores = warpgroup_mma(q_rope.index(zero), part, scores, is_async=True)
    if tile == 0:
        scores = _dot_half(scores, q_right.index(zero), right.index(zero), full_right, 0, phase)
    else:
        scores = _dot_half(scores, q_left.index(zero), left.index(zero + 1), full_left, 1, phase)
    return warpgroup_mma_wait(0, deps=[scores])


@gluon.jit
def _mask(scores, key, seen, tile, H):
    """-inf for keys that a row does not see: the first token sees `seen` keys, `key` is the first here."""
    seen += (tile * 64 + gl.arange(0, 64, ROW)) // H
    keys = key + gl.arange(0, 64, gl.SliceLayout(0, SCORES))
    return gl.where(gl.expand_dims(keys, 0) < gl.expand_dims(seen, 1), scores, float("-inf"))


@gluon.jit
def _zero_rows(v, first):
    """Rows of v [64, 256] from `first` on: behind the end may be NaN, which 0 · NaN would spread."""
    rows = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, WIDE)), 1)
    for i in gl.static_range(4):
        part = v.slice(64 * i, 64, dim=1)
        x = part.load(WIDE)
        part.store(gl.where(rows < first, x, gl.zeros_like(x)))
    fence_async_shared()


@gluon.jit
def _reference(m, top):
    """What exponents are relative to, after a tile with maxima `top`, and the rows for which that is new.

    Rescaling 256 columns takes the tensor cores' time, so a row's reference follows its maximum only when that has
    grown by 8: probabilities are then below 2^8, and as exact as below 1.
    """
    higher = top > m + 8.0
    return gl.where(higher, top, m), higher.to(gl.int32)


@gluon.jit
def _finite(m):
    """Rows that have seen no key yet: any number will do for their maximum, but -inf - -inf is NaN."""
    return gl.where(m == float("-inf"), 0.0, m)


@gluon.jit
def _probabilities(scores, m, scale):
    return gl.exp2(scores * scale - gl.expand_dims(_finite(m), 1))


@gluon.jit
def _hand_over(p, p_buffer, m, m_buffer, higher, changes, ready):
    p_buffer.store(p)
    m_buffer.store(m)
    changes.store(higher)
    fence_async_shared()
    mbarrier.arrive(ready, count=1)


@gluon.jit
def _rescale(acc, factor, changes):
    if gl.max(changes.load(LANES), 0) != 0:
        acc = acc * gl.expand_dims(gl.convert_layout(factor, OUT_ROW), 1)
    return acc


@gluon.jit
def _attend(problem, where, buffers, bars, results, ODD: gl.constexpr):
    """A warp group: scores of the tile of its parity, and 256 columns of the output."""
    lengths_ptr, T, H, scale = problem
    group, tile, unit, stop, b, start = where
    _, _, _, left, right, rope, row_max, row_sum, changes = buffers
    q_full, q_empty, _, _, _, empty_left, empty_right, ready, summed = bars
    v, empty = left, empty_left
    if ODD:
        v, empty = right, empty_right
    first = unit
    segments = 0
    while unit < stop:
        length = gl.load(lengths_ptr + b)
        end = start + gl.maximum(gl.cdiv(length, 128), 1)
        seen = length - T + 1
        acc = gl.zeros([64, 256], gl.float32, OUT)
        m = gl.full([64], float("-inf"), gl.float32, ROW)
        total = gl.full([64], 0.0, gl.float32, ROW)
        mbarrier.wait(q_full, segments & 1)
        last = gl.minimum(stop, end) - 1
        for u in range(unit, last + 1):
            phase = (u - first) & 1
            # An index that the compiler cannot see through. Else it computes the descriptors of all operands before the
            # loop, 72 registers, and spills them.
            zero = gl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [u], dtype=gl.int32, is_pure=False, pack=1)
            one = zero + 1
            key = (u - start) * 128
            edge = key + 128 > seen
            scores = _scores(buffers, bars, phase, zero, ODD)
            mbarrier.arrive(q_empty, count=1, pred=u == last)
            if edge:
                scores = _mask(scores, key + 64 * ODD, seen, tile, H)
            top = gl.max(scores, 1) * scale
            # The first tile: the even group's probabilities.
            if ODD:
                mbarrier.wait(ready.index(0), phase)
                m0 = row_max.index(zero).load(ROW)
            else:
                m0, higher = _reference(m, top)
                p = _probabilities(scores, m0, scale)
                p_bf16 = p.to(gl.bfloat16)
                _hand_over(
                    p_bf16, rope.index(zero), m0, row_max.index(zero), higher, changes.index(zero), ready.index(0)
                )
            factor = gl.exp2(m - _finite(m0))
            acc = _rescale(acc, factor, changes.index(zero))
            total = total * factor
            if edge:
                _zero_rows(v.index(zero), length - key)
            if ODD:
                acc = warpgroup_mma(rope.index(zero), v.index(zero), acc, is_async=True)
                m, higher = _reference(m0, top)
                p = _probabilities(scores, m, scale)
                p_bf16 = p.to(gl.bfloat16)
                _hand_over(p_bf16, rope.index(one), m, row_max.index(one), higher, changes.index(one), ready.index(1))
            else:
                operand = gl.convert_layout(p_bf16, gl.DotOperandLayout(0, OUT, 2))
                acc = warpgroup_mma(operand, v.index(zero), acc, is_async=True)
                total += gl.sum(p, 1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(0), count=1)
            # The second tile: the odd group's.
            if not ODD:
                mbarrier.wait(ready.index(1), phase)
                m = row_max.index(one).load(ROW)
            factor = gl.exp2(m0 - _finite(m))
            acc = _rescale(acc, factor, changes.index(one))
            total = total * factor
            if edge:
                _zero_rows(v.index(one), length - key - 64)
            if ODD:
                operand = gl.convert_layout(p_bf16, gl.DotOperandLayout(0, OUT, 2))
                acc = warpgroup_mma(operand, v.index(one), acc, is_async=True)
                total += gl.sum(p, 1)
            else:
                acc = warpgroup_mma(rope.index(one), v.index(one), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(1), count=1)
        row_sum.index(ODD).store(total)
        mbarrier.arrive(summed.index(ODD), count=1)
        mbarrier.wait(summed.index(1 - ODD), segments & 1)
        total += row_sum.index(1 - ODD).load(ROW)
        whole = (unit == start) & (end <= stop)
        slot = group * 2 + (unit == start).to(gl.int32)
        _store(acc, m, total, results, b, slot, tile, T * H, whole, ODD)
        segments += 1
        start = end
        unit = end
        b += 1


@gluon.jit
def _store(acc, m, total, results, b, slot, tile, R, whole, ODD: gl.constexpr):
    """To the output if it is whole, else to the partial results."""
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr = results
    m, total = gl.convert_layout(m, OUT_ROW), gl.convert_layout(total, OUT_ROW)
    lse = m + gl.log2(total)
    acc = acc / gl.expand_dims(gl.where(total == 0.0, 1.0, total), 1)
    rows = tile * 64 + gl.arange(0, 64, OUT_ROW)
    columns = 256 * ODD + gl.expand_dims(gl.arange(0, 256, gl.SliceLayout(0, OUT)), 0)
    if whole:
        row = b.to(gl.int64) * R + rows
        out = acc.to(out_ptr.dtype.element_ty)
        gl.store(out_ptr + gl.expand_dims(row, 1) * 512 + columns, out, mask=gl.expand_dims(rows < R, 1))
        if not ODD:
            gl.store(lse_ptr + row, lse / 1.4426950408889634, mask=rows < R)
    else:
        row = slot.to(gl.int64) * (gl.cdiv(R, 64) * 64) + rows
        gl.store(partial_ptr + gl.expand_dims(row, 1) * 512 + columns, acc)
        if not ODD:
            gl.store(partial_lse_ptr + row, lse)


@gluon.jit
def _barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@launched
@gluon.jit(do_not_specialize=["B", "max_pages"])
def mla_decode_kernel(
    q_desc, cache_desc, table_ptr, lengths_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, B, T, H, max_pages,
    scale, BATCH: gl.constexpr,
):  # fmt: skip
    where = _first_segment(lengths_ptr, B, T * H, BATCH)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffers = (
        gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], q_desc.layout),  # q: left, right, rope
        gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], q_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], q_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], q_desc.layout),  # two tiles of keys, likewise
        gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], q_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], q_desc.layout),
        gl.allocate_shared_memory(gl.float32, [2, 64], flat),  # reference after each tile, sum of each group
        gl.allocate_shared_memory(gl.float32, [2, 64], flat),
        gl.allocate_shared_memory(gl.int32, [2, 64], flat),  # rows whose reference a tile changed
    )
    bars = (
        _barriers(1, 1).index(0), _barriers(1, 2).index(0),  # q: full, empty
        _barriers(4, 1), _barriers(4, 1), _barriers(2, 1),  # keys, full: left and right by 128 columns, rope
        _barriers(2, 1), _barriers(2, 1),  # keys, empty: left and right; rope is with the half that uses it last
        _barriers(2, 1), _barriers(2, 1),  # probabilities and maxima are there; sums are
    )  # fmt: skip
    problem = lengths_ptr, T, H, scale
    results = out_ptr, lse_ptr, partial_ptr, partial_lse_ptr
    gl.warp_specialize(
        [
            (_attend, (problem, where, buffers, bars, results, 0)),
            (_attend, (problem, where, buffers, bars, results, 1)),
            (_load, (problem, where, buffers, bars, q_desc, cache_desc, table_ptr, max_pages)),
        ],
        [4, 1],
        [240, 24],
    )
