"""A gradient, added to its sum in place. What it means: `kernels/reference/accumulate.py`."""

import torch

from dsv3c.kernels.reference import accumulate
from dsv3c.operators.define import define, expect


def _accumulate_(total, x):
    expect("dtype of total", total.dtype, torch.float32)
    expect("dtype of x", x.dtype, torch.bfloat16)
    expect("shape of x", tuple(x.shape), tuple(total.shape))
    expect("whether total and x are contiguous", (total.is_contiguous(), x.is_contiguous()), (True, True))


define("accumulate_(Tensor(a!) total, Tensor x) -> ()", _accumulate_, accumulate.accumulate_ref, "accumulate")
