"""Have the product of keys and values store them where attention reads them."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import dsv3c.attention  # noqa: F401
from dsv3c.numerics import TILE
from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.fuse_routing import is_call, result_of
from dsv3c.passes.rewrite import aten, insert, under, value

ops = torch.ops.dsv3c
_ATTENTION = (ops.attention.default, ops.attention_backward.default)


@dataclass(frozen=True)
class PlaceKeys:
    """Before: keys are a copy, `cat` of half of a product and of what all heads share; values are the other half.
    After: both are views of `gemm_keys`, which stores the halves apart and writes the shared part between them.

    NUMERIC: the same product stored elsewhere, by a kernel of ours where the library's, which adds up in another order,
    might have been chosen. Leaves alone: heads of other than 128 features of either half, halves of two products, a
    shared part of no multiple of 8, and keys and values that anything but attention reads.
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        return sum(map(_place, gm.graph.find_nodes(op="call_function", target=ops.attention.default)))


def _place(attention: fx.Node) -> int:
    keys, values = attention.args[1:3]
    joined, second = (_under(x, [0, 2, 1, 3]) for x in (keys, values))
    parts = joined.args[0] if is_call(joined, aten.cat.default) and joined.args[1] in (-1, 3) else ()
    first, shared = (_under(parts[0], [0, 1, 2, 3]), parts[1]) if len(parts) == 2 else (None, None)
    if not result_of(first, aten.split_with_sizes.default, 0) or not result_of(second, first.args[0].target, 1):
        return 0
    if second.args[0] is not first.args[0]:
        return 0
    halves = first.args[0]
    kv, product = halves.args[0], under(halves.args[0], aten.view.default)
    whole = product.target is ops.gemm.default and product.args[4] == value(shared).dtype == torch.bfloat16
    fits = list(halves.args[1]) == [TILE, TILE] and value(kv).dim() == 4 and value(shared).shape[3] % 8 == 0
    readers = {*_readers(product), *_readers(joined)} - {joined}
    if not whole or not fits or value(shared).stride(2) or not all(reader.target in _ATTENTION for reader in readers):
        return 0
    rope = insert(attention, aten.select.int, shared, 2, 0)
    call = insert(attention, ops.gemm_keys.default, *product.args[:4], rope)
    call.meta = product.meta | {"val": value(call)}  # where the product was
    end = value(call).shape[2]
    both = insert(attention, aten.view.default, call, [*kv.args[1][:3], end])
    for old, bounds in ((keys, (0, end - TILE)), (values, (end - TILE, end))):
        part = insert(attention, aten.slice.Tensor, both, 3, *bounds)
        old.replace_all_uses_with(new := insert(attention, aten.permute.default, part, [0, 2, 1, 3]))
        for reader in new.users:  # or Inductor would copy into the strides that eager gave it
            reader.meta["eager_input_vals"] = fx.map_arg((reader.args, reader.kwargs), value)
    return 1


def _under(x: fx.Node, order: list[int]) -> fx.Node | None:
    """What x is a permutation of, if it is the one of this order."""
    found = [0, 1, 2, 3]
    while x.target is aten.permute.default and len(x.args[1]) == 4:
        x, found = x.args[0], [x.args[1][dim] for dim in found]
    return x if found == order else None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads the values, be it through views or in part."""
    for user in node.users:
        if user.target in (aten.view.default, aten.permute.default, aten.split_with_sizes.default, operator.getitem):
            yield from _readers(user)
        else:
            yield user
