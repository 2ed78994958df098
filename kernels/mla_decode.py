"""MLA decode: a few new tokens attend over the paged latent cache, all heads sharing one key of 576 = 512 + 64 numbers
whose first 512 are the value too (definition: `reference/mla_decode.py`).

With 128 heads a key costs 2·128·(576 + 512) operations and 1152 bytes: 242 operations a byte, compute-bound. With 16 heads
(a GPU's share at TP8) it is memory-bound. Rows are (token, head) pairs, R = T·H of them a sequence, 64 a program.

Lengths are known to the device only, so the launch is static: one program a multiprocessor. All sequences' keys, in units
of UNIT, lie behind one another on one axis, which is cut into as many equal spans as there are groups; a group is one
program for each 64 rows, so that those who need a key need it at the same time. A program walks its span, sequence by
sequence, with a running softmax. A sequence that lies in one span is finished there; of the others each program leaves a
partial result, normalised, with its log-sum-exp. A span has at most two of them, since only its ends can cut a
sequence: slot 0 belongs to one that began earlier, slot 1 to one that goes on. A second kernel adds them, in the order
of the groups. Exponentials are base 2.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels.offline import BF16, F32, I32, Variant
from dsv3c.kernels.reference.mla_decode import RANK
from dsv3c.numerics import ceil_div

ROWS, PAGE = 64, 64
UNIT = 2 * PAGE  # keys
LOG2_E = 1.4426950408889634


@triton.jit
def _spans(lengths_ptr, B, groups, UNIT: tl.constexpr, BATCH: tl.constexpr):
    """[BATCH] ends of the sequences on the axis of units, and the length of a span. An empty sequence has a unit."""
    b = tl.arange(0, BATCH)
    units = tl.maximum(tl.cdiv(tl.load(lengths_ptr + b, mask=b < B, other=0), UNIT), 1)
    units = tl.where(b < B, units, 0)
    return tl.cumsum(units, 0), tl.cdiv(tl.sum(units, 0), groups)


@triton.jit
def _tile(q, q_rope, acc, m, l, cache_ptr, table_ptr, block, length, seen, softmax_scale_log2):
    keys = tl.arange(0, 64)
    page = tl.load(table_ptr + block).to(tl.int64)
    inside = (block * 64 + keys < length)[:, None]
    k_ptr = cache_ptr + (page * 64 + keys)[:, None] * 576
    v = tl.load(k_ptr + tl.arange(0, 512)[None, :], mask=inside, other=0.0)
    k_rope = tl.load(k_ptr + 512 + tl.arange(0, 64)[None, :], mask=inside, other=0.0)
    s = tl.dot(q, v.T)
    s = tl.dot(q_rope, k_rope.T, s) * softmax_scale_log2
    s = tl.where((block * 64 + keys)[None, :] < seen[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - safe[:, None])
    alpha = tl.exp2(m - safe)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, m_new, l * alpha + tl.sum(p, 1)


@triton.jit(do_not_specialize=["B", "max_pages"])
def _mla_decode_kernel(
    q_ptr, cache_ptr, table_ptr, lengths_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, B, T, H, max_pages,
    softmax_scale_log2, BATCH: tl.constexpr,
):  # fmt: skip
    R = T * H
    tiles = tl.cdiv(R, 64)
    group, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    ends, span = _spans(lengths_ptr, B, tl.num_programs(0) // tiles, 128, BATCH)
    unit = group * span
    stop = tl.minimum(unit + span, tl.max(ends, 0))
    b = tl.sum((ends <= unit).to(tl.int32), 0)
    start = tl.max(tl.where(ends <= unit, ends, 0), 0)  # of sequence b
    rows, latent, columns = tile * 64 + tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 512)
    while unit < stop:
        length = tl.load(lengths_ptr + b)
        end = start + tl.maximum(tl.cdiv(length, 128), 1)
        q_row = q_ptr + (b.to(tl.int64) * R + rows)[:, None] * 576
        q = tl.load(q_row + columns[None, :], mask=rows[:, None] < R, other=0.0)
        q_rope = tl.load(q_row + 512 + latent[None, :], mask=rows[:, None] < R, other=0.0)
        seen = length - T + 1 + rows // H
        acc = tl.zeros((64, 512), tl.float32)
        m = tl.full((64,), float("-inf"), tl.float32)
        l = tl.zeros((64,), tl.float32)
        last = tl.minimum((tl.minimum(stop, end) - start) * 2, tl.cdiv(length, 64))
        for block in range((unit - start) * 2, last):
            acc, m, l = _tile(
                q, q_rope, acc, m, l, cache_ptr, table_ptr + b.to(tl.int64) * max_pages, block, length, seen,
                softmax_scale_log2,
            )  # fmt: skip
        lse = m + tl.log2(l)
        acc /= tl.where(l == 0.0, 1.0, l)[:, None]
        if (unit == start) & (end <= stop):
            row = b.to(tl.int64) * R + rows
            tl.store(out_ptr + row[:, None] * 512 + columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=rows[:, None] < R)
            tl.store(lse_ptr + row, lse / 1.4426950408889634, mask=rows < R)
        else:
            row = (group * 2 + (unit == start).to(tl.int32)).to(tl.int64) * (tiles * 64) + rows
            tl.store(partial_ptr + row[:, None] * 512 + columns[None, :], acc)
            tl.store(partial_lse_ptr + row, lse)
        start = end
        unit = end
        b += 1


@triton.jit(do_not_specialize=["B", "groups"])
def _combine_kernel(
    partial_ptr, partial_lse_ptr, lengths_ptr, out_ptr, lse_ptr, B, R, groups, BATCH: tl.constexpr, ROWS: tl.constexpr
):
    b = tl.program_id(0)
    ends, span = _spans(lengths_ptr, B, groups, 128, BATCH)
    batch = tl.arange(0, BATCH)
    start = tl.max(tl.where(batch < b, ends, 0), 0)
    end = tl.max(tl.where(batch <= b, ends, 0), 0)
    first, last = start // span, (end - 1) // span
    if first == last:
        return
    rows, columns = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, 512)
    padded = tl.cdiv(R, 64) * 64
    acc = tl.zeros((ROWS, 512), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    for group in range(first, last + 1):
        row = (group * 2 + (start >= group * span).to(tl.int32)).to(tl.int64) * padded + rows
        lse = tl.load(partial_lse_ptr + row, mask=rows < R, other=float("-inf"))
        x = tl.load(partial_ptr + row[:, None] * 512 + columns[None, :], mask=rows[:, None] < R, other=0.0)
        m_new = tl.maximum(m, lse)
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, weight = tl.exp2(m - safe), tl.exp2(lse - safe)
        acc = acc * alpha[:, None] + x * weight[:, None]
        l = l * alpha + weight
        m = m_new
    row = b.to(tl.int64) * R + rows
    acc /= tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(out_ptr + row[:, None] * 512 + columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=rows[:, None] < R)
    tl.store(lse_ptr + row, (m + tl.log2(l)) / 1.4426950408889634, mask=rows < R)


def mla_decode(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, softmax_scale: float, out: tuple[Tensor, Tensor]
) -> None:
    """Launcher of `dsv3c::mla_decode`."""
    launch(q, cache, block_table, lengths, softmax_scale, out)


def launch(q, cache, block_table, lengths, softmax_scale, out, num_stages=2, num_warps=8) -> None:
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
    _mla_decode_kernel[(groups * tiles,)](
        q, cache, block_table, lengths, out, lse, partial, partial_lse, B, T, H, block_table.shape[1],
        softmax_scale * LOG2_E, batch, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    combine(partial, partial_lse, lengths, out, lse, B, R, groups, batch)


def combine(partial, partial_lse, lengths, out, lse, B, R, groups, batch) -> None:
    rows = 8 if B * R >= 4096 else 1
    _combine_kernel[(B, ceil_div(R, rows))](
        partial, partial_lse, lengths, out, lse, B, R, groups, batch, rows, num_warps=4
    )


def variants() -> Iterator[Variant]:
    tensors = {"q_ptr": BF16, "cache_ptr": BF16, "table_ptr": I32, "lengths_ptr": I32, "out_ptr": BF16, "lse_ptr": F32}
    partial = {"partial_ptr": F32, "partial_lse_ptr": F32}
    yield Variant(_mla_decode_kernel, tensors | partial | {"softmax_scale_log2": "fp32"}, {"BATCH": 128}, 8, 2)
    combined = {n: tensors[n] for n in ("lengths_ptr", "out_ptr", "lse_ptr")} | partial
    yield Variant(_combine_kernel, combined, {"BATCH": 128, "ROWS": 8})
