"""Weigh a token's experts before their last product, where the weights' gradients need no output of that."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

import dsv3c.operators  # noqa: F401
from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.fuse_permute import result_node
from dsv3c.passes.fuse_quantize import readers
from dsv3c.passes.fuse_routing import result_of
from dsv3c.passes.rewrite import aten, insert, insert_pair, replace, replace_results, under, value

ops = torch.ops.dsv3c


@dataclass(frozen=True)
class WeighActivations:
    """Before: `y = down(swiglu(h))`, then `unpermute(y, weights)`; in backward, `unpermute_backward` of y. After:
    `y = down(swiglu(h)·weights)` and `unpermute(y)`; in backward the gradient of the sum in FP8, permuted, and the
    weights' gradients from `swiglu_quantize_backward`.

    A product with a row's weight commutes with a linear. Behind it, backward needs y, [T·K, H] in BF16, the largest
    value of a layer with 8 experts a token; before it, nothing that is not there anyway. And dy, of which rows of one
    token differ by their weights alone, is one tensor [T, H], cast once and gathered in FP8. NUMERIC: the weight
    gradient's dy is cast twice, as an activation is. Leaves alone: inference, which gains nothing.

    Source: Megatron-LM, megatron/core/transformer/moe/experts.py (weighted_bias_swiglu_impl).
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        sites = sum(map(_weigh, gm.graph.find_nodes(op="call_function", target=ops.unpermute_backward.default)))
        if sites:
            stable_topological_sort(gm.graph)
        return sites


def _weigh(sum_backward: fx.Node) -> int:
    dout, y, inverse, weights = sum_backward.args
    sums = [user for user in y.users if user is not sum_backward]
    if [(user.target, user.args[:3]) for user in sums] != [(ops.unpermute.default, (y, inverse, weights))]:
        return 0
    swiglu = _swiglu(y)
    gradient = swiglu and _gradient(swiglu)
    results = {user.args[1]: user for user in sum_backward.users}
    casts = {reader.target: reader for reader in results[0].users} if 0 in results else {}
    cast, cast_t = (casts.pop(name.default, None) for name in (ops.quantize_tile, ops.quantize_tile_t))
    if gradient is None or cast is None or cast_t is None or casts or 1 not in results:
        return 0
    permutation = result_node(inverse.args[0], 2)
    flat = insert(swiglu, aten.view.default, weights, [-1])
    weight_R = insert(swiglu, aten.index.Tensor, flat, [permutation])
    h, _, *recipe = swiglu.args
    weighed = insert(swiglu, ops.swiglu_quantize_save.default, h, weight_R, *recipe)
    (total,) = sums
    replace(total, insert(total, ops.unpermute.default, y, inverse, None, *total.args[3:]))

    h_fp8, h_scale_inv, da, _, *rest = gradient.args
    backward = insert(gradient, ops.swiglu_quantize_backward.default, h_fp8, h_scale_inv, da, weight_R, *rest)
    dweight_R = insert(gradient, operator.getitem, backward, 6)
    replace(results[1], insert(sum_backward, aten.index.Tensor, dweight_R, [inverse]))
    replace_results(gradient, backward, first=0)
    replace_results(swiglu, weighed, first=0)

    pair = insert_pair(cast, ops.permute.default, *_cast(cast, dout), permutation, inverse)
    gather = pair[0].args[0]
    offs = cast_t.args[1]
    replace_results(cast_t, insert(cast_t, ops.requantize_t.default, *pair, offs, *cast_t.args[2:]), first=0)
    replace_results(cast, gather, first=0)
    return 1


def _swiglu(y: fx.Node) -> fx.Node | None:
    """The unweighed SwiGLU that y is the product of."""
    a_fp8 = y.args[0]
    is_product = y.target is ops.grouped_gemm.default and result_of(a_fp8, ops.swiglu_quantize_save.default, 0)
    return a_fp8.args[0] if is_product and a_fp8.args[0].args[1] is None else None


def _gradient(swiglu: fx.Node) -> fx.Node | None:
    found = (user for result in swiglu.users for user in result.users)
    return next((node for node in found if node.target is ops.swiglu_quantize_backward.default), None)


def _cast(cast: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The pair of x in the recipe of `cast`: one that is there, of any view of x, or a new one."""
    for reader in readers(under(x, aten.view.default)):
        same = reader.target is cast.target and reader.args[1:] == cast.args[1:]
        if same and value(reader.args[0]).shape[1] == value(x).shape[1]:
            return tuple(insert(cast, operator.getitem, reader, index) for index in (0, 1))
    return insert_pair(cast, cast.target, x, *cast.args[1:])
