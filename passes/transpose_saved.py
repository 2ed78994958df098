"""Cast a weight gradient's input from what is saved anyway."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import dsv3c.operators  # noqa: F401
from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.fuse_routing import VIEWS, bare, result_of
from dsv3c.passes.rewrite import aten, insert, is_backward, replace_results

ops = torch.ops.dsv3c
_LAYOUT = (*VIEWS, aten.permute.default)


@dataclass(frozen=True)
class TransposeSaved:
    """Before: `requantize_t(quantize_tile(x))` where backward reads x in BF16 as well. After: `quantize_tile_t(x)`.

    For o_proj, whose input is the output that attention's gradient needs: no FP8 copy of it is saved. NUMERIC: one
    rounding less. Leaves alone: what backward reads in FP8 only.
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        return sum(map(_transpose, gm.graph.find_nodes(op="call_function", target=ops.requantize_t.default)))


def _transpose(again: fx.Node) -> int:
    fp8, _, *rest = again.args
    if not result_of(fp8, ops.quantize_tile.default, 0):
        return 0
    x = fp8.args[0].args[0]
    if not _is_read_in_backward(bare(x, _LAYOUT)):
        return 0
    replace_results(again, insert(again, ops.quantize_tile_t.default, x, *rest), first=0)
    return 1


def _is_read_in_backward(x: fx.Node) -> bool:
    """By a computation, be it through views."""
    return any(
        _is_read_in_backward(user) if user.target in _LAYOUT else is_backward(user) and user.op == "call_function"
        for user in x.users
    )
