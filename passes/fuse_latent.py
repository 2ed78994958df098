"""The latent in one launch: norm, rotation, and the cast for the product that expands it or the way into the cache."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

import dsv3c.operators  # noqa: F401
from dsv3c.numerics import TILE
from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.fuse_quantize import columns_as_rows, columns_of, norm_of, readers, replace_rstd, shaped
from dsv3c.passes.fuse_routing import bare, is_call, result_of
from dsv3c.passes.rewrite import aten, insert, is_backward, replace, replace_results, size, value

prims, ops = torch.ops.prims, torch.ops.dsv3c
_END = 2**63 - 1


@dataclass(frozen=True)
class FuseLatent:
    """Before: `cat((norm(x[..K]), rotate(x[K..])))`, and `quantize_tile` of its first K columns; or, of one new token a
    sequence, its way into the cache's pages. After: `latent_quantize`, whose 1/rms backward reads; or `latent_append_`,
    in the form that stands for "into a copy of the pages" in a functional graph.

    Inductor makes two kernels of norm and rotation; the cast, or the write, is a third one. On an H200 of 4096 tokens
    8.5 us and 3 gaps become 5.2 and one, of 64 new tokens 4.9 become 1.8 (kernels inside a model, x in the L2 cache).
    NUMERIC because the float32 sums of squares are associated otherwise. Runs behind `AbsorbAttention`, which reads the
    pages where they are. Leaves alone: x in two pieces that are not neighbours, a K of no multiple of 128, pairs that
    are no power of two, angles of other than float32, several new tokens for pages, and a latent that is neither cast
    nor put into pages, or not put together, as transformers' is not (it caches both parts apart).
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        joined = gm.graph.find_nodes(op="call_function", target=aten.cat.default)
        return sum(_fuse(node) for node in list(joined) if not is_backward(node))


class _Rotation(NamedTuple):
    x: fx.Node  # [.., 2r], interleaved pairs
    cos: fx.Node
    sin: fx.Node


class _Write(NamedTuple):
    call: fx.Node  # index_put
    pages: fx.Node
    table: fx.Node
    lengths: fx.Node


def _fuse(joined: fx.Node) -> int:
    normed, turned = _pair(joined) or (None, None)
    norm, rotation = normed and norm_of(normed), turned and _rotation(turned)
    if norm is None or rotation is None or set(norm.normed.users) != {normed}:
        return 0
    (x, first), (same, behind) = columns_of(norm.x), columns_of(rotation.x)
    K, pairs = value(norm.x).shape[-1], value(rotation.cos).shape[-1]
    if x is not same or behind != first + K or K % TILE or pairs & (pairs - 1):
        return 0
    cast, write = next(_casts(joined), None), _write(joined)
    if any(value(angle).dtype != torch.float32 for angle in rotation[1:]) or not (cast or write):
        return 0
    x_RL = columns_as_rows(joined, x, first, K + 2 * pairs)
    cos, sin = (_by_row(joined, angle, norm.x) for angle in rotation[1:])
    if cast:
        call = insert(joined, ops.latent_quantize.default, x_RL, norm.weight, cos, sin, norm.eps, *cast.args[1:])
        replace_rstd(norm, insert(joined, operator.getitem, call, 3))
        for each in [each for each in _casts(joined) if each.args[1:] == cast.args[1:]]:
            replace_results(each, call, first=1)
    else:
        operands = {"pages": write.pages, "x": x_RL, "weight": norm.weight, "cos": cos, "sin": sin, "eps": norm.eps}
        operands |= {"table": write.table, "lengths": write.lengths}
        call = insert(joined, auto_functionalized, ops.latent_append_.default, **operands)
        replace(write.call, insert(joined, operator.getitem, call, 1))
    replace(joined, shaped(joined, insert(joined, operator.getitem, call, 0), norm.x))
    return 1


def _write(joined: fx.Node) -> _Write | None:
    """Where `Pages.append` puts one new token a sequence."""
    for put in joined.graph.find_nodes(op="call_function", target=aten.index_put.default):
        pages, places, latent = put.args[:3]
        if len(put.args) > 3 or bare(latent) is not joined or len(places) != 2 or None in places:
            continue
        gather, place = bare(places[0]), bare(places[1])
        if not is_call(gather, aten.gather.default) or not is_call(place, aten.remainder.Scalar):
            continue
        (table, dim, number), (position, size) = gather.args, place.args
        divided = is_call(number, aten.div.Tensor_mode) and number.kwargs == {"rounding_mode": "floor"}
        lengths = bare(position)
        if is_call(lengths, aten.slice.Tensor) and lengths.args[2:] == (0, _END):
            lengths = bare(lengths.args[0])
        known = all(node.op == "placeholder" for node in (pages, table, lengths))
        if dim == 1 and divided and number.args == (position, size) and known and _fit(joined, pages, table, lengths):
            return _Write(put, pages, table, lengths)
    return None


def _fit(joined: fx.Node, *where: fx.Node) -> bool:
    """Whether this is a latent for each sequence, and these are such pages as `latent_append_` takes."""
    (B, *_, L), (pages, table, lengths) = value(joined).shape, map(value, where)
    sequences = lengths.dim() == 1 and table.shape[0] == lengths.shape[0] == B
    numbers = table.dtype == lengths.dtype == torch.int32 and pages.dtype == value(joined).dtype
    return sequences and numbers and pages.shape[2] == L and pages.is_contiguous()


def _by_row(at: fx.Node, angle: fx.Node, like: fx.Node) -> fx.Node:
    """An angle [1 or B, T, r] for each row."""
    sizes = [size(at, like, dim) for dim in range(value(like).dim() - 1)]
    angle = insert(at, aten.expand.default, angle, [*sizes, -1])
    if not value(angle).is_contiguous():
        angle = insert(at, aten.clone.default, angle, memory_format=torch.contiguous_format)
    return insert(at, aten.view.default, angle, [-1, value(angle).shape[-1]])


def _casts(joined: fx.Node) -> Iterator[fx.Node]:
    """Of the first of its two parts."""
    for split in joined.users:
        for part in split.users if split.target is aten.split_with_sizes.default else ():
            first = result_of(part, aten.split_with_sizes.default, 0)
            yield from (reader for reader in readers(part) if first and reader.target is ops.quantize_tile.default)


def _rotation(turned: fx.Node) -> _Rotation | None:
    """`cat((even·cos − odd·sin, odd·cos + even·sin))` in float32, rounded."""
    halves = _pair(turned.args[0]) if turned.target is prims.convert_element_type.default else None
    if halves is None or not is_call(halves[0], aten.sub.Tensor) or not is_call(halves[1], aten.add.Tensor):
        return None
    products = [*halves[0].args, *halves[1].args]
    if any(half.kwargs for half in halves) or not all(is_call(product, aten.mul.Tensor) for product in products):
        return None
    (even, cos), (odd, sin), *others = (product.args for product in products)
    if others != [(odd, cos), (even, sin)] or not all(is_call(half, aten.slice.Tensor) for half in (even, odd)):
        return None
    x, last = even.args[0], value(even).dim() - 1
    interleaved = even.args == (x, last, 0, _END, 2) and odd.args == (x, last, 1, _END, 2)
    same = value(x).dtype == value(turned).dtype == torch.bfloat16
    return _Rotation(x, cos, sin) if interleaved and same and value(cos).dim() == last + 1 else None


def _pair(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that `node` puts one behind the other in their last dimension."""
    if not is_call(node, aten.cat.default) or node.args[1:] not in ((-1,), (value(node).dim() - 1,)):
        return None
    return tuple(node.args[0]) if len(node.args[0]) == 2 else None
