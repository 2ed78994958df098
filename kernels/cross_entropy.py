"""The head and its loss without the logits: at 129,280 words those of 4096 tokens are a gigabyte in BF16, several in
float32 and with their gradient.

Rows are taken in chunks. A chunk's logits come from the library's product, one program a row finds their loss and puts
their gradient in their place, and two more products take that to the input and to the weight. A row is read twice, for
the sum of its exponentials and for the gradient, and written once; the second time it is still in the L2 cache, since
only as many rows are under way as there are multiprocessors. Loss and gradients come together, in forward: there is no
backward that would need the logits again.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels.offline import BF16, F32, Variant
from dsv3c.kernels.reference.cross_entropy import IGNORED

BLOCK, WARPS = 8192, 16  # of a row at a time; 16 warps a program leave two programs a multiprocessor


@triton.jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.jit(do_not_specialize=["R"])
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, loss_ptr, scale_ptr, R, V, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    logits_ptr += row.to(tl.int64) * V
    block = tl.arange(0, BLOCK)
    largest = -float("inf")
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits_ptr + start + block, mask=start + block < V, other=-float("inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(x))
        sums = sums * _exp(before - largest) + _exp(x - largest)
    total = tl.sum(sums)
    counts = label != IGNORED
    known = (label >= 0) & (label < V)
    of_label = tl.load(logits_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(counts, largest + tl.log(total) - of_label, 0.0))
    scale = tl.where(counts, tl.load(scale_ptr), 0.0)
    factor = scale / total
    tl.debug_barrier()  # the label's logit has been read
    for start in range(0, V, BLOCK):
        x = tl.load(logits_ptr + start + block, mask=start + block < V, other=0.0).to(tl.float32)
        gradient = _exp(x - largest) * factor - tl.where(start + block == label, scale, 0.0)
        tl.store(logits_ptr + start + block, gradient.to(tl.bfloat16), mask=start + block < V)


def cross_entropy_(logits_RV: Tensor, labels_R: Tensor, scale: Tensor, out: Tensor) -> None:
    """Launcher of `dsv3c::cross_entropy_`."""
    R, V = logits_RV.shape
    if R:
        _cross_entropy_kernel[(R,)](logits_RV, labels_R.contiguous(), out, scale, R, V, IGNORED, BLOCK, num_warps=WARPS)


def linear_cross_entropy(
    x_RK: Tensor, weight_VK: Tensor, labels_R: Tensor, chunk: int, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Launcher of `dsv3c::linear_cross_entropy`."""
    loss, dx_RK, dweight_VK = out
    scale = 1 / (labels_R != IGNORED).sum().clamp(min=1).float()
    losses_R = x_RK.new_empty(len(x_RK), dtype=torch.float32)
    logits_RV = x_RK.new_empty((min(chunk, len(x_RK)), len(weight_VK)))
    dweight_VK.zero_()
    for first in range(0, len(x_RK), chunk):
        rows = slice(first, first + chunk)
        x, logits = x_RK[rows], logits_RV[: len(x_RK[rows])]
        torch.mm(x, weight_VK.t(), out=logits)
        cross_entropy_(logits, labels_R[rows], scale, losses_R[rows])
        torch.mm(logits, weight_VK, out=dx_RK[rows])
        torch.ops.aten.addmm.dtype_out(dweight_VK, logits.t(), x, torch.float32, out=dweight_VK)
    loss.copy_(losses_R.sum() * scale)


def variants() -> Iterator[Variant]:
    yield Variant(
        _cross_entropy_kernel,
        {"logits_ptr": BF16, "labels_ptr": "*i64", "loss_ptr": F32, "scale_ptr": F32},
        {"IGNORED": -100, "BLOCK": BLOCK},
        num_warps=WARPS,
    )
