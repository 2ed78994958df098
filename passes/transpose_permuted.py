"""Cast experts' rows for a weight gradient from where their tokens are."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import dsv3c.operators  # noqa: F401
from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.fuse_routing import result_of
from dsv3c.passes.rewrite import insert, replace_results

ops = torch.ops.dsv3c


@dataclass(frozen=True)
class TransposePermuted:
    """Before: `requantize_t(permute(x))`. After: `permute_requantize_t(x)`.

    The same bits. A token's row is read from L2, where it is an eighth as large as its copies; the copies of the
    experts' input, which backward made again for this cast alone, are not made. Leaves alone: casts of other values.
    """

    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        sites = 0
        for cast in gm.graph.find_nodes(op="call_function", target=ops.requantize_t.default):
            fp8, scale_inv, offs, *recipe = cast.args
            if not (
                result_of(fp8, ops.permute.default, 0)
                and result_of(scale_inv, ops.permute.default, 1)
                and fp8.args[0] is scale_inv.args[0]
                and offs is not None
            ):
                continue
            fused = insert(cast, ops.permute_requantize_t.default, *fp8.args[0].args, offs, *recipe)
            replace_results(cast, fused, first=0)
            sites += 1
        return sites
