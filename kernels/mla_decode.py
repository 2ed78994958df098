"""MLA decode: a few new tokens attend over the paged latent cache. All heads share one key of 576 = 512 + 64 numbers,
whose first 512 are the value too (definition: `reference/mla_decode.py`).

With 128 heads a key costs 2·128·(576 + 512) operations and 1152 bytes: 242 operations a byte, compute-bound. With 16
heads (a GPU's share at TP8) it is memory-bound. Rows are (token, head) pairs, R = T·H a sequence; a program has 64, the
least that a warp group multiplies.

Lengths are known to the device only, so the launch is static: one program a multiprocessor. All sequences' keys, in
units of 128, lie behind one another on one axis, which is cut into equal spans, one a group; a group is a program for
each 64 rows, so that those who need a key need it at the same time. A program walks its span with a running softmax. A
sequence that lies in one span is finished there. Of others each program leaves a partial result, normalised, with its
log-sum-exp (base 2): in slot 0 if the sequence began before the span, in slot 1 if it goes on behind it; only the ends
of a span cut a sequence. A second kernel adds them, in the order of the groups.

The first kernel is in `mla_decode_gluon.py`, since Triton alone cannot split warps by task.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels.gemm import aligned
from dsv3c.kernels.launch import Descriptor, launched
from dsv3c.kernels.mla_decode_gluon import BUFFER, mla_decode_kernel
from dsv3c.kernels.offline import BF16, F32, I32, Variant
from dsv3c.kernels.reference.mla_decode import LATENT, RANK, read_pages_ref
from dsv3c.numerics import ceil_div, round_up

ROWS = 64
LOG2_E = 1.4426950408889634
COMBINED = ((8, 1), (1, 16))  # rows of a program and parts at a time: of many rows; of few, which have many parts


@launched
@triton.jit(do_not_specialize=["B", "groups"])
def _combine_kernel(
    partial_ptr, partial_lse_ptr, lengths_ptr, out_ptr, lse_ptr, B, R, groups, BATCH: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """A sequence's rows from its partial results, if it has any, PARTS at a time. Spans as in `_first_segment`."""
    b, batch = tl.program_id(0), tl.arange(0, BATCH)
    units = tl.maximum(tl.cdiv(tl.load(lengths_ptr + batch, mask=batch < B, other=0), 128), 1)
    units = tl.where(batch < B, units, 0)
    span = tl.cdiv(tl.sum(units, 0), groups)
    start, end = tl.sum(tl.where(batch < b, units, 0), 0), tl.sum(tl.where(batch <= b, units, 0), 0)
    first, last = start // span, (end - 1) // span
    if first == last:
        return
    rows, columns = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, 512)
    acc = tl.zeros((ROWS, 512), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for part in range(first, last + 1, PARTS):
        group = part + tl.arange(0, PARTS)
        slot = group * 2 + (start >= group * span).to(tl.int32)
        row = slot[:, None].to(tl.int64) * (tl.cdiv(R, 64) * 64) + rows[None, :]
        inside = (group <= last)[:, None] & (rows < R)[None, :]
        lse = tl.load(partial_lse_ptr + row, mask=inside, other=float("-inf"))
        out = tl.load(partial_ptr + row[:, :, None] * 512 + columns[None, None, :], mask=inside[:, :, None], other=0.0)
        above = tl.maximum(m, tl.max(lse, 0))
        finite = tl.where(above == float("-inf"), 0.0, above)
        factor, weight = tl.exp2(m - finite), tl.exp2(lse - finite[None, :])
        acc = acc * factor[:, None] + tl.sum(out * weight[:, :, None], 0)
        total = total * factor + tl.sum(weight, 0)
        m = above
    row = b.to(tl.int64) * R + rows
    acc /= tl.where(total == 0.0, 1.0, total)[:, None]
    out = out_ptr + row[:, None] * 512 + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(rows < R)[:, None])
    tl.store(lse_ptr + row, (m + tl.log2(total)) / 1.4426950408889634, mask=rows < R)


def mla_decode(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, softmax_scale: float, out: tuple[Tensor, Tensor]
) -> None:
    """Launcher of `dsv3c::mla_decode`."""
    out, lse = out
    if out.numel() == 0:
        return
    B, T, H, _ = q.shape
    rows = round_up(T * H, ROWS)
    groups = max(torch.cuda.get_device_properties(q.device).multi_processor_count // (rows // ROWS), 1)
    batch = max(triton.next_power_of_2(B), 128)  # up to 128 sequences one kernel
    partial = q.new_empty((groups, 2, rows, RANK), dtype=torch.float32)
    partial_lse = q.new_empty((groups, 2, rows), dtype=torch.float32)
    block_table, lengths = block_table.contiguous(), lengths.contiguous()
    flat = (aligned(x.contiguous()).view(-1, LATENT) for x in (q, cache))
    descs = [Descriptor(x, (64, 64), BUFFER) for x in flat]
    mla_decode_kernel[(groups * rows // ROWS,)](
        *descs, block_table, lengths, out, lse, partial, partial_lse, B, T, H, block_table.shape[1],
        softmax_scale * LOG2_E, batch, num_warps=4,
    )  # fmt: skip
    rows, parts = COMBINED[B * T * H < 4096]
    _combine_kernel[(B, ceil_div(T * H, rows))](
        partial, partial_lse, lengths, out, lse, B, T * H, groups, batch, rows, parts
    )


def read_pages(cache: Tensor, block_table: Tensor, lengths: Tensor, num_new: int, out: tuple[Tensor, Tensor]) -> None:
    """Launcher of `dsv3c::read_pages`, by torch: for models whose latent the kernel above is not made for."""
    for result, value in zip(out, read_pages_ref(cache, block_table, lengths, num_new), strict=True):
        result.copy_(value)


def variants() -> Iterator[Variant]:
    tensors = {"lengths_ptr": I32, "out_ptr": BF16, "lse_ptr": F32, "partial_ptr": F32, "partial_lse_ptr": F32}
    described = f"tensordesc<bf16[64, 64],{BUFFER!r}>"
    operands = {"q_desc": described, "cache_desc": described, "table_ptr": I32, "scale": "fp32"} | tensors
    yield Variant(mla_decode_kernel, operands, {"BATCH": 128})
    for rows, parts in COMBINED:
        yield Variant(_combine_kernel, tensors, {"BATCH": 128, "ROWS": rows, "PARTS": parts})
