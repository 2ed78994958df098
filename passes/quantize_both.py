"""Cast a gradient for both of its products while it is read once."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import dsv3c.operators  # noqa: F401
from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.rewrite import insert, is_backward, replace_results

ops = torch.ops.dsv3c


@dataclass(frozen=True)
class QuantizeBoth:
    """Before: `quantize_tile(x)` for the input's gradient and `quantize_tile_t(x)` for the weight's. After:
    `quantize_tile_both(x)`.

    The same bits; x, in BF16 the most of what a cast moves, is read once. Leaves alone: casts in other recipes, and one
    in forward beside one in backward, for which the latter would have to be saved.
    """

    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        order = {node: number for number, node in enumerate(gm.graph.nodes)}
        along_rows = {
            (*cast.args, is_backward(cast)): cast
            for cast in gm.graph.find_nodes(op="call_function", target=ops.quantize_tile.default)
        }
        sites = 0
        for cast_t in gm.graph.find_nodes(op="call_function", target=ops.quantize_tile_t.default):
            x, offs, *recipe = cast_t.args
            cast = along_rows.pop((x, *recipe, is_backward(cast_t)), None)
            if cast is None:
                continue
            first = min(cast, cast_t, key=order.__getitem__)
            both = insert(first, ops.quantize_tile_both.default, x, offs, *recipe)
            replace_results(cast, both, first=0)
            replace_results(cast_t, both, first=2)
            sites += 1
        return sites
