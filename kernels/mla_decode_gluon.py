import torch
import triton
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

from dsv3c.kernels.mla_decode import LOG2_E, ROWS, combine
from dsv3c.kernels.reference.mla_decode import RANK
from dsv3c.numerics import ceil_div


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _load(
    q_desc, q_rope_desc, k_desc, k_rope_desc, table_ptr, lengths_ptr, q_l, q_r, q_t, k_l, k_r, k_t, q_full, q_empty,
    full_l, full_r, empty_l, empty_r, R, max_pages, tile, unit, stop, b, start,
):  # fmt: skip
    it = 0
    segment = 0
    while unit < stop:
        length = gl.load(lengths_ptr + b)
        end = start + gl.maximum(gl.cdiv(length, 128), 1)
        row = b * R + tile * 64
        mbarrier.wait(q_empty, (segment & 1) ^ 1)
        mbarrier.expect(q_full, 64 * 576 * 2)
        tma.async_copy_global_to_shared(q_desc, [row, 0], q_full, q_l)
        tma.async_copy_global_to_shared(q_desc, [row, 256], q_full, q_r)
        tma.async_copy_global_to_shared(q_rope_desc, [row, 512], q_full, q_t)
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
            mbarrier.expect(full_l.index(0), 64 * 256 * 2)
            tma.async_copy_global_to_shared(k_desc, [row0, 0], full_l.index(0), k_l.index(0))
            mbarrier.wait(empty_r.index(1), phase)
            mbarrier.expect(full_r.index(1), 64 * 256 * 2)
            tma.async_copy_global_to_shared(k_desc, [row1, 256], full_r.index(1), k_r.index(1))
            mbarrier.wait(empty_r.index(0), phase)
            mbarrier.expect(full_r.index(0), 64 * 320 * 2)
            tma.async_copy_global_to_shared(k_desc, [row0, 256], full_r.index(0), k_r.index(0))
            tma.async_copy_global_to_shared(k_rope_desc, [row0, 512], full_r.index(0), k_t.index(0))
            mbarrier.wait(empty_l.index(1), phase)
            mbarrier.expect(full_l.index(1), 64 * 320 * 2)
            tma.async_copy_global_to_shared(k_desc, [row1, 0], full_l.index(1), k_l.index(1))
            tma.async_copy_global_to_shared(k_rope_desc, [row1, 512], full_l.index(1), k_t.index(1))
            row0 = next0
            row1 = next1
            it += 1
        segment += 1
        start = end
        unit = end
        b += 1


@gluon.jit
def _scores(q_a, k_a, full_a, q_b, k_b, full_b, q_t, k_t, phase, S: gl.constexpr):
    s = gl.zeros([64, 64], gl.float32, S)
    mbarrier.wait(full_a, phase)
    s = warpgroup_mma(q_a, k_a.permute((1, 0)), s, use_acc=False, is_async=True)
    mbarrier.wait(full_b, phase)
    s = warpgroup_mma(q_b, k_b.permute((1, 0)), s, is_async=True)
    s = warpgroup_mma(q_t, k_t.permute((1, 0)), s, is_async=True)
    return warpgroup_mma_wait(0, deps=[s])


@gluon.jit
def _mask(s, key, seen_first, tile, H, S: gl.constexpr):
    """-inf for keys that a row does not see; `key` is the first."""
    rows = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, S))
    keys = key + gl.arange(0, 64, gl.SliceLayout(0, S))
    seen = seen_first + rows // H
    return gl.where(gl.expand_dims(keys, 0) < gl.expand_dims(seen, 1), s, float("-inf"))


@gluon.jit
def _clean(k, valid):
    """Zeros in rows of k [64, 256] from `valid` on."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, L)), 1)
    for c in gl.static_range(4):
        part = k.slice(c * 64, 64, dim=1)
        x = part.load(L)
        part.store(gl.where(rows < valid, x, gl.zeros_like(x)))
    fence_async_shared()


@gluon.jit
def _safe(m):
    return gl.where(m == float("-inf"), 0.0, m)


@gluon.jit
def _store(acc, m, l, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, whole, row_out, row_partial, valid, column,
           O: gl.constexpr, FIRST: gl.constexpr):
    lse = m + gl.log2(l)
    acc = acc / gl.expand_dims(gl.where(l == 0.0, 1.0, l), 1)
    rows = gl.arange(0, 64, gl.SliceLayout(1, O))
    columns = column + gl.expand_dims(gl.arange(0, 256, gl.SliceLayout(0, O)), 0)
    offsets = gl.expand_dims(rows, 1) * 512 + columns
    if whole:
        inside = rows < valid
        gl.store(out_ptr + row_out * 512 + offsets, acc.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(inside, 1))
        if FIRST:
            gl.store(lse_ptr + row_out + rows, lse / 1.4426950408889634, mask=inside)
    else:
        gl.store(partial_ptr + row_partial * 512 + offsets, acc)
        if FIRST:
            gl.store(partial_lse_ptr + row_partial + rows, lse)


@gluon.jit
def _even(
    lengths_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, q_l, q_r, q_t, k_l, k_r, k_t, stats, q_full, q_empty,
    full_l, full_r, empty_l, ready, T, H, scale, group, tile, unit, stop, b, start,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    row: gl.constexpr = gl.SliceLayout(1, S)
    R = T * H
    it = 0
    segment = 0
    while unit < stop:
        length = gl.load(lengths_ptr + b)
        end = start + gl.maximum(gl.cdiv(length, 128), 1)
        seen_first = length - T + 1
        acc = gl.zeros([64, 256], gl.float32, O)
        m = gl.full([64], float("-inf"), gl.float32, row)
        l = gl.full([64], 0.0, gl.float32, row)
        mbarrier.wait(q_full, segment & 1)
        first = unit - start
        last = gl.minimum(stop, end) - start
        for u in range(first, last):
            phase = it & 1
            s = _scores(q_l, k_l.index(0), full_l.index(0), q_r, k_r.index(0), full_r.index(0), q_t, k_t.index(0), phase, S)
            mbarrier.arrive(q_empty, count=1, pred=u == last - 1)
            s = s * scale
            edge = (u + 1) * 128 > seen_first
            if edge:
                s = _mask(s, u * 128, seen_first, tile, H, S)
            m_a = gl.maximum(m, gl.max(s, 1))
            stats.index(0).store(m_a)
            mbarrier.arrive(ready.index(0), count=1)
            safe = _safe(m_a)
            p = gl.exp2(s - gl.expand_dims(safe, 1))
            alpha = gl.exp2(m - safe)
            l = l * alpha + gl.sum(p, 1)
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, O)), 1)
            if edge:
                _clean(k_l.index(0), length - u * 128)
            p16 = p.to(gl.bfloat16)
            p_a = gl.convert_layout(p16, gl.DotOperandLayout(0, O, 2))
            acc = warpgroup_mma(p_a, k_l.index(0), acc, is_async=True)
            mbarrier.wait(ready.index(1), phase)
            m = stats.index(1).load(row)
            beta = gl.exp2(m_a - _safe(m))
            k_t.index(0).store((p16.to(gl.float32) * gl.expand_dims(beta, 1)).to(gl.bfloat16))
            fence_async_shared()
            mbarrier.arrive(ready.index(2), count=1)
            l = l * beta
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty_l.index(0), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(beta, gl.SliceLayout(1, O)), 1)
            if edge:
                _clean(k_l.index(1), length - u * 128 - 64)
            acc = warpgroup_mma(k_t.index(1), k_l.index(1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty_l.index(1), count=1)
            it += 1
        stats.index(2).store(l)
        mbarrier.arrive(ready.index(3), count=1)
        mbarrier.wait(ready.index(4), segment & 1)
        l += stats.index(3).load(row)
        m_o = gl.convert_layout(m, gl.SliceLayout(1, O))
        l_o = gl.convert_layout(l, gl.SliceLayout(1, O))
        row_partial = (group * 2 + (unit == start).to(gl.int32)).to(gl.int64) * (gl.cdiv(R, 64) * 64) + tile * 64
        _store(acc, m_o, l_o, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, (unit == start) & (end <= stop),
               b.to(gl.int64) * R + tile * 64, row_partial, R - tile * 64, 0, O, True)
        segment += 1
        start = end
        unit = end
        b += 1


@gluon.jit
def _odd(
    lengths_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, q_l, q_r, q_t, k_l, k_r, k_t, stats, q_full, q_empty,
    full_l, full_r, empty_r, ready, T, H, scale, group, tile, unit, stop, b, start,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    row: gl.constexpr = gl.SliceLayout(1, S)
    R = T * H
    it = 0
    segment = 0
    while unit < stop:
        length = gl.load(lengths_ptr + b)
        end = start + gl.maximum(gl.cdiv(length, 128), 1)
        seen_first = length - T + 1
        acc = gl.zeros([64, 256], gl.float32, O)
        m = gl.full([64], float("-inf"), gl.float32, row)
        l = gl.full([64], 0.0, gl.float32, row)
        mbarrier.wait(q_full, segment & 1)
        first = unit - start
        last = gl.minimum(stop, end) - start
        for u in range(first, last):
            phase = it & 1
            s = _scores(q_r, k_r.index(1), full_r.index(1), q_l, k_l.index(1), full_l.index(1), q_t, k_t.index(1), phase, S)
            mbarrier.arrive(q_empty, count=1, pred=u == last - 1)
            s = s * scale
            edge = (u + 1) * 128 > seen_first
            if edge:
                s = _mask(s, u * 128 + 64, seen_first, tile, H, S)
            m_b = gl.max(s, 1)
            mbarrier.wait(ready.index(0), phase)
            m_b = gl.maximum(m_b, stats.index(0).load(row))
            stats.index(1).store(m_b)
            safe = _safe(m_b)
            p = gl.exp2(s - gl.expand_dims(safe, 1))
            p16 = p.to(gl.bfloat16)
            k_t.index(1).store(p16)
            fence_async_shared()
            mbarrier.arrive(ready.index(1), count=1)
            alpha = gl.exp2(m - safe)
            m = m_b
            l = l * alpha + gl.sum(p, 1)
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, O)), 1)
            if edge:
                _clean(k_r.index(1), length - u * 128 - 64)
            p_b = gl.convert_layout(p16, gl.DotOperandLayout(0, O, 2))
            acc = warpgroup_mma(p_b, k_r.index(1), acc, is_async=True)
            mbarrier.wait(ready.index(2), phase)
            if edge:
                _clean(k_r.index(0), length - u * 128)
            acc = warpgroup_mma(k_t.index(0), k_r.index(0), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty_r.index(1), count=1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty_r.index(0), count=1)
            it += 1
        stats.index(3).store(l)
        mbarrier.arrive(ready.index(4), count=1)
        mbarrier.wait(ready.index(3), segment & 1)
        l += stats.index(2).load(row)
        m_o = gl.convert_layout(m, gl.SliceLayout(1, O))
        l_o = gl.convert_layout(l, gl.SliceLayout(1, O))
        row_partial = (group * 2 + (unit == start).to(gl.int32)).to(gl.int64) * (gl.cdiv(R, 64) * 64) + tile * 64
        _store(acc, m_o, l_o, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, (unit == start) & (end <= stop),
               b.to(gl.int64) * R + tile * 64, row_partial, R - tile * 64, 256, O, False)
        segment += 1
        start = end
        unit = end
        b += 1


@gluon.jit(do_not_specialize=["B", "max_pages"])
def _mla_decode_ws_kernel(
    q_desc, q_rope_desc, k_desc, k_rope_desc, table_ptr, lengths_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, B,
    T, H, max_pages, scale, BATCH: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    R = T * H
    tiles = gl.cdiv(R, 64)
    group = gl.program_id(0) // tiles
    tile = gl.program_id(0) % tiles
    batch = gl.arange(0, BATCH, L)
    units = gl.maximum(gl.cdiv(gl.load(lengths_ptr + batch, mask=batch < B, other=0), 128), 1)
    units = gl.where(batch < B, units, 0)
    ends = gl.associative_scan(units, 0, _add)
    total = gl.sum(units, 0)
    span = gl.cdiv(total, gl.num_programs(0) // tiles)
    unit = group * span
    stop = gl.minimum(unit + span, total)
    b = gl.sum((ends <= unit).to(gl.int32), 0)
    start = gl.max(gl.where(ends <= unit, ends, 0), 0)

    q_l = gl.allocate_shared_memory(gl.bfloat16, [64, 256], q_desc.layout)
    q_r = gl.allocate_shared_memory(gl.bfloat16, [64, 256], q_desc.layout)
    q_t = gl.allocate_shared_memory(gl.bfloat16, [64, 64], q_desc.layout)
    k_l = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], k_desc.layout)
    k_r = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], k_desc.layout)
    k_t = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], k_desc.layout)
    stats = gl.allocate_shared_memory(gl.float32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    full_l = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    full_r = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    empty_l = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    empty_r = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    ready = gl.allocate_shared_memory(gl.int64, [5, 1], bar)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(2):
        mbarrier.init(full_l.index(i), count=1)
        mbarrier.init(full_r.index(i), count=1)
        mbarrier.init(empty_l.index(i), count=1)
        mbarrier.init(empty_r.index(i), count=1)
    for i in gl.static_range(5):
        mbarrier.init(ready.index(i), count=1)
    gl.warp_specialize([
        (_even, (lengths_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, q_l, q_r, q_t, k_l, k_r, k_t, stats, q_full,
                 q_empty, full_l, full_r, empty_l, ready, T, H, scale, group, tile, unit, stop, b, start)),
        (_odd, (lengths_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, q_l, q_r, q_t, k_l, k_r, k_t, stats, q_full,
                q_empty, full_l, full_r, empty_r, ready, T, H, scale, group, tile, unit, stop, b, start)),
        (_load, (q_desc, q_rope_desc, k_desc, k_rope_desc, table_ptr, lengths_ptr, q_l, q_r, q_t, k_l, k_r, k_t, q_full,
                 q_empty, full_l, full_r, empty_l, empty_r, R, max_pages, tile, unit, stop, b, start)),
    ], [4, 4], [240, 24])  # fmt: skip


def launch(q, cache, block_table, lengths, softmax_scale, out) -> None:
    out, lse = out
    B, T, H, _ = q.shape
    if out.numel() == 0:
        return
    R = T * H
    tiles = ceil_div(R, ROWS)
    groups = max(torch.cuda.get_device_properties(q.device).multi_processor_count // tiles, 1)
    partial = q.new_empty((groups, 2, tiles * ROWS, RANK), dtype=torch.float32)
    partial_lse = q.new_empty((groups, 2, tiles * ROWS), dtype=torch.float32)
    batch = triton.next_power_of_2(B)
    q, cache, block_table, lengths = (x.contiguous() for x in (q, cache, block_table, lengths))
    q_rows, k_rows = q.view(-1, 576), cache.view(-1, 576)
    wide = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    descs = [TensorDescriptor.from_tensor(x, [64, n], wide) for x in (q_rows, k_rows) for n in (256, 64)]
    _mla_decode_ws_kernel[(groups * tiles,)](
        *descs, block_table, lengths, out, lse, partial, partial_lse, B, T, H, block_table.shape[1],
        softmax_scale * LOG2_E, batch, num_warps=4,
    )  # fmt: skip
    combine(partial, partial_lse, lengths, out, lse, B, R, groups, batch)
