"""Quantise a token once, not once for each of the experts it goes to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.rewrite import aten, insert, insert_pair, replace, value


@dataclass(frozen=True)
class QuantizeBeforeGather:
    """Before: `quantize_tile(x[rows])`. After: `quantize_tile(x)`, then `x_fp8[rows]` and `x_scale_inv[rows]`.

    A 1x128 tile lies within one row, so quantising commutes with choosing rows, bit for bit. With top-8 routing an
    eighth of the values is read and quantised, and the gather moves FP8 instead of BF16. Leaves alone: a quantisation
    of anything but whole rows of a matrix.
    """

    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        sites = 0
        for node in list(gm.graph.nodes):
            if node.target is not torch.ops.dsv3c.quantize_tile.default or not _gathers_rows(node.args[0]):
                continue
            x, (rows,) = node.args[0].args
            fp8, scale_inv = insert_pair(node, node.target, x, *node.args[1:])
            gathered = insert(node, aten.index.Tensor, fp8, [rows])
            # scale_inv is column-major, and the GEMM wants it so: gather columns of its transpose.
            columns = insert(node, aten.permute.default, scale_inv, [1, 0])
            columns = insert(node, aten.index.Tensor, columns, [None, rows])
            gathered_scale_inv = insert(node, aten.permute.default, columns, [1, 0])
            for user in list(node.users):
                replace(user, (gathered, gathered_scale_inv)[user.args[1]])
            gm.graph.erase_node(node)
            sites += 1
        return sites


def _gathers_rows(x: fx.Node) -> bool:
    return (
        x.target is aten.index.Tensor
        and len(x.args[1]) == 1
        and value(x.args[0]).dim() == 2
        and value(x.args[1][0]).dim() == 1
        and value(x.args[1][0]).dtype != torch.bool
    )
