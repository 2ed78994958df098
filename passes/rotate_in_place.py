"""Rotate where the values are."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

import dsv3c.operators  # noqa: F401
from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.rewrite import insert, replace, value

ops = torch.ops.dsv3c


@dataclass(frozen=True)
class RotateInPlace:
    """Before: `rotate_heads(x)`, which writes a new tensor. After: `rotate_heads_(x)`, in the form that stands for
    "of a copy of x" in a functional graph.

    Only the rotary features are read and written, a third of V3's queries. Inductor makes the copy if anything else
    reads x, and drops it otherwise. Leaves alone: an x whose rows do not lie one behind the other.
    """

    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        sites = 0
        for node in list(gm.graph.find_nodes(op="call_function", target=ops.rotate_heads.default)):
            x, cos, sin, inverse = node.args
            if value(x).is_contiguous():
                arguments = {"x": x, "cos": cos, "sin": sin, "inverse": inverse}
                both = insert(node, auto_functionalized, ops.rotate_heads_.default, **arguments)
                replace(node, insert(node, operator.getitem, both, 1))
                sites += 1
        return sites
