import torch
import triton
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

from dsv3c.kernels.mla_decode import LOG2_E, ROWS, combine
from dsv3c.kernels.reference.mla_decode import RANK
from dsv3c.numerics import ceil_div

BOX = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
S = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
O = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
P = gl.constexpr(gl.DotOperandLayout(0, O, 2))
Q = gl.constexpr(gl.DotOperandLayout(0, S, 2))
ROW = gl.constexpr(gl.SliceLayout(1, S))
ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _columns(desc, row, column, bar, buffer, COUNT: gl.constexpr):
    for i in gl.static_range(COUNT):
        tma.async_copy_global_to_shared(desc, [row, column + 64 * i], bar, buffer.slice(64 * i, 64, dim=1))


@gluon.jit
def _half(desc, row, column, full, first: gl.constexpr, buffer, CHUNK: gl.constexpr):
    for i in gl.static_range(256 // CHUNK):
        mbarrier.expect(full.index(first + i), 64 * CHUNK * 2)
        _columns(desc, row, column + CHUNK * i, full.index(first + i), buffer.slice(CHUNK * i, CHUNK, dim=1), CHUNK // 64)


@gluon.jit
def _load(q_desc, cache_desc, table_ptr, lengths_ptr, R, max_pages, q, k, q_bars, bars, tile, unit, stop, b, start, CHUNK: gl.constexpr):
    q_l, q_r, q_t = q
    k_l, k_r, k_t = k
    q_full, q_empty = q_bars
    full_l, full_r, full_t, empty_l, empty_r, ready = bars
    N: gl.constexpr = 256 // CHUNK
    it = 0
    segment = 0
    while unit < stop:
        length = gl.load(lengths_ptr + b)
        end = start + gl.maximum(gl.cdiv(length, 128), 1)
        row = b * R + tile * 64
        mbarrier.wait(q_empty, (segment & 1) ^ 1)
        mbarrier.expect(q_full, 64 * 576 * 2)
        _columns(q_desc, row, 0, q_full, q_l, 4)
        _columns(q_desc, row, 256, q_full, q_r, 4)
        _columns(q_desc, row, 512, q_full, q_t, 1)
        last = gl.maximum(gl.cdiv(length, 64), 1) - 1
        pages_ptr = table_ptr + b.to(gl.int64) * max_pages
        i = (unit - start) * 2
        row0 = gl.load(pages_ptr + i) * 64
        row1 = gl.load(pages_ptr + gl.minimum(i + 1, last)) * 64
        for u in range(unit - start, gl.minimum(stop, end) - start):
            next0 = gl.load(pages_ptr + gl.minimum(2 * u + 2, last)) * 64
            next1 = gl.load(pages_ptr + gl.minimum(2 * u + 3, last)) * 64
            phase = (it & 1) ^ 1
            mbarrier.wait(empty_l.index(0), phase)
            _half(cache_desc, row0, 0, full_l, 0, k_l.index(0), CHUNK)
            mbarrier.wait(empty_r.index(0), phase)
            mbarrier.expect(full_t.index(0), 64 * 64 * 2)
            _columns(cache_desc, row0, 512, full_t.index(0), k_t.index(0), 1)
            _half(cache_desc, row0, 256, full_r, 0, k_r.index(0), CHUNK)
            mbarrier.wait(empty_r.index(1), phase)
            _half(cache_desc, row1, 256, full_r, N, k_r.index(1), CHUNK)
            mbarrier.wait(empty_l.index(1), phase)
            mbarrier.expect(full_t.index(1), 64 * 64 * 2)
            _columns(cache_desc, row1, 512, full_t.index(1), k_t.index(1), 1)
            _half(cache_desc, row1, 0, full_l, N, k_l.index(1), CHUNK)
            row0 = next0
            row1 = next1
            it += 1
        segment += 1
        start = end
        unit = end
        b += 1


@gluon.jit
def _dot(s, q, k, full, first: gl.constexpr, phase, CHUNK: gl.constexpr):
    for i in gl.static_range(256 // CHUNK):
        mbarrier.wait(full.index(first + i), phase)
        part = k.slice(CHUNK * i, CHUNK, dim=1)
        s = warpgroup_mma(q.slice(CHUNK * i, CHUNK, dim=1), part.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _mask(s, key, seen_first, tile, H):
    """-inf for keys that a row does not see; `key` is the first."""
    rows = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, S))
    keys = key + gl.arange(0, 64, gl.SliceLayout(0, S))
    seen = seen_first + rows // H
    return gl.where(gl.expand_dims(keys, 0) < gl.expand_dims(seen, 1), s, float("-inf"))


@gluon.jit
def _clean(v, valid):
    """Zeros in rows of v [64, 256] from `valid` on."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, L)), 1)
    for c in gl.static_range(4):
        part = v.slice(c * 64, 64, dim=1)
        x = part.load(L)
        part.store(gl.where(rows < valid, x, gl.zeros_like(x)))
    fence_async_shared()


@gluon.jit
def _safe(m):
    return gl.where(m == float("-inf"), 0.0, m)


@gluon.jit
def _raise(m, top, LAZY: gl.constexpr):
    """The reference of exponents after a tile with maxima `top`, and whether any row's has changed."""
    if LAZY:
        higher = top > m + 8.0
        return gl.where(higher, top, m), gl.max(higher.to(gl.int32), 0)
    else:
        return gl.maximum(m, top), 1


@gluon.jit
def _rescale(acc, factor, changed, LAZY: gl.constexpr):
    if LAZY:
        if changed != 0:
            acc = acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, O)), 1)
    else:
        acc = acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, O)), 1)
    return acc


@gluon.jit
def _publish(p, m, changed, p_buf, m_buf, changed_buf, bar, LAZY: gl.constexpr):
    p_buf.store(p)
    m_buf.store(m)
    if LAZY:
        changed_buf.store(gl.full([1], changed, gl.int32, ONE))
    fence_async_shared()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def _attend(
    lengths_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, T, H, scale, q, k, stats, flags, q_bars, bars, group, tile, unit,
    stop, b, start, ODD: gl.constexpr, CHUNK: gl.constexpr, LAZY: gl.constexpr, RQ: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    q_l, q_r, q_t = q
    k_l, k_r, k_t = k
    q_full, q_empty = q_bars
    full_l, full_r, full_t, empty_l, empty_r, ready = bars
    N: gl.constexpr = 256 // CHUNK
    if ODD:
        v, empty = k_r, empty_r
    else:
        v, empty = k_l, empty_l
    R = T * H
    it = 0
    segment = 0
    while unit < stop:
        length = gl.load(lengths_ptr + b)
        end = start + gl.maximum(gl.cdiv(length, 128), 1)
        seen_first = length - T + 1
        acc = gl.zeros([64, 256], gl.float32, O)
        m = gl.full([64], float("-inf"), gl.float32, ROW)
        l = gl.full([64], 0.0, gl.float32, ROW)
        mbarrier.wait(q_full, segment & 1)
        if RQ:
            q_rope = q_t.load(Q)
        else:
            q_rope = q_t
        last = gl.minimum(stop, end) - start
        for u in range(unit - start, last):
            phase = it & 1
            s = gl.zeros([64, 64], gl.float32, S)
            if ODD:
                s = _dot(s, q_r, k_r.index(1), full_r, N, phase, CHUNK)
                mbarrier.wait(full_t.index(1), phase)
                s = warpgroup_mma(q_rope, k_t.index(1).permute((1, 0)), s, is_async=True)
                s = _dot(s, q_l, k_l.index(1), full_l, N, phase, CHUNK)
            else:
                zero = gl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [it], dtype=gl.int32, is_pure=False, pack=1)
                s = _dot(s, q_l, k_l.index(zero), full_l, 0, phase, CHUNK)
                mbarrier.wait(full_t.index(0), phase)
                s = warpgroup_mma(q_rope, k_t.index(zero).permute((1, 0)), s, is_async=True)
                s = _dot(s, q_r, k_r.index(zero), full_r, 0, phase, CHUNK)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(q_empty, count=1, pred=u == last - 1)
            edge = (u + 1) * 128 > seen_first
            if edge:
                s = _mask(s, u * 128 + 64 * ODD, seen_first, tile, H)
            top = gl.max(s, 1) * scale
            if ODD:
                mbarrier.wait(ready.index(0), phase)
                m0 = stats.index(0).load(ROW)
                changed = 1
                if LAZY:
                    changed = gl.max(flags.index(0).load(ONE), 0)
            else:
                m0, changed = _raise(m, top, LAZY)
                p = gl.exp2(s * scale - gl.expand_dims(_safe(m0), 1))
                p16 = p.to(gl.bfloat16)
                _publish(p16, m0, changed, k_t.index(0), stats.index(0), flags.index(0), ready.index(0), LAZY)
            alpha = gl.exp2(m - _safe(m0))
            if ODD and ORDER:
                m1, changed1 = _raise(m0, top, LAZY)
                p = gl.exp2(s * scale - gl.expand_dims(_safe(m1), 1))
                p16 = p.to(gl.bfloat16)
                _publish(p16, m1, changed1, k_t.index(1), stats.index(1), flags.index(1), ready.index(1), LAZY)
            acc = _rescale(acc, alpha, changed, LAZY)
            l = l * alpha
            if edge:
                _clean(v.index(0), length - u * 128)
            if ODD:
                acc = warpgroup_mma(k_t.index(0), v.index(0), acc, is_async=True)
                if not ORDER:
                    m1, changed1 = _raise(m0, top, LAZY)
                    p = gl.exp2(s * scale - gl.expand_dims(_safe(m1), 1))
                    p16 = p.to(gl.bfloat16)
                    _publish(p16, m1, changed1, k_t.index(1), stats.index(1), flags.index(1), ready.index(1), LAZY)
            else:
                acc = warpgroup_mma(gl.convert_layout(p16, P), v.index(0), acc, is_async=True)
                l += gl.sum(p, 1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(0), count=1)
            if not ODD:
                mbarrier.wait(ready.index(1), phase)
                m1 = stats.index(1).load(ROW)
                changed1 = 1
                if LAZY:
                    changed1 = gl.max(flags.index(1).load(ONE), 0)
            beta = gl.exp2(m0 - _safe(m1))
            acc = _rescale(acc, beta, changed1, LAZY)
            l = l * beta
            if edge:
                _clean(v.index(1), length - u * 128 - 64)
            if ODD:
                acc = warpgroup_mma(gl.convert_layout(p16, P), v.index(1), acc, is_async=True)
                l += gl.sum(p, 1)
            else:
                acc = warpgroup_mma(k_t.index(1), v.index(1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(1), count=1)
            m = m1
            it += 1
        stats.index(2 + ODD).store(l)
        mbarrier.arrive(ready.index(2 + ODD), count=1)
        mbarrier.wait(ready.index(3 - ODD), segment & 1)
        l += stats.index(3 - ODD).load(ROW)
        m_o = gl.convert_layout(m, gl.SliceLayout(1, O))
        l_o = gl.convert_layout(l, gl.SliceLayout(1, O))
        lse = m_o + gl.log2(l_o)
        acc = acc / gl.expand_dims(gl.where(l_o == 0.0, 1.0, l_o), 1)
        rows = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, O))
        columns = 256 * ODD + gl.expand_dims(gl.arange(0, 256, gl.SliceLayout(0, O)), 0)
        if (unit == start) & (end <= stop):
            row = b.to(gl.int64) * R + rows
            inside = rows < R
            gl.store(out_ptr + gl.expand_dims(row, 1) * 512 + columns, acc.to(gl.bfloat16), mask=gl.expand_dims(inside, 1))
            if not ODD:
                gl.store(lse_ptr + row, lse / 1.4426950408889634, mask=inside)
        else:
            row = (group * 2 + (unit == start).to(gl.int32)).to(gl.int64) * (gl.cdiv(R, 64) * 64) + rows
            gl.store(partial_ptr + gl.expand_dims(row, 1) * 512 + columns, acc)
            if not ODD:
                gl.store(partial_lse_ptr + row, lse)
        segment += 1
        start = end
        unit = end
        b += 1


@gluon.jit(do_not_specialize=["B", "max_pages"])
def _mla_decode_ws_kernel(
    q_desc, cache_desc, table_ptr, lengths_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, B,
    T, H, max_pages, scale, BATCH: gl.constexpr, CHUNK: gl.constexpr = 128, LAZY: gl.constexpr = False, RQ: gl.constexpr = False, ORDER: gl.constexpr = False,
):  # fmt: skip
    R = T * H
    tiles = gl.cdiv(R, 64)
    group = gl.program_id(0) // tiles
    tile = gl.program_id(0) % tiles
    batch = gl.arange(0, BATCH, ONE)
    units = gl.maximum(gl.cdiv(gl.load(lengths_ptr + batch, mask=batch < B, other=0), 128), 1)
    ends = gl.associative_scan(gl.where(batch < B, units, 0), 0, _add)
    total = gl.max(ends, 0)
    span = gl.cdiv(total, gl.num_programs(0) // tiles)
    unit = group * span
    stop = gl.minimum(unit + span, total)
    b = gl.sum((ends <= unit).to(gl.int32), 0)
    start = gl.max(gl.where(ends <= unit, ends, 0), 0)

    q_l = gl.allocate_shared_memory(gl.bfloat16, [64, 256], q_desc.layout)
    q_r = gl.allocate_shared_memory(gl.bfloat16, [64, 256], q_desc.layout)
    q_t = gl.allocate_shared_memory(gl.bfloat16, [64, 64], q_desc.layout)
    k_l = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], q_desc.layout)
    k_r = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], q_desc.layout)
    k_t = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], q_desc.layout)
    stats = gl.allocate_shared_memory(gl.float32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    flags = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    N: gl.constexpr = 256 // CHUNK
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    full_l = gl.allocate_shared_memory(gl.int64, [2 * N, 1], bar)
    full_r = gl.allocate_shared_memory(gl.int64, [2 * N, 1], bar)
    full_t = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    empty_l = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    empty_r = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    ready = gl.allocate_shared_memory(gl.int64, [4, 1], bar)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(2 * N):
        mbarrier.init(full_l.index(i), count=1)
        mbarrier.init(full_r.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(full_t.index(i), count=1)
        mbarrier.init(empty_l.index(i), count=1)
        mbarrier.init(empty_r.index(i), count=1)
    for i in gl.static_range(4):
        mbarrier.init(ready.index(i), count=1)
    q, k, q_bars = (q_l, q_r, q_t), (k_l, k_r, k_t), (q_full, q_empty)
    bars = full_l, full_r, full_t, empty_l, empty_r, ready
    gl.warp_specialize([
        (_attend, (lengths_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, T, H, scale, q, k, stats, flags, q_bars, bars,
                   group, tile, unit, stop, b, start, 0, CHUNK, LAZY, RQ, ORDER)),
        (_attend, (lengths_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, T, H, scale, q, k, stats, flags, q_bars, bars,
                   group, tile, unit, stop, b, start, 1, CHUNK, LAZY, RQ, ORDER)),
        (_load, (q_desc, cache_desc, table_ptr, lengths_ptr, R, max_pages, q, k, q_bars, bars, tile, unit, stop, b, start, CHUNK)),
    ], [4, 1], [240, 24])  # fmt: skip


def launch(q, cache, block_table, lengths, softmax_scale, out, **config) -> None:
    out, lse = out
    B, T, H, _ = q.shape
    if out.numel() == 0:
        return
    R = T * H
    tiles = ceil_div(R, ROWS)
    groups = max(torch.cuda.get_device_properties(q.device).multi_processor_count // tiles, 1)
    partial = q.new_empty((groups, 2, tiles * ROWS, RANK), dtype=torch.float32)
    partial_lse = q.new_empty((groups, 2, tiles * ROWS), dtype=torch.float32)
    batch = max(triton.next_power_of_2(B), 128)
    q, cache, block_table, lengths = (x.contiguous() for x in (q, cache, block_table, lengths))
    descs = [TensorDescriptor.from_tensor(x.view(-1, 576), [64, 64], BOX) for x in (q, cache)]
    _mla_decode_ws_kernel[(groups * tiles,)](
        *descs, block_table, lengths, out, lse, partial, partial_lse, B, T, H, block_table.shape[1],
        softmax_scale * LOG2_E, batch, num_warps=4, **config,
    )  # fmt: skip
    combine(partial, partial_lse, lengths, out, lse, B, R, groups, batch)
