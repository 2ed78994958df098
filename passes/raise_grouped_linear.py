"""Give the experts' linears of transformers, where they are not `F.grouped_mm`, the operator that ours have."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import dsv3c.grouped_linear  # noqa: F401  (defines dsv3c::grouped_linear)
from dsv3c.passes.contract import Level, Tier

_WHERE = ("nn_module_stack", "stack_trace")


@dataclass(frozen=True)
class RaiseGroupedLinear:
    """Before: `transformers.grouped_mm_fallback(x, wᵀ, offs)`. After: `dsv3c.grouped_linear(x, w, offs)`.

    The former is what transformers calls in float32. Its gradients are one operator, which hides two products, or in
    5.17 a loop over groups whose sizes are data, which torch.compile refuses. The same products, group by group.
    """

    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.CAPTURED

    def __call__(self, gm: fx.GraphModule) -> int:
        if not hasattr(torch.ops.transformers, "grouped_mm_fallback"):
            return 0
        fallback = torch.ops.transformers.grouped_mm_fallback
        nodes = [node for node in gm.graph.nodes if node.target in (fallback, fallback.default)]
        for node in nodes:
            x, w_EKN, offs = (*node.args, *node.kwargs.values())
            with gm.graph.inserting_before(node):
                w_ENK = gm.graph.call_method("transpose", (w_EKN, -2, -1))
                out = gm.graph.call_function(torch.ops.dsv3c.grouped_linear.default, (x, w_ENK, offs))
            for new, example in (
                (w_ENK, w_EKN.meta["example_value"].transpose(-2, -1)),
                (out, node.meta["example_value"]),
            ):
                new.meta = {key: node.meta[key] for key in _WHERE if key in node.meta} | {"example_value": example}
            node.replace_all_uses_with(out)
            gm.graph.erase_node(node)
        return len(nodes)
