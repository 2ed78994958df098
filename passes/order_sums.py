"""Sum in one order what is summed in the order of arrival."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import dsv3c.attention  # noqa: F401  (defines dsv3c::attention_backward)
from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.rewrite import insert, replace

_BACKWARD = torch.ops.dsv3c.attention_backward.default
_ARGUMENTS = len(_BACKWARD._schema.arguments)


@dataclass(frozen=True)
class OrderSums:
    """Before: `attention_backward(…)`. After: `attention_backward(…, deterministic=True)`, the one operator of ours
    whose bits differ from call to call. For `dsv3c.compile(…, deterministic=True)`, which has Inductor keep to such
    forms too."""

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        found = [n for n in gm.graph.find_nodes(op="call_function", target=_BACKWARD) if len(n.args) < _ARGUMENTS]
        for node in found:  # a node of its own: Inductor holds the arguments against those that were traced
            replace(node, insert(node, _BACKWARD, *node.args, True))
        return len(found)
