"""SwiGLU in training: its input saved in FP8, its gradient computed from that and cast where it is computed."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

import dsv3c.operators  # noqa: F401
from dsv3c.passes.contract import Level, Tier, leave
from dsv3c.passes.fuse_quantize import as_rows, readers
from dsv3c.passes.rewrite import aten, end_of, insert, is_backward, replace_results, under, value

ops = torch.ops.dsv3c


@dataclass(frozen=True)
class FuseSwiGLUBackward:
    """Before: `swiglu_quantize(h)`; in backward, from da, all of SwiGLU's gradient dh, its two casts, and the cast of a
    along the rows. After: `swiglu_quantize_save`, whose FP8 copy of h is what is saved instead of h and a, and
    `swiglu_quantize_backward`.

    In BF16, h and dh are the largest values of a layer but for attention's: here h is saved in half the bytes, a is
    computed again, and dh is never written in BF16. NUMERIC for h's rounding, which V3's recipe has too (§3.3.3, "we
    cache the inputs of the SwiGLU operator and recompute its output in the backward pass"). Leaves alone: a gate and up
    from two products, and a dh that has other readers.
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        sites = sum(map(_fuse, gm.graph.find_nodes(op="call_function", target=ops.swiglu_quantize.default)))
        if sites:
            stable_topological_sort(gm.graph)  # a's weight gradient came before dh
        return sites


def _fuse(swiglu: fx.Node) -> int:
    h_RN, weight, *recipe = swiglu.args
    h = under(h_RN, aten.view.default)
    found = _gradient(h)
    if found is None:
        return 0
    da, dh = found
    by_target = {reader.target: reader for reader in readers(dh)}
    cast, cast_t = (by_target.pop(name.default, None) for name in (ops.quantize_tile, ops.quantize_tile_t))
    if cast is None or cast_t is None or by_target or cast.args[1:] != cast_t.args[2:] or cast.args[2] != recipe[1]:
        leave(dh, "a gradient of SwiGLU that is not cast, or not only")
        return 0
    offs, gradient_floor = cast_t.args[1], cast.args[1]
    save = insert(swiglu, ops.swiglu_quantize_save.default, h_RN, weight, *recipe)
    h_pair = [insert(swiglu, operator.getitem, save, index) for index in (2, 3)]
    floors = (recipe[0], gradient_floor, recipe[1])
    arguments = (*h_pair, as_rows(dh, da), weight, offs, *floors)
    backward = insert(dh, ops.swiglu_quantize_backward.default, *arguments)
    casts_of_a = {reader for result in swiglu.users for reader in result.users if _casts_again(reader, offs, recipe)}
    for again in casts_of_a:
        replace_results(again, backward, first=4)
    replace_results(cast, backward, first=0)
    replace_results(cast_t, backward, first=2)
    replace_results(swiglu, save, first=0)
    return 1


def _gradient(h: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(da, dh): what multiplies up in backward, and what the gradients of both halves come together in again."""
    for split in (reader for reader in readers(h) if reader.target is aten.split.Tensor):
        ups = [part for part in split.users if part.args[1] == 1]
        shape = value(split.args[0]).shape
        for product in (user for up in ups for user in up.users if is_backward(user)):
            if product.target is aten.mul.Tensor:
                da = product.args[0] if product.args[1] in ups else product.args[1]
                dh = end_of(
                    da, {h}, lambda node, shape=shape: node.target is aten.cat.default and value(node).shape == shape
                )
                if dh is not None and value(dh).dtype == value(da).dtype == torch.bfloat16:
                    return da, dh
    return None


def _casts_again(reader: fx.Node, offs: fx.Node | None, recipe: list) -> bool:
    return reader.target is ops.requantize_t.default and list(reader.args[2:]) == [offs, *recipe]
