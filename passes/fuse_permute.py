"""Rows to their experts and back, as operators of ours. Reads what `FuseRouting` leaves: permutations of
`sort_by_expert`."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dsv3c.numerics import E4M3
from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.fuse_routing import VIEWS, bare, is_call, result_of, users_through
from dsv3c.passes.rewrite import aten, insert, insert_pair, replace, value

prims, ops = torch.ops.prims, torch.ops.dsv3c


@dataclass(frozen=True)
class FusePermute:
    """Before: index of FP8 rows and scales by token; the weighted sum over a token's experts, and what is added to it;
    the gradients of both, as index_put, and what is added to the former. After: `permute`, `unpermute`,
    `unpermute_backward`.

    Sums over a token's experts are float32 and rounded once, shared expert and residual, or their gradients, included;
    gradients of rows are no longer added up in BF16, by atomics. Leaves alone: rows in another order than
    `sort_by_expert`'s.
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        steps = (_fuse_permute, _fuse_unpermute, _fuse_unpermute_backward, _fuse_permute_backward)
        return sum(step(node) for step in steps for node in list(gm.graph.nodes) if node.op == "call_function")


def _order(node, result: int) -> fx.Node | None:
    """The sort whose permutation (2) or inverse (3) this is."""
    node = bare(node)
    return node.args[0] if result_of(node, ops.sort_by_expert.default, result) else None


def _tokens(node) -> fx.Node | None:
    """The sort, if these are the tokens of its rows."""
    floor = is_call(node, aten.div.Tensor_mode) and node.kwargs.get("rounding_mode") == "floor"
    sort = _order(node.args[0], 2) if floor else None
    return sort if sort is not None and node.args[1] == value(sort.args[0]).shape[1] else None


def result_node(sort: fx.Node, index: int) -> fx.Node:
    found = (user for user in sort.users if user.args[1] == index)
    return next(found, None) or insert(sort.next, operator.getitem, sort, index)


# -- rows to their experts --


def _fuse_permute(gather: fx.Node) -> int:
    """An index of FP8 rows by token, and the same of their scales."""
    if not is_call(gather, aten.index.Tensor) or len(gather.args[1]) != 1 or value(gather).dtype != E4M3:
        return 0
    tokens, x = gather.args[1][0], gather.args[0]
    sort = _tokens(tokens)
    for columns in tokens.users if sort is not None else ():
        if not is_call(columns, aten.index.Tensor) or list(columns.args[1]) != [None, tokens]:
            continue
        scale_inv, rows = columns.args[0].args[0], next(iter(columns.users))
        if is_call(x, operator.getitem) and is_call(scale_inv, operator.getitem) and scale_inv.args[0] is x.args[0]:
            orders = result_node(sort, 2), result_node(sort, 3)
            fp8, gathered = insert_pair(gather, ops.permute.default, x, scale_inv, *orders)
            replace(gather, fp8)
            replace(rows, gathered)
            return 1
    return 0


def _fuse_permute_backward(scatter: fx.Node) -> int:
    """Gradients of rows, added up by token, and what is added next: gradients by the shared expert and the gate."""
    if not is_call(scatter, aten.index_put.default) or list(scatter.args[3:]) != [True] or len(scatter.args[1]) != 1:
        return 0
    sort = _tokens(scatter.args[1][0])
    if sort is None or value(scatter).dim() != 2 or not is_call(scatter.args[0], aten.full.default):
        return 0
    return _unpermute(scatter, scatter.args[2], sort, None)


# -- and back --


def _rows_of(node, sort: fx.Node | None = None) -> tuple[fx.Node, fx.Node] | None:
    """(y, sort) of `y[inverse]`."""
    node = bare(node)
    if not is_call(node, aten.index.Tensor) or len(node.args[1]) != 1:
        return None
    found = _order(node.args[1][0], 3)
    return (node.args[0], found) if found is not None and found in (sort or found,) else None


def _weights_of(node, sort: fx.Node) -> fx.Node | None:
    """topk_weights, if these are they, in the order of tokens or gathered into the order of rows."""
    node = bare(node)
    if is_call(node, aten.index.Tensor) and _order(node.args[1][0], 2) is sort:
        node = bare(node.args[0])
    same = isinstance(node, fx.Node) and value(node).shape == value(result_node(sort, 3)).shape
    return node if same and value(node).dtype == torch.float32 else None


def _weighted_rows(summed: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(y, sort, topk_weights) of `y[inverse] * topk_weights`, or of the rows multiplied first."""
    found = _rows_of(summed)  # multiplied first
    if found is not None:
        product, sort = bare(found[0]), found[1]
        if is_call(product, aten.mul.Tensor):
            y, weights = product.args
            return (y, sort, w) if (w := _weights_of(weights, sort)) is not None else None
    elif is_call(summed, aten.mul.Tensor) and (found := _rows_of(summed.args[0])) is not None:
        y, sort = found
        return (y, sort, w) if (w := _weights_of(summed.args[1], sort)) is not None else None
    return None


def _fuse_unpermute(total: fx.Node) -> int:
    """The sum over a token's experts, and what is added to it next: the shared expert, the residual stream."""
    if not is_call(total, aten.sum.dim_IntList) or list(total.args[1]) != [1] or value(total).dim() != 2:
        return 0
    found = _weighted_rows(total.args[0])
    if found is None:
        return 0
    return _unpermute(total, *found)


def _unpermute(total: fx.Node, y: fx.Node, sort: fx.Node, weights: fx.Node | None) -> int:
    """In place of `total` and of what is added to it next."""
    last, shape, terms = total, None, []
    while len(last.users) == 1:
        (user,) = last.users
        if is_call(user, aten.add.Tensor):
            term = user.args[1] if user.args[0] is last else user.args[0]
            if len(terms) == 2 or len(user.args) > 2 or user.kwargs or not _like(term, last):
                break
            terms.append(term)
        elif is_call(user, aten.view.default):
            shape = user.args[1]
        elif not is_call(user, prims.convert_element_type.default) or value(user).dtype != value(y).dtype:
            break
        last = user
    if value(last).dtype != value(y).dtype:
        return 0
    flat = [insert(last, aten.view.default, term, [-1, value(y).shape[1]]) for term in terms]
    added, residual = (*flat, None, None)[:2]
    out = insert(last, ops.unpermute.default, y, result_node(sort, 3), weights, added, residual)
    for key in ("nn_module_stack", "fwd_nn_module_stack"):  # what autograd adds up belongs to no module
        if key in total.meta:
            out.meta.setdefault(key, total.meta[key])
    replace(last, out if shape is None else insert(last, aten.view.default, out, shape))
    return 1


def _like(term, other: fx.Node) -> bool:
    """Whether it can be added as it lies."""
    if not isinstance(term, fx.Node) or value(term).shape != value(other).shape:
        return False
    return value(term).dtype == value(other).dtype and value(term).stride() == value(other).stride()


def _fuse_unpermute_backward(scatter: fx.Node) -> int:
    """Gradients of the rows, scattered into their order, and of the weights, summed over features."""
    if not is_call(scatter, aten.index_put.default) or list(scatter.args[3:]) != [True] or len(scatter.args[1]) != 1:
        return 0
    sort = _order(scatter.args[1][0], 3)
    if sort is None or not is_call(scatter.args[0], aten.full.default):
        return 0
    source = bare(scatter.args[2])
    if is_call(source, aten.mul.Tensor):  # weighted, then scattered
        dout, weights, dy = bare(source.args[0]), _weights_of(source.args[1], sort), scatter
        products = [(p, _rows_of(p.args[1], sort)) for p in users_through(dout, aten.mul.Tensor)]
    else:  # scattered, then weighted
        dout, weights, dy = source, None, scatter
        products = [(p, (p.args[1], sort)) for p in users_through(scatter, aten.mul.Tensor)]
        for product, _ in products:
            if (found := _weights_of(product.args[1], sort)) is not None:
                casts = (user for user in product.users if is_call(user, prims.convert_element_type.default))
                weights, dy = found, next(casts, product)  # of float32 rows there is no cast
    for product, rows in products:
        sums = [s for s in product.users if is_call(s, aten.sum.dim_IntList)]
        if rows is None or not sums or weights is None or value(rows[0]).dtype != value(dy).dtype:
            continue
        dweights = _by_token(sums[0], sort)
        if dweights is None or value(dout).dtype != value(dy).dtype:
            continue
        first = min((scatter, sums[0]), key=list(scatter.graph.nodes).index)
        dout = insert(first, aten.view.default, dout, [-1, value(dy).shape[1]])
        arguments = (dout, rows[0], result_node(sort, 3), weights)
        dy_new, dweights_new = insert_pair(first, ops.unpermute_backward.default, *arguments)
        replace(dweights, dweights_new)
        replace(dy, dy_new)
        return 1
    return 0


def _by_token(total: fx.Node, sort: fx.Node) -> fx.Node | None:
    """The node [T, K] that sums of rows end in: a view, or scattered out of the rows' order first."""
    for node in (total, *users_through(total, aten.index_put.default)):
        if node is not total and _order(node.args[1][0], 2) is not sort:
            continue
        for user in node.users:
            if user.target in VIEWS and value(user).shape == value(result_node(sort, 3)).shape:
                return user
    return None
