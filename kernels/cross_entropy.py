"""The head and its loss without the logits: at 129,280 words those of 4096 tokens are a gigabyte in BF16, several in
float32 and with their gradient.

Rows are taken in chunks. A chunk's logits come from the library's product, one program a row finds their loss and puts
their gradient in their place, and two more products take that to the input and to the weight. The weight's is summed up
in float32 over several chunks; one chunk's is the product's result, rounded once as well. A row is read twice, for
the sum of its exponentials and for the gradient, and written once; the second time it is still in the L2 cache, since
only as many rows are under way as there are multiprocessors. Loss and gradients come together, in forward: there is no
backward that would need the logits again.

H200, 4096 rows of 129,280: 745 µs, 0.67 of the speed of a copy that reads and writes the logits once.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels.gemm import multiprocessors
from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import BF16, F32, Variant
from dsv3c.kernels.reference.cross_entropy import IGNORED

BLOCK, WARPS = 32768, 32  # of a row at a time; a program takes a multiprocessor


@triton.jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)


@launched
@triton.jit(do_not_specialize=["R"])
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, loss_ptr, scale_ptr, R, V, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        label = tl.load(labels_ptr + row)
        row_ptr = logits_ptr + row * V.to(tl.int64)
        known = (label >= 0) & (label < V)
        of_label = tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32)
        # A maximum and a sum for each 8 columns of a block, which are a thread's: nothing waits for another's.
        largest = tl.full((BLOCK // 8,), -3.3895313892515355e38, tl.float32)  # no number is less in BF16
        sums = tl.zeros((BLOCK // 8,), tl.float32)
        for start in range(0, V, BLOCK):
            x = tl.load(row_ptr + start + at, mask=at < V - start, other=-float("inf"), eviction_policy="evict_last")
            x = x.to(tl.float32)
            before, largest = largest, tl.maximum(largest, tl.max(x, 1))
            sums = sums * _exp(before - largest) + tl.sum(_exp(x - largest[:, None]), 1)
        of_all = tl.max(largest)
        total = tl.sum(sums * _exp(largest - of_all))
        counts = label != IGNORED
        tl.store(loss_ptr + row, tl.where(counts, of_all + tl.log(total) - of_label, 0.0))
        scale = tl.where(counts, tl.load(scale_ptr), 0.0)
        factor = scale / total
        for start in range(0, V, BLOCK):
            x = tl.load(row_ptr + start + at, mask=at < V - start, other=0.0, eviction_policy="evict_first")
            gradient = _exp(x.to(tl.float32) - of_all) * factor
            tl.store(row_ptr + start + at, gradient.to(tl.bfloat16), mask=at < V - start)
        tl.debug_barrier()  # the label's gradient comes last
        tl.store(row_ptr + label, (_exp(of_label - of_all) * factor - scale).to(tl.bfloat16), mask=known)


def cross_entropy_(logits_RV: Tensor, labels_R: Tensor, scale: Tensor, out: Tensor) -> None:
    """Launcher of `dsv3c::cross_entropy_`."""
    R, V = logits_RV.shape
    if R:
        programs = min(R, multiprocessors())
        _cross_entropy_kernel[(programs,)](
            logits_RV, labels_R.contiguous(), out, scale, R, V, IGNORED, BLOCK, num_warps=WARPS
        )


def linear_cross_entropy(
    x_RK: Tensor, weight_VK: Tensor, labels_R: Tensor, chunk: int, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Launcher of `dsv3c::linear_cross_entropy`."""
    loss, dx_RK, dweight_VK = out
    scale = 1 / (labels_R != IGNORED).sum().clamp(min=1).float()
    losses_R = x_RK.new_empty(len(x_RK), dtype=torch.float32)
    logits_RV = x_RK.new_empty((min(chunk, len(x_RK)), len(weight_VK)))
    one = 0 < len(x_RK) <= chunk
    total_VK = dweight_VK if one else weight_VK.new_zeros(weight_VK.shape, dtype=torch.float32)
    for first in range(0, len(x_RK), chunk):
        rows = slice(first, first + chunk)
        x, logits = x_RK[rows], logits_RV[: len(x_RK[rows])]
        torch.mm(x, weight_VK.t(), out=logits)
        cross_entropy_(logits, labels_R[rows], scale, losses_R[rows])
        torch.mm(logits, weight_VK, out=dx_RK[rows])
        if one:
            torch.mm(logits.t(), x, out=dweight_VK)
        else:
            torch.ops.aten.addmm.dtype_out(total_VK, logits.t(), x, torch.float32, out=total_VK)
    if not one:
        dweight_VK.copy_(total_VK)
    loss.copy_(losses_R.sum() * scale)


def variants() -> Iterator[Variant]:
    yield Variant(
        _cross_entropy_kernel,
        {"logits_ptr": BF16, "labels_ptr": "*i64", "loss_ptr": F32, "scale_ptr": F32},
        {"IGNORED": -100, "BLOCK": BLOCK},
        num_warps=WARPS,
    )
