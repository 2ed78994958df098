"""Compute equal values once."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.rewrite import aten, replace, value


@dataclass(frozen=True)
class ShareEqual:
    """Before: two calls of one operator on the same arguments. After: one.

    AOTAutograd shares equal nodes in training only, and before our passes. This makes linears with a common input
    quantise it once. Views of one tensor are equal if their shapes are, however those are written. Leaves alone: random
    numbers, and operators that write to an argument.
    """

    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        first: dict[tuple, fx.Node] = {}
        sites = 0
        for node in list(gm.graph.nodes):
            if not _is_pure(node):
                continue
            args = (node.args[0], *map(str, value(node).shape)) if node.target is aten.view.default else node.args
            key = (node.target, node.meta.get("partitioner_tag"), _hashable(args), _hashable(node.kwargs))
            if key in first:
                replace(node, first[key])
                sites += 1
            else:
                first[key] = node
        return sites


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return True
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _hashable(value):
    """With the type, since 1 == 1.0 == True."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in value.items())
    return type(value), value if isinstance(value, (fx.Node, int, float, str, bool, type(None))) else str(value)
