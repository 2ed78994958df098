"""Give a float32 product of BF16 values to the tensor cores, which add in float32 anyway."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import dsv3c.operators  # noqa: F401
from dsv3c.passes.contract import Level, Tier, leave
from dsv3c.passes.rewrite import aten, insert, replace, through_transposes, value

prims = torch.ops.prims

PARTS = 3  # of 8 significant bits each, which BF16 holds, for the 24 of float32
_UPPER_HALF = -(1 << 16)  # of a float32: the BF16 value next to it towards zero


@dataclass(frozen=True)
class NarrowProduct:
    """Before: `mm(float32(a), float32(b))` of BF16 a and b, and `mm(g, float32(b))`, g in float32. After:
    `wide_mm(a, b)`, and the same with g as the sum of three BF16 matrices: its highest eight bits, the next, the last.

    For the router, whose logits and their gradients are float32: those of 4096 tokens took V3's layer 0.35 ms forward
    and 0.75 ms backward on an H200's ordinary cores. Products of BF16 values are exact in float32, so that only the
    order of the sum changes (`numerics.wide_mm_bounds`). NUMERIC for that, and because an infinite g becomes NaN.
    Leaves alone: a right operand that needs float32.
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        stacks: dict[fx.Node, fx.Node] = {}
        products = gm.graph.find_nodes(op="call_function", target=aten.mm.default)
        return sum(_narrow(node, stacks) for node in products if value(node).dtype == torch.float32)


def _narrow(node: fx.Node, stacks: dict[fx.Node, fx.Node]) -> int:
    left, right = node.args
    b = _bf16(node, right)
    if b is None:
        leave(node, "its right operand is no BF16 matrix")
        return 0
    a, dtype = _bf16(node, left), torch.float32
    if a is not None:
        replace(node, insert(node, torch.ops.dsv3c.wide_mm.default, a, b, dtype))
        return 1
    g, transposed = through_transposes(left)
    if g not in stacks:
        stacks[g] = insert(node, aten.cat.default, _parts(node, g), 1)
    if transposed:  # a part's rows below the other's: their products are added
        stack = insert(node, aten.permute.default, stacks[g], [1, 0])
        products = insert(node, torch.ops.dsv3c.wide_mm.default, stack, b, dtype)
        products = insert(node, aten.view.default, products, [PARTS, *value(node).shape])
        replace(node, insert(node, aten.sum.dim_IntList, products, [0]))
        return 1
    casts = [user for user in node.users if user.target is prims.convert_element_type.default]
    if casts and len(casts) == len(node.users) and {cast.args[1] for cast in casts} == {torch.bfloat16}:
        dtype = torch.bfloat16
    rows = insert(node, aten.cat.default, [b] * PARTS, 0)
    product = insert(node, torch.ops.dsv3c.wide_mm.default, stacks[g], rows, dtype)
    for cast in casts if dtype == torch.bfloat16 else ():
        replace(cast, product)
    replace(node, product)
    return 1


def _bf16(at: fx.Node, x: fx.Node) -> fx.Node | None:
    """The BF16 matrix that `x` is in float32, before `at`."""
    cast, transposed = through_transposes(x)
    if cast.target is not prims.convert_element_type.default or value(cast.args[0]).dtype != torch.bfloat16:
        return None
    return insert(at, aten.permute.default, cast.args[0], [1, 0]) if transposed else cast.args[0]


def _parts(at: fx.Node, g: fx.Node) -> list[fx.Node]:
    """Three BF16 matrices whose sum is g. By bits: a compiler may skip a rounding that it fuses, not these."""
    parts, rest = [], g
    for last in (False, False, True):
        part = rest if last else _upper_half(at, rest)
        parts.append(insert(at, prims.convert_element_type.default, part, torch.bfloat16))
        rest = rest if last else insert(at, aten.sub.Tensor, rest, part)
    return parts


def _upper_half(at: fx.Node, x: fx.Node) -> fx.Node:
    bits = insert(at, aten.view.dtype, x, torch.int32)
    upper = insert(at, aten.bitwise_and.Scalar, bits, _UPPER_HALF)
    return insert(at, aten.view.dtype, upper, torch.float32)
