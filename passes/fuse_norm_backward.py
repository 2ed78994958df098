"""The gradient of an RMSNorm in one read, whatever AOTAutograd wrote it as."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

import dsv3c.operators  # noqa: F401
from dsv3c.numerics import TILE
from dsv3c.operators.norm import MOST_COLUMNS
from dsv3c.passes.contract import Level, Tier, leave
from dsv3c.passes.fuse_quantize import Norm, as_rows, norm_of
from dsv3c.passes.rewrite import aten, end_of, insert, insert_pair, is_backward, replace, size, under, value

prims, ops = torch.ops.prims, torch.ops.dsv3c


@dataclass(frozen=True)
class FuseNormBackward:
    """Before: all that lies between the gradients dy and dx of an RMSNorm, the sum that is its weight's gradient, and
    the addition of dx to the gradient that reaches x beside the norm. After: `rms_norm_backward`.

    Inductor makes three reductions of it, each of which reads dy and x. What lies between is known by what it reads,
    not by its form, which differs between devices and models: everything computed from dy·weight and from nothing but
    x and 1/rms, up to one BF16 value. NUMERIC because that value is rounded less often. Runs before `FuseQuantize`,
    which takes the norm itself away. Leaves alone: norms of which not both x and weight are trained, and sizes that are
    no multiple of 128 or too large for the kernel.
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        products = list(gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor))
        norms = [norm for y in products if not is_backward(y) and (norm := norm_of(y)) is not None]
        sites = sum(map(_fuse, norms))
        if sites:
            stable_topological_sort(gm.graph)  # the weight's gradient came before dx
        return sites


def _fuse(norm: Norm) -> int:
    dnormed = next((user for user in norm.weight.users if is_backward(user) and _multiplies(user, norm.x)), None)
    columns = value(norm.x).shape[-1]
    if dnormed is None or columns % TILE or columns > MOST_COLUMNS:
        return 0
    dy = next(operand for operand in dnormed.args if operand is not norm.weight)
    dx = end_of(dnormed, {norm.x, norm.rstd}, lambda node: value(node).dtype != torch.float32)
    dweight = _weight_gradient(norm, dy)
    if dx is None or dweight is None or dx.target is not prims.convert_element_type.default:
        leave(dnormed, "a gradient of a norm of unknown form")
        return 0
    total, beside = _with_beside(dx)
    total.meta = dx.meta | {"val": value(total)}  # where the norm is
    dsum_RK = None if beside is None else as_rows(total, beside)
    rows = (as_rows(total, dy), as_rows(total, norm.x), norm.weight)
    rstd_R = insert(total, aten.view.default, norm.rstd, [-1])
    dx_RK, dweight_K = insert_pair(total, ops.rms_norm_backward.default, *rows, rstd_R, dsum_RK)
    replace(dweight, insert(total, prims.convert_element_type.default, dweight_K, value(norm.weight).dtype))
    sizes = [size(total, norm.x, dim) for dim in range(value(norm.x).dim())]
    replace(total, insert(total, aten.view.default, dx_RK, sizes))
    return 1


def _multiplies(node: fx.Node, x: fx.Node) -> bool:
    return node.target is aten.mul.Tensor and value(node).shape == value(x).shape


def _weight_gradient(norm: Norm, dy: fx.Node) -> fx.Node | None:
    """The sum over rows of dy·normed."""
    for product in dy.users:
        if not is_backward(product) or not _multiplies(product, norm.x):
            continue
        operands = {under(operand, aten.alias.default) for operand in product.args}
        for total in product.users if operands == {dy, norm.normed} else ():
            if total.target is aten.sum.dim_IntList and value(total).numel() == value(norm.weight).numel():
                flat = next(iter(total.users))
                return flat if flat.target is aten.view.default and value(flat).dim() == 1 else None
    return None


def _with_beside(dx: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The sum of dx with what else reaches x, and that."""
    if len(dx.users) == 1:
        (total,) = dx.users
        if total.target is aten.add.Tensor and not total.kwargs and value(total).dtype == value(dx).dtype:
            first, second = total.args
            beside = second if first is dx else first
            if isinstance(beside, fx.Node) and beside is not dx and value(beside).shape == value(dx).shape:
                return total, beside
    return dx, None
