"""Cast the gradients of heads to FP8 where attention leaves them."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import dsv3c.operators  # noqa: F401
from dsv3c.operators.heads import HALF
from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.rewrite import aten, insert, replace, value

ops = torch.ops.dsv3c
_CASTS = (ops.quantize_tile.default, ops.quantize_tile_t.default, ops.quantize_tile_both.default)


@dataclass(frozen=True)
class CastHeads:
    """Before: in backward, the casts along rows and columns of `rotate_heads(dq)`, and of `cat((dk[..nope], dv))`.
    After: `rotate_quantize_both` and `join_quantize_both`, one reading of what attention's gradient wrote.

    Leaves alone: head sizes that are no multiples of 64, rotary parts of other than 64 features, gradients in another
    dtype than BF16, and those that are read in BF16 too.
    """

    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        sources = dict.fromkeys(node.args[0] for node in gm.graph.nodes if node.target in _CASTS)
        return sum(map(_cast, sources))


def _cast(x: fx.Node) -> int:
    casts = [node for node in x.graph.nodes if node in x.users]  # in order
    kinds, settings = {cast.target for cast in casts}, {cast.args[-2:] for cast in casts}
    if not kinds <= set(_CASTS) or len(settings) > 1 or any(cast.args[1:-2] not in ((), (None,)) for cast in casts):
        return 0
    if len(kinds) < 2 and ops.quantize_tile_both.default not in kinds:
        return 0
    source = _source(x) if value(x).dtype == torch.bfloat16 else None
    call = source and (_rotated(casts[0], source, *settings) or _joined(casts[0], source, *settings))
    if call is None:
        return 0
    for cast in casts:
        first = 2 if cast.target is ops.quantize_tile_t.default else 0
        for user in list(cast.users):
            replace(user, insert(user, operator.getitem, call, first + user.args[1]))
        x.graph.erase_node(cast)
    return 1


def _source(x: fx.Node) -> fx.Node | None:
    """What x is a view of, if it has no other reader."""
    while x.target is aten.view.default:
        x = x.args[0]
        if len(x.users) > 1:
            return None
    return x


def _rotated(at: fx.Node, source: fx.Node, settings: tuple) -> fx.Node | None:
    if source.target is not ops.rotate_heads.default or source.args[3] is not True:
        return None
    x, cos, sin, _ = source.args
    if value(x).shape[2] % HALF or 2 * value(cos).shape[1] != HALF:
        return None
    return insert(at, ops.rotate_quantize_both.default, x, cos, sin, *settings)


def _joined(at: fx.Node, source: fx.Node, settings: tuple) -> fx.Node | None:
    if source.target is not aten.cat.default or len(source.args[0]) != 2 or source.args[1] not in (-1, 3):
        return None
    nope = value(source.args[0][0]).shape[-1]
    dk, dv = (_attention_gradient(part) for part in source.args[0])
    if dk is None or dv is None or value(source.args[0][1]).shape[-1] != value(dv).shape[-1]:
        return None
    if value(source).dim() != 4 or nope % HALF or value(dv).shape[-1] % HALF:
        return None
    heads = []
    for x in (dk, dv):
        by_token = insert(at, aten.permute.default, x, [0, 2, 1, 3])
        heads.append(insert(at, aten.view.default, by_token, [-1, *value(by_token).shape[2:]]))
    return insert(at, ops.join_quantize_both.default, *heads, nope, *settings)


def _attention_gradient(x: fx.Node) -> fx.Node | None:
    """The gradient [B, H, T, d] that attention wrote as [B, T, H, d], if x is its first features, tokens first."""
    order = [0, 1, 2, 3]
    while x.target is aten.permute.default or (x.target is aten.slice.Tensor and x.args[1:3] == (3, 0)):
        order = [x.args[1][dim] for dim in order] if x.target is aten.permute.default else order
        x = x.args[0]
    is_gradient = x.target is operator.getitem and x.args[0].target is ops.attention_backward.default
    return x if is_gradient and order == [0, 2, 1, 3] else None
