"""Put keys together in one way, whatever way the model does."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dsv3c.passes.contract import Level, Tier, operator_name
from dsv3c.passes.rewrite import erase_unread, insert_captured


@dataclass(frozen=True)
class JoinKeys:
    """Before: keys as an empty tensor that both parts are copied into, heads before tokens. After: `cat` of both,
    tokens before heads, as kv_b's linear wrote the first one.

    Functionalized, the copies become five more of all keys in training; and the gradients of keys and values lie in
    memory with tokens first, so that one copy puts them together. Keys are the same bits; NUMERIC because the gradient
    of what the heads share is summed in another order. Leaves alone: other slices, and keys that are read before both
    copies are there.
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.CAPTURED

    def __call__(self, gm: fx.GraphModule) -> int:
        return sum(map(_join, [node for node in gm.graph.nodes if operator_name(node) == "new_empty"]))


def _join(keys: fx.Node) -> int:
    parts = _copied(keys)
    if parts is None:
        return 0
    slices, copies = parts
    heads = _first_of_two(copies[0].args[1])
    if heads is None:
        return 0
    split, kv = heads
    both = insert_captured(split, "split", kv, split.args[1], dim=-1)
    for part in list(split.users):
        tokens_first = insert_captured(part, operator.getitem, both, part.args[1])
        part.replace_all_uses_with(insert_captured(part, "transpose", tokens_first, 1, 2))
        keys.graph.erase_node(part)
    at = copies[1]
    tokens_first = [insert_captured(at, "transpose", part.args[1], 1, 2) for part in copies]
    joined = insert_captured(at, torch.cat, tokens_first, dim=-1)
    joined = insert_captured(at, "transpose", joined, 1, 2)
    for node in (*reversed(copies), *slices):
        keys.graph.erase_node(node)
    keys.replace_all_uses_with(joined)
    erase_unread(keys)
    erase_unread(split)
    return 1


def _copied(keys: fx.Node) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """The two slices of the last dimension that fill `keys`, and the copies into them."""
    order = {node: index for index, node in enumerate(keys.graph.nodes)}
    slices = sorted((user for user in keys.users if user.target is operator.getitem), key=order.get)
    copies = [user for part in slices for user in part.users]
    if len(slices) != 2 or len(copies) != 2 or any(operator_name(copy) != "copy_" for copy in copies):
        return None
    width = slices[0].meta["example_value"].shape[-1]
    filled = [part.args[1] for part in slices] == [(Ellipsis, slice(None, width)), (Ellipsis, slice(width, None))]
    into = [copy.args[0] for copy in copies] == slices and not any(copy.users for copy in copies)
    read_after = all(order[user] > order[copies[1]] for user in keys.users if user not in slices)
    return (slices, copies) if filled and into and read_after else None


def _first_of_two(nope: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(split, kv [B, T, H, d]), if `nope` is the first of two parts of kv with heads and tokens exchanged."""
    if nope.target is not operator.getitem or nope.args[1] != 0 or operator_name(nope.args[0]) != "split":
        return None
    split = nope.args[0]
    if len(split.args) < 2 or not isinstance(split.args[1], (list, tuple)):
        return None
    exchanged, last = split.args[0], split.args[0].meta["example_value"].dim() - 1
    dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    if last != 3 or dim not in (-1, last) or len(split.args[1]) != 2 or operator_name(exchanged) != "transpose":
        return None
    return (split, exchanged.args[0]) if set(exchanged.args[1:]) == {1, 2} else None
