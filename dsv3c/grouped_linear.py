"""One linear per group of rows: `F.grouped_mm` where it can be used, and an operator of ours where it cannot.

`F.grouped_mm` is traced in bfloat16 only, wants rows of whole 16 bytes, and knows no float64. For the rest (float32 on
a CPU, the float64 oracle, odd sizes) there is `dsv3c::grouped_linear`: a loop over the groups, opaque to the compiler
because the groups' sizes are data. Shape suffixes: R rows, E groups, K in, N out.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def grouped_linear(x_RK: Tensor, w_ENK: Tensor, offs_E: Tensor) -> Tensor:
    """`F.linear(rows of group e, w[e])` for every group e, [R, N]; `offs` int32 holds where each group's rows end."""
    whole = all(dim * x_RK.element_size() % 16 == 0 for dim in w_ENK.shape[1:])
    if x_RK.dtype == torch.bfloat16 and whole:
        return F.grouped_mm(x_RK, w_ENK.transpose(1, 2), offs=offs_E)
    return torch.ops.dsv3c.grouped_linear(x_RK, w_ENK, offs_E)


def _rows(offs_E: Tensor) -> Iterator[slice]:
    ends = offs_E.tolist()
    return (slice(start, end) for start, end in zip([0, *ends], ends, strict=False))


@torch.library.custom_op("dsv3c::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    out_RN = x.new_zeros(x.shape[0], w.shape[1])
    for rows, w_NK in zip(_rows(offs), w, strict=True):
        out_RN[rows] = F.linear(x[rows], w_NK)
    return out_RN


@torch.library.custom_op("dsv3c::grouped_linear_wgrad", mutates_args=())
def _grouped_linear_wgrad(dy: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    """dyᵀ x of every group, [E, N, K]."""
    dw_ENK = x.new_empty(offs.shape[0], dy.shape[1], x.shape[1])
    for dw_NK, rows in zip(dw_ENK, _rows(offs), strict=True):
        torch.mm(dy[rows].t(), x[rows], out=dw_NK)
    return dw_ENK


@_grouped_linear.register_fake
def _(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@_grouped_linear_wgrad.register_fake
def _(dy: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(offs.shape[0], dy.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w, offs = ctx.saved_tensors
    need_dx, need_dw, _ = ctx.needs_input_grad
    dx = torch.ops.dsv3c.grouped_linear(dy, w.transpose(1, 2), offs) if need_dx else None
    dw = torch.ops.dsv3c.grouped_linear_wgrad(dy, x, offs) if need_dw else None
    return dx, dw, None


_grouped_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.dsv3c.grouped_linear)
def _flops(x_shape: torch.Size, w_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * x_shape[0] * w_shape[1] * w_shape[2]


@register_flop_formula(torch.ops.dsv3c.grouped_linear_wgrad)
def _wgrad_flops(dy_shape: torch.Size, x_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * dy_shape[0] * dy_shape[1] * x_shape[1]
