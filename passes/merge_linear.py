"""Multiply by all weights that read one input at once."""

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.nn import functional as F

from dsv3c.numerics import TILE
from dsv3c.passes.contract import Level, Tier, leave
from dsv3c.passes.regions import region_of


@dataclass(frozen=True)
class MergeLinear:
    """Before: `linear(x, w_a)` and `linear(x, w_b)`. After: `linear(x, cat(w_a, w_b)).split(…)`.

    For queries' and keys' projections down (q_a_proj, kv_a_proj_with_mqa), and for gate and up, which SwiGLU then has
    side by side as the experts' has. In backward the input's gradient is one product instead of two and their sum, and
    the weights' gradients are the rows of one. What is stacked is the FP8 copy, made once (`QuantizedWeights`): the
    `cat` is for `QuantizeLinear` to recognise, which leaves none. NUMERIC because sums are associated otherwise.

    Leaves alone: the router; weights whose rows are no multiple of 128, but for one a stack, the last, since a block of
    128x128 would lie in two weights; and weights that the checkpoint keeps in FP8, which would be held twice.
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.CAPTURED

    def __call__(self, gm: fx.GraphModule) -> int:
        by_input: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            if node.target is F.linear and _has_copy(node):
                by_input[node.args[0]].append(node)
        return sum(_merge(linears) for linears in by_input.values() if len(linears) > 1)


def _has_copy(node: fx.Node) -> bool:
    """Whether there is or will be a copy of the weight in FP8 (`dsv3c.capture.quantizable`)."""
    region = region_of(node)
    has_bias = len(node.args) > 2 and node.args[2] is not None
    return region is not None and region.kind == "linear" and not has_bias and not node.kwargs


def _merge(linears: list[fx.Node]) -> int:
    for node in linears:
        if node.args[1].op != "placeholder":
            leave(node, "its weight is kept in FP8: stacked, it would be held twice")
    linears = [node for node in linears if node.args[1].op == "placeholder"]
    whole = [node for node in linears if _rows(node) % TILE == 0]
    ragged = [node for node in linears if _rows(node) % TILE]
    for node in ragged[1:] if whole else ragged:
        leave(node, f"its weight's rows are no multiple of {TILE}: it stays a product of its own")
    merged = [*whole, *ragged[:1]]
    if not whole or len(merged) == 1:
        return 0
    first, graph = linears[0], linears[0].graph
    sizes = [_rows(node) for node in merged]
    with graph.inserting_before(first):
        stack = graph.call_function(torch.cat, ([node.args[1] for node in merged],))
        product = graph.call_function(F.linear, (first.args[0], stack))
        equal = len(set(sizes)) == 1  # as `chunk` says it: what FuseQuantize knows SwiGLU by
        parts = graph.call_function(torch.split, (product, sizes[0] if equal else sizes, -1))
        outs = [graph.call_function(operator.getitem, (parts, index)) for index in range(len(merged))]
    examples = [node.meta["example_value"] for node in merged]
    stack.meta["example_value"] = torch.cat([node.args[1].meta["example_value"] for node in merged])
    product.meta["example_value"] = torch.cat(examples, -1)
    parts.meta["example_value"] = product.meta["example_value"].split(sizes, -1)
    for node, out, example in zip(merged, outs, parts.meta["example_value"], strict=True):
        out.meta["example_value"] = example
        node.replace_all_uses_with(out)
    for new in (stack, product, parts, *outs):
        new.meta |= {key: first.meta[key] for key in ("nn_module_stack", "stack_trace") if key in first.meta}
    for node in merged:
        graph.erase_node(node)
    return 1


def _rows(node: fx.Node) -> int:
    return node.args[1].meta["example_value"].shape[0]
