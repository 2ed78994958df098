"""Keep attention one operator, whatever device the graph is captured on."""

from dataclasses import dataclass
from operator import getitem
from typing import ClassVar

import torch
from torch import fx
from torch.nn import functional as F

import dsv3c.attention  # noqa: F401  (defines dsv3c::attention)
from dsv3c.passes.contract import Level, Tier, leave

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


@dataclass(frozen=True)
class RaiseAttention:
    """Before: `scaled_dot_product_attention(q, k, v, …)` in the captured graph. After: `dsv3c.attention`.

    AOTAutograd would take the former apart into what the capturing device computes with (on a CPU a softmax over T x
    T); the latter calls it when it runs. Leaves alone: dropout, grouped-query attention, and calls without a scale.
    """

    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.CAPTURED

    def __call__(self, gm: fx.GraphModule) -> int:
        sites = 0
        for node in list(gm.graph.nodes):
            if node.target is not F.scaled_dot_product_attention:
                continue
            call = _DEFAULTS | dict(zip(_PARAMETERS, node.args, strict=False)) | node.kwargs
            if call["dropout_p"] != 0.0 or call["enable_gqa"] or call["scale"] is None:
                leave(node, "attention with dropout, grouped queries or no scale")
                continue
            args = (call["query"], call["key"], call["value"], call["attn_mask"], call["scale"], call["is_causal"])
            with gm.graph.inserting_before(node):
                both = gm.graph.call_function(torch.ops.dsv3c.attention.default, args)
                out = gm.graph.call_function(getitem, (both, 0))
            for new in (both, out):
                new.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
            # AOTAutograd's cache looks for a value where a method is called on the result.
            out.meta["example_value"] = node.meta.get("example_value")
            node.replace_all_uses_with(out)
            gm.graph.erase_node(node)
            sites += 1
        return sites
