"""Make the rotation of queries one operator, with its gradient, before AOTAutograd takes it apart."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

import dsv3c.attention  # noqa: F401  (gives dsv3c::rotate_heads a gradient)
from dsv3c.passes.contract import Level, Tier, leave, operator_name
from dsv3c.passes.rewrite import erase_unread, insert_captured

_EVEN, _ODD = (Ellipsis, slice(0, None, 2)), (Ellipsis, slice(1, None, 2))


@dataclass(frozen=True)
class RaiseRotary:
    """Before: `nope, rope = q.split(…)`, then `cat((nope, rotate(rope)))` of interleaved pairs, heads before or behind
    tokens. After: `dsv3c.rotate_heads` of q as its linear wrote it.

    `cat` reads and writes all of q, for the third of it that is rotated; the operator can be computed in place
    (`RotateInPlace`), and so can its gradient. NUMERIC because it rounds once, where transformers' rotation in BF16
    rounds each product. Leaves alone: a single token, where launches count and bytes do not; other dtypes than BF16;
    pairs that are no power of two; rotations of halves (`rope_interleave=False`).
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.CAPTURED

    def __call__(self, gm: fx.GraphModule) -> int:
        return sum(map(_raise, [node for node in gm.graph.nodes if operator_name(node) == "cat"]))


def _raise(joined: fx.Node) -> int:
    found = _rotated_queries(joined)
    if found is None:
        return 0
    q, by_head, cos, sin = found
    x, pairs = _example(q), _example(cos).shape[-1]
    if x.dtype != torch.bfloat16 or pairs & (pairs - 1):
        leave(joined, "queries of another dtype than BF16, or rotary pairs that are no power of two")
        return 0
    if isinstance(x.shape[1], int) and x.shape[1] == 1:
        return 0
    B, T = (insert_captured(joined, "size", q, dim) for dim in (0, 1))
    angles = []
    for angle in (cos, sin):
        angle_BTr = insert_captured(joined, "squeeze", angle, 1 if by_head else 2)
        angle_BTr = insert_captured(joined, "expand", angle_BTr, B, T, -1)
        angles.append(insert_captured(joined, "flatten", angle_BTr, 0, 1))
    q_RHD = insert_captured(joined, "flatten", q, 0, 1)
    out = insert_captured(joined, torch.ops.dsv3c.rotate_heads.default, q_RHD, *angles, False)
    out = insert_captured(joined, "view_as", out, q)
    if by_head:
        out = insert_captured(joined, "transpose", out, 1, 2)
    joined.replace_all_uses_with(out)
    erase_unread(joined)
    return 1


def _rotated_queries(joined: fx.Node) -> tuple[fx.Node, bool, fx.Node, fx.Node] | None:
    """(q [B, T, H, D], whether heads came first, cos, sin), if this is q with its last features rotated."""
    parts = _pair(joined)
    rotated = parts and _rotation(parts[1])
    if rotated is None:
        return None
    rope, cos, sin = rotated
    split = rope.args[0] if _is(rope, "getitem") and rope.args[1] == 1 else None
    if split is None or not _is(split, "split") or not _is(parts[0], "getitem") or parts[0].args != (split, 0):
        return None
    q, last = split.args[0], _example(split.args[0]).dim() - 1
    sizes = split.args[1] if len(split.args) > 1 else None
    if last != 3 or sizes not in (widths := [*map(_width, parts)], tuple(widths)) or _dim(split) not in (-1, last):
        return None
    by_head = _is(q, "transpose") and set(q.args[1:]) == {1, 2}
    heads = 1 if by_head else 2
    if any(x.dim() != 4 or x.shape[heads] != 1 or x.requires_grad for x in map(_example, (cos, sin))):
        return None
    return q.args[0] if by_head else q, by_head, cos, sin


def _rotation(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, cos, sin) of `cat((even·cos − odd·sin, odd·cos + even·sin))`, in x's dtype."""
    dtype = _example(node).dtype
    node = node.args[0] if _is(node, "to") else node
    parts = _pair(node)
    if parts is None or not _is(parts[0], "sub") or not _is(parts[1], "add"):
        return None
    products = [*parts[0].args, *parts[1].args]
    if len(products) != 4 or not all(_is(product, "mul") for product in products):
        return None
    if any(node.kwargs for node in (*parts, *products)):
        return None
    (even, cos), (odd, sin), *others = (product.args for product in products)
    if others != [(odd, cos), (even, sin)] or not _is(even, "getitem") or not _is(odd, "getitem"):
        return None
    x = even.args[0]
    is_interleaved = even.args == (x, _EVEN) and odd.args == (x, _ODD)
    return (x, cos, sin) if is_interleaved and _example(x).dtype == dtype else None


def _pair(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that `node` puts one behind the other in their last dimension."""
    if not _is(node, "cat") or not node.args or len(node.args[0]) != 2:
        return None
    return tuple(node.args[0]) if _dim(node) in (-1, _example(node).dim() - 1) else None


def _is(node, name: str) -> bool:
    return isinstance(node, fx.Node) and operator_name(node) == name


def _width(node: fx.Node) -> int:
    return _example(node).shape[-1]


def _dim(node: fx.Node) -> int:
    """The dimension that `cat` or `split` is along."""
    position = 1 if _is(node, "cat") else 2
    return node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)


def _example(node: fx.Node) -> Tensor:
    return node.meta["example_value"]
