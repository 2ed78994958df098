"""Masks for experts that do not exist."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.fuse_routing import bare, result_of, users_through
from dsv3c.passes.rewrite import aten, replace, value


@dataclass(frozen=True)
class DropSentinels:
    """Before: `where(idx >= E, fill, x)`, idx the places of a topk among at most E, sorted or not. After: x.

    transformers up to 5.17 fills the rows of experts that live on other machines, on a single machine as well: six
    times in a layer's step, the values of all tokens' experts, and between operators that are fused otherwise. Leaves
    alone: numbers that may be as large as E.
    """

    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        sites = 0
        for mask in gm.graph.find_nodes(op="call_function", target=aten.ge.Scalar):
            idx, limit = mask.args
            if isinstance(limit, fx.Node) or (bound := _bound(idx)) is None or bound > limit:
                continue
            for fill in list(users_through(mask, aten.where.self)):
                if bare(fill.args[0]) is mask and _kind(fill) == _kind(fill.args[2]):
                    replace(fill, fill.args[2])
                    sites += 1
        return sites


def _bound(idx: fx.Node) -> int | None:
    """What all of idx is below, as far as is known."""
    idx = bare(idx)
    for sort in (aten.sort.default, aten.sort.stable):
        if result_of(idx, sort, 0):
            return _bound(idx.args[0].args[0])
    if not result_of(idx, aten.topk.default, 1):
        return None
    x, _, *dim = idx.args[0].args
    size = value(x).shape[dim[0] if dim else -1]
    return size if isinstance(size, int) else None


def _kind(node: fx.Node) -> tuple:
    return value(node).dtype, *map(str, value(node).shape)
