"""Routing as its own operators: the gate, the sort by expert, and the moves of rows there and back.

Each piece is found on its own and rewritten on its own; what is left of the others reads the new values, so a piece
that is not recognised costs speed and nothing else. Views and casts are looked through: AOTAutograd and the two models
place them differently.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dsv3c.numerics import E4M3
from dsv3c.passes.contract import Level, Tier, leave
from dsv3c.passes.rewrite import aten, insert, insert_pair, is_backward, replace, value

prims, ops = torch.ops.prims, torch.ops.dsv3c

_VIEWS = (
    aten.view.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.clone.default,
    aten.alias.default,
)


@dataclass(frozen=True)
class FuseRouting:
    """Before: aten's sigmoid, topk, gather, sort, scatter, index, sums and their gradients. After: `gate`,
    `sort_by_expert`, `permute`, `unpermute`, `gate_backward`, `unpermute_backward`.

    Sums over a token's experts are float32 and rounded once, shared expert and residual included; gradients of rows
    are no longer added up in BF16 by atomics. The experts chosen are the same, but for equal scores (`gate_ref`).
    Leaves alone: gates of another form, and float64.
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        steps = (
            _fuse_gate,
            _fuse_sort,
            _fuse_permute,
            _fuse_unpermute,
            _fuse_unpermute_backward,
            _fuse_permute_backward,
        )
        return sum(step(node) for step in steps for node in list(gm.graph.nodes) if node.op == "call_function")


def _bare(node, through: tuple = (*_VIEWS, prims.convert_element_type.default)):
    """The node under views and casts."""
    while isinstance(node, fx.Node) and node.target in through:
        node = node.args[0]
    return node


def _is(node, *targets) -> bool:
    return isinstance(node, fx.Node) and node.target in targets


def _users(node: fx.Node, *targets) -> Iterator[fx.Node]:
    """Users that call one of `targets`, forward ones first, seen through views and casts."""
    for user in sorted(node.users, key=is_backward):
        if user.target in targets:
            yield user
        elif user.target in (*_VIEWS, prims.convert_element_type.default):
            yield from _users(user, *targets)


def _result(node, target, index: int) -> bool:
    """Whether this is result number `index` of a call of `target`."""
    return _is(node, operator.getitem) and _is(node.args[0], target) and node.args[1] == index


# -- the gate --


@dataclass
class _Gate:
    logits: fx.Node
    scores: fx.Node
    bias: fx.Node | None
    n_group: int
    topk_group: int


def _fuse_gate(topk: fx.Node) -> int:
    """A topk whose indices choose what is gathered from the scores; with its gradient, if there is one."""
    if not _is(topk, aten.topk.default) or (gate := _choice(topk.args[0])) is None:
        return 0
    idx = next((user for user in topk.users if user.args[1] == 1), None)
    chosen = next((g for g in _users(gate.scores, aten.gather.default) if g.args[2] is idx), None)
    if chosen is None or len(topk.users) > 1:
        return 0
    quotient = next((q for q in _users(chosen, aten.div.Tensor) if _normalises(q, chosen)), None)
    product = next((p for p in _users(quotient or chosen, aten.mul.Tensor) if isinstance(p.args[1], float)), None)
    if product is None:
        leave(topk, "the chosen scores are not multiplied by a factor")
        return 0
    formula = (quotient is not None, product.args[1])
    gradient = _gate_gradient(idx, gate.scores, product.args[1])
    if gate.bias is not None and value(gate.bias).dtype != torch.float32:  # exact, and what the addition does
        gate.bias = insert(topk, prims.convert_element_type.default, gate.bias, torch.float32)
    sizes = (gate.n_group, gate.topk_group, topk.args[1])
    weights, idx32 = insert_pair(topk, ops.gate.default, gate.logits, gate.bias, *sizes, *formula)
    if gradient is not None:
        dweights, dlogits = gradient
        arguments = (dweights, gate.logits, idx32, gate.bias is None, *formula)
        replace(dlogits, insert(dlogits, ops.gate_backward.default, *arguments))
    replace(idx, insert(topk, prims.convert_element_type.default, idx32, torch.int64))
    replace(product, weights)
    return 1 + (gradient is not None)


def _choice(choice: fx.Node) -> _Gate | None:
    """From the values that experts are chosen by to the logits."""
    if value(choice).dim() != 2 or value(choice).dtype != torch.float32:
        return None
    n_group = topk_group = 1
    worth = None
    biased = _bare(choice, _VIEWS)
    if _is(biased, aten.where.self):
        dropped, fill, biased = biased.args
        biased = _bare(biased, _VIEWS)
        marked = _bare(dropped, (*_VIEWS, prims.convert_element_type.default, aten.bitwise_not.default))
        if not _is(marked, aten.scatter.value) or _bare(fill).args[0] != -math.inf:
            return None
        inverted = any(_is(node, aten.bitwise_not.default) for node in _path(dropped, marked))
        if bool(marked.args[3]) != inverted or bool(marked.args[0].args[1]) == inverted:
            return None  # what is marked must be what is kept
        group_idx = marked.args[2]
        if not _result(group_idx, aten.topk.default, 1):
            return None
        worth, topk_group = group_idx.args[0].args[:2]
        n_group = int(value(marked).shape[1])
    scores, bias = biased.args[:2] if _is(biased, aten.add.Tensor) else (biased, None)
    if bias is not None and _is(scores, aten.sigmoid.default):
        logits = scores.args[0]
    elif bias is None and _is(scores, aten.div.Tensor) and _is(scores.args[0], aten.exp.default):
        logits = _softmax_of(scores)
    else:
        return None
    if logits is None or (worth is not None and not _worth(worth, biased, bias is not None)):
        return None
    return _Gate(logits, scores, bias, n_group, topk_group)


def _path(node: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    while node is not end:
        yield node
        node = node.args[0]


def _softmax_of(scores: fx.Node) -> fx.Node | None:
    exp, total = scores.args
    difference = exp.args[0]
    if not _is(difference, aten.sub.Tensor) or not _is(total, aten.sum.dim_IntList) or total.args[0] is not exp:
        return None
    logits, top = difference.args
    return logits if _is(top, aten.amax.default) and top.args[0] is logits else None


def _worth(worth: fx.Node, biased: fx.Node, is_v3: bool) -> bool:
    """Whether groups are worth the sum of their two best (V3) or their best (V2)."""
    if not is_v3:
        return _is(worth, aten.amax.default) and _bare(worth.args[0], _VIEWS) is biased
    if not _is(worth, aten.sum.dim_IntList) or not _result(worth.args[0], aten.topk.default, 0):
        return False
    best = worth.args[0].args[0]
    return best.args[1] == 2 and _bare(best.args[0], _VIEWS) is biased


def _normalises(quotient: fx.Node, chosen: fx.Node) -> bool:
    total = quotient.args[1]
    return (
        _bare(quotient.args[0]) is chosen
        and _is(total, aten.add.Tensor)
        and total.args[1] == 1e-20
        and _is(total.args[0], aten.sum.dim_IntList)
        and total.args[0].args[0] is chosen
    )


def _gate_gradient(idx: fx.Node, scores: fx.Node, factor: float) -> tuple[fx.Node, fx.Node] | None:
    """(dweights, dlogits): all that lies between them reads the gate's forward values and nothing else."""
    spread = next((s for s in _users(idx, aten.scatter_add.default) if s.args[2] is idx), None)
    if spread is None:
        return None
    forward = _reached({scores}, lambda node: not is_backward(node)) | {scores, idx, spread.args[0]}
    entry = next((n for n in _ancestors(spread, forward) if _is(n, aten.mul.Tensor) and n.args[1] == factor), None)
    if entry is None:
        return None
    inner = _reached({entry}, lambda node: node.target not in (aten.mm.default, aten.permute.default))
    known = inner | forward | _reached(forward, is_backward) | {entry}
    if not all(argument in known for node in inner for argument in node.all_input_nodes):
        leave(spread, "the scores have another gradient besides the weights'")
        return None
    exits = [node for node in inner if any(user not in inner for user in node.users)]
    return (entry.args[0], exits[0]) if len(exits) == 1 else None


def _reached(start: set[fx.Node], keep) -> set[fx.Node]:
    """Everything computed from `start` by nodes that `keep` accepts."""
    reached, frontier = set(), list(start)
    while frontier:
        for user in frontier.pop().users:
            if user not in reached and user.op == "call_function" and keep(user):
                reached.add(user)
                frontier.append(user)
    return reached


def _ancestors(node: fx.Node, stop: set[fx.Node]) -> Iterator[fx.Node]:
    for argument in node.all_input_nodes:
        if argument not in stop:
            yield argument
            yield from _ancestors(argument, stop)


# -- the sort --


def _fuse_sort(sort: fx.Node) -> int:
    """A sort of expert numbers; what is derived from it by counting, and its inverse by scattering."""
    if not _is(sort, aten.sort.default, aten.sort.stable):
        return 0
    flat = sort.args[0]
    idx, permutation = _bare(flat, _VIEWS), next((u for u in sort.users if u.args[1] == 1), None)
    ends = next(_ends(flat, sort), None)
    if ends is None or permutation is None or value(flat).dim() != 1 or value(idx).dim() != 2:
        return 0
    narrow = _bare(idx)
    if value(narrow).dtype != torch.int32:
        narrow = insert(sort, prims.convert_element_type.default, idx, torch.int32)
    call = insert(sort, ops.sort_by_expert.default, narrow, int(value(ends).shape[0]))
    offs, order, inverse = (insert(sort, operator.getitem, call, i) for i in (1, 2, 3))
    replace(ends, offs)
    for scattered in list(_users(permutation, aten.scatter.src, aten.index_put.default)):
        if _inverts(scattered, permutation):
            wide = insert(scattered, prims.convert_element_type.default, inverse, torch.int64)
            replace(scattered, insert(scattered, aten.view.default, wide, [-1]))
    replace(permutation, insert(sort, prims.convert_element_type.default, order, torch.int64))
    return 1


def _ends(flat: fx.Node, sort: fx.Node) -> Iterator[fx.Node]:
    """int32 running sums of how many copies each expert has: counted by adding ones, or by a histogram."""
    counts = [s for s in flat.users if _is(s, aten.scatter_add.default) and s.args[2] is flat]
    for ordered in (user for user in sort.users if user.args[1] == 0):
        counts += [h for h in _users(ordered, aten.histc.default) if h.args[2:] == (0, h.args[1] - 1)]
    for count in counts:
        yield from (c for c in count.users if _is(c, aten.cumsum.default) and value(c).dtype == torch.int32)


def _inverts(node: fx.Node, permutation: fx.Node) -> bool:
    if _is(node, aten.scatter.src):
        return node.args[2] is permutation and _is(node.args[3], prims.iota.default)
    return list(node.args[1]) == [permutation] and _is(node.args[2], prims.iota.default) and len(node.args) == 3


def _order(node, result: int) -> fx.Node | None:
    """The sort whose permutation (2) or inverse (3) this is."""
    node = _bare(node)
    return node.args[0] if _result(node, ops.sort_by_expert.default, result) else None


def _tokens(node) -> fx.Node | None:
    """The sort, if these are the tokens of its rows."""
    floor = _is(node, aten.div.Tensor_mode) and node.kwargs.get("rounding_mode") == "floor"
    sort = _order(node.args[0], 2) if floor else None
    return sort if sort is not None and node.args[1] == value(sort.args[0]).shape[1] else None


def _getitem(sort: fx.Node, index: int) -> fx.Node:
    return next(user for user in sort.users if user.args[1] == index)


# -- rows to their experts --


def _fuse_permute(gather: fx.Node) -> int:
    """An index of FP8 rows by token, and the same of their scales."""
    if not _is(gather, aten.index.Tensor) or len(gather.args[1]) != 1 or value(gather).dtype != E4M3:
        return 0
    (tokens,), x = gather.args[1], gather.args[0]
    sort = _tokens(tokens)
    for columns in tokens.users if sort is not None else ():
        if not _is(columns, aten.index.Tensor) or list(columns.args[1]) != [None, tokens]:
            continue
        scale_inv, rows = columns.args[0].args[0], next(iter(columns.users))
        if _is(x, operator.getitem) and _is(scale_inv, operator.getitem) and scale_inv.args[0] is x.args[0]:
            orders = _getitem(sort, 2), _getitem(sort, 3)
            fp8, gathered = insert_pair(gather, ops.permute.default, x, scale_inv, *orders)
            replace(gather, fp8)
            replace(rows, gathered)
            return 1
    return 0


def _fuse_permute_backward(scatter: fx.Node) -> int:
    """Gradients of rows, added up by token."""
    if not _is(scatter, aten.index_put.default) or list(scatter.args[3:]) != [True] or len(scatter.args[1]) != 1:
        return 0
    sort = _tokens(scatter.args[1][0])
    if sort is None or value(scatter).dim() != 2 or not _is(scatter.args[0], aten.full.default):
        return 0
    inverse = _getitem(sort, 3)
    replace(scatter, insert(scatter, ops.unpermute.default, scatter.args[2], inverse, None, None, None))
    return 1


# -- and back --


def _rows_of(node, sort: fx.Node | None = None) -> tuple[fx.Node, fx.Node] | None:
    """(y, sort) of `y[inverse]`."""
    node = _bare(node)
    if not _is(node, aten.index.Tensor) or len(node.args[1]) != 1:
        return None
    found = _order(node.args[1][0], 3)
    return (node.args[0], found) if found is not None and found in (sort or found,) else None


def _weights_of(node, sort: fx.Node) -> fx.Node | None:
    """topk_weights, if these are they, in the order of tokens or gathered into the order of rows."""
    node = _bare(node)
    if _is(node, aten.index.Tensor) and _order(node.args[1][0], 2) is sort:
        node = _bare(node.args[0])
    same = isinstance(node, fx.Node) and value(node).shape == value(_getitem(sort, 3)).shape
    return node if same and value(node).dtype == torch.float32 else None


def _weighted_rows(summed: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(y, sort, topk_weights) of `y[inverse] * topk_weights`, or of the rows multiplied first."""
    found = _rows_of(summed)  # multiplied first
    if found is not None:
        product, sort = _bare(found[0]), found[1]
        if _is(product, aten.mul.Tensor):
            y, weights = product.args
            return (y, sort, w) if (w := _weights_of(weights, sort)) is not None else None
    elif _is(summed, aten.mul.Tensor) and (found := _rows_of(summed.args[0])) is not None:
        y, sort = found
        return (y, sort, w) if (w := _weights_of(summed.args[1], sort)) is not None else None
    return None


def _fuse_unpermute(total: fx.Node) -> int:
    """The sum over a token's experts, and what is added to it next: the shared expert, the residual stream."""
    if not _is(total, aten.sum.dim_IntList) or list(total.args[1]) != [1] or value(total).dim() != 2:
        return 0
    found = _weighted_rows(total.args[0])
    if found is None:
        return 0
    y, sort, weights = found
    last, shape, terms = total, None, []
    while len(last.users) == 1:
        (user,) = last.users
        if _is(user, prims.convert_element_type.default, aten.view.default):
            shape = user.args[1] if user.target is aten.view.default else shape
        elif _is(user, aten.add.Tensor) and len(terms) < 2 and len(user.args) == 2 and not user.kwargs:
            other = user.args[1] if user.args[0] is last else user.args[0]
            if not isinstance(other, fx.Node) or value(other).shape != value(last).shape:
                break
            terms.append(other)
        else:
            break
        if value(user).dtype != value(y).dtype or any(value(t).dtype != value(y).dtype for t in terms):
            terms = terms[:-1] if _is(user, aten.add.Tensor) else terms
            break
        last = user
    if value(last).dtype != value(y).dtype:
        return 0
    flat = [insert(last, aten.view.default, term, [-1, value(y).shape[1]]) for term in terms]
    added, residual = (*flat, None, None)[:2]
    out = insert(last, ops.unpermute.default, y, _getitem(sort, 3), weights, added, residual)
    replace(last, out if shape is None else insert(last, aten.view.default, out, shape))
    return 1


def _fuse_unpermute_backward(scatter: fx.Node) -> int:
    """Gradients of the rows, scattered into their order, and of the weights, summed over features."""
    if not _is(scatter, aten.index_put.default) or list(scatter.args[3:]) != [True] or len(scatter.args[1]) != 1:
        return 0
    sort = _order(scatter.args[1][0], 3)
    if sort is None or not _is(scatter.args[0], aten.full.default):
        return 0
    source = _bare(scatter.args[2])
    if _is(source, aten.mul.Tensor):  # weighted, then scattered
        dout, weights, dy = _bare(source.args[0]), _weights_of(source.args[1], sort), scatter
        products = ((p, _rows_of(p.args[1], sort)) for p in _users(dout, aten.mul.Tensor))
    else:  # scattered, then weighted
        dout, weights, dy = source, None, None
        for product in _users(scatter, aten.mul.Tensor):
            if (w := _weights_of(product.args[1], sort)) is not None:
                weights, dy = w, next((u for u in product.users if _is(u, prims.convert_element_type.default)), product)
        products = ((p, (p.args[1], sort)) for p in _users(scatter, aten.mul.Tensor) if p is not dy)
    for product, rows in products:
        sums = [s for s in product.users if _is(s, aten.sum.dim_IntList)]
        if rows is None or not sums or weights is None or value(rows[0]).dtype != value(dy).dtype:
            continue
        dweights = _by_token(sums[0], sort)
        if dweights is None or value(dout).dtype != value(dy).dtype:
            continue
        first = min((scatter, sums[0]), key=list(scatter.graph.nodes).index)
        dout = insert(first, aten.view.default, dout, [-1, value(dy).shape[1]])
        arguments = (dout, rows[0], _getitem(sort, 3), weights)
        dy_new, dweights_new = insert_pair(first, ops.unpermute_backward.default, *arguments)
        replace(dweights, dweights_new)
        replace(dy, dy_new)
        return 1
    return 0


def _by_token(total: fx.Node, sort: fx.Node) -> fx.Node | None:
    """The node [T, K] that sums of rows end in: a view, or scattered out of the rows' order first."""
    for node in (total, *_users(total, aten.index_put.default)):
        if node is not total and _order(node.args[1][0], 2) is not sort:
            continue
        for user in node.users:
            if user.target in _VIEWS and value(user).shape == value(_getitem(sort, 3)).shape:
                return user
    return None
