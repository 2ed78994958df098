"""The gate and the sort by expert as operators of ours.

Both are found on their own and rewritten on their own; what is left of the other reads the new values, so a piece that
is not recognised costs speed and nothing else. Views and casts are looked through: AOTAutograd and the two models place
them differently.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dsv3c.passes.contract import Level, Tier, leave
from dsv3c.passes.rewrite import aten, insert, insert_pair, is_backward, replace, value

prims, ops = torch.ops.prims, torch.ops.dsv3c

VIEWS = (
    aten.view.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.clone.default,
    aten.alias.default,
)


@dataclass(frozen=True)
class FuseRouting:
    """Before: sigmoid or softmax, topk, gather; sort, counts and their running sum, the inverse; their gradient. After:
    `gate`, `sort_by_expert` and `gate_backward`.

    The experts are the same, but for equal scores (`gate_ref`); weights sum in another order. Leaves alone: gates of
    another form, scores that have a gradient besides the weights', and float64.
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        calls = [node for node in gm.graph.nodes if node.op == "call_function"]
        return sum(map(_fuse_gate, calls)) + sum(map(_fuse_sort, calls))


def bare(node, through: tuple = (*VIEWS, prims.convert_element_type.default)):
    """The node under views and casts."""
    while isinstance(node, fx.Node) and node.target in through:
        node = node.args[0]
    return node


def is_call(node, *targets) -> bool:
    return isinstance(node, fx.Node) and node.target in targets


def users_through(node: fx.Node, *targets) -> Iterator[fx.Node]:
    """Users that call one of `targets`, forward ones first, seen through views and casts."""
    for user in sorted(node.users, key=is_backward):
        if user.target in targets:
            yield user
        elif user.target in (*VIEWS, prims.convert_element_type.default):
            yield from users_through(user, *targets)


def result_of(node, target, index: int) -> bool:
    """Whether this is result number `index` of a call of `target`."""
    return is_call(node, operator.getitem) and is_call(node.args[0], target) and node.args[1] == index


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
    if not is_call(topk, aten.topk.default) or (gate := _choice(topk.args[0])) is None:
        return 0
    idx = next((user for user in topk.users if user.args[1] == 1), None)
    chosen = next((g for g in users_through(gate.scores, aten.gather.default) if g.args[2] is idx), None)
    if chosen is None or len(topk.users) > 1:
        return 0
    quotients = [q for q in users_through(chosen, aten.div.Tensor) if _normalises(q, chosen)]
    factors = (
        (p, q) for q in (*quotients, chosen) for p in users_through(q, aten.mul.Tensor) if isinstance(p.args[1], float)
    )
    product, normalised = next(factors, (None, None))
    if product is None:
        leave(topk, "the chosen scores are not multiplied by a factor")
        return 0
    formula = (normalised is not chosen, product.args[1])
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
    biased = bare(choice, VIEWS)
    if is_call(biased, aten.where.self):
        dropped, fill, biased = biased.args
        biased = bare(biased, VIEWS)
        marked = bare(dropped, (*VIEWS, prims.convert_element_type.default, aten.bitwise_not.default))
        if not is_call(marked, aten.scatter.value) or bare(fill).args[0] != -math.inf:
            return None
        inverted = any(is_call(node, aten.bitwise_not.default) for node in _path(dropped, marked))
        if bool(marked.args[3]) != inverted or bool(marked.args[0].args[1]) == inverted:
            return None  # what is marked must be what is kept
        group_idx = marked.args[2]
        if not result_of(group_idx, aten.topk.default, 1):
            return None
        worth, topk_group = group_idx.args[0].args[:2]
        n_group = int(value(marked).shape[1])
    scores, bias = biased.args[:2] if is_call(biased, aten.add.Tensor) else (biased, None)
    if bias is not None and is_call(scores, aten.sigmoid.default):
        logits = scores.args[0]
    elif bias is None and is_call(scores, aten.div.Tensor) and is_call(scores.args[0], aten.exp.default):
        logits = _softmax_of(scores)
    else:
        return None
    if logits is None or (worth is not None and not _worth(worth, biased, bias is not None)):
        return None
    if value(logits).dtype != torch.float32:
        leave(choice, "logits of another dtype than float32, as under autocast")
        return None
    return _Gate(logits, scores, bias, n_group, topk_group)


def _path(node: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    while node is not end:
        yield node
        node = node.args[0]


def _softmax_of(scores: fx.Node) -> fx.Node | None:
    exp, total = scores.args
    difference = exp.args[0]
    if not is_call(difference, aten.sub.Tensor) or not is_call(total, aten.sum.dim_IntList) or total.args[0] is not exp:
        return None
    logits, top = difference.args
    return logits if is_call(top, aten.amax.default) and top.args[0] is logits else None


def _worth(worth: fx.Node, biased: fx.Node, is_v3: bool) -> bool:
    """Whether groups are worth the sum of their two best (V3) or their best (V2)."""
    if not is_v3:
        return is_call(worth, aten.amax.default) and bare(worth.args[0], VIEWS) is biased
    if not is_call(worth, aten.sum.dim_IntList) or not result_of(worth.args[0], aten.topk.default, 0):
        return False
    best = worth.args[0].args[0]
    return best.args[1] == 2 and bare(best.args[0], VIEWS) is biased


def _normalises(quotient: fx.Node, chosen: fx.Node) -> bool:
    total = quotient.args[1]
    return (
        bare(quotient.args[0]) is chosen
        and is_call(total, aten.add.Tensor)
        and total.args[1] == 1e-20
        and is_call(total.args[0], aten.sum.dim_IntList)
        and total.args[0].args[0] is chosen
    )


def _gate_gradient(idx: fx.Node, scores: fx.Node, factor: float) -> tuple[fx.Node, fx.Node] | None:
    """(dweights, dlogits): all that lies between them reads the gate's forward values and nothing else."""
    spread = next((s for s in users_through(idx, aten.scatter_add.default) if s.args[2] is idx), None)
    if spread is None:
        return None
    forward = _reached({scores}, lambda node: not is_backward(node)) | {scores, idx, spread.args[0]}
    entry = next((n for n in _ancestors(spread, forward) if is_call(n, aten.mul.Tensor) and n.args[1] == factor), None)
    if entry is None:
        return None
    inner = _reached({entry}, _is_of_the_gate)
    known = inner | forward | _reached(forward, is_backward) | {entry}
    read = {argument for node in inner for argument in node.all_input_nodes}
    if any(isinstance(value(node), torch.Tensor) for node in read - known):
        leave(spread, "the scores have another gradient besides the weights'")
        return None
    exits = [node for node in inner if any(user not in inner for user in node.users)]
    return (entry.args[0], exits[0]) if len(exits) == 1 else None


def _is_of_the_gate(node: fx.Node) -> bool:
    """Not the gate's product, nor where a gradient of the logits from elsewhere (a balance loss) is added."""
    adds = is_call(node, aten.add.Tensor) and any(term.op == "placeholder" for term in node.all_input_nodes)
    return not adds and node.target not in (aten.mm.default, aten.permute.default)


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
    if not is_call(sort, aten.sort.default, aten.sort.stable):
        return 0
    flat = sort.args[0]
    idx, permutation = bare(flat, VIEWS), next((u for u in sort.users if u.args[1] == 1), None)
    ends = next(_ends(flat, sort), None)
    if ends is None or permutation is None or value(flat).dim() != 1 or value(idx).dim() != 2:
        return 0
    narrow = bare(idx)
    if value(narrow).dtype != torch.int32:
        narrow = insert(sort, prims.convert_element_type.default, idx, torch.int32)
    call = insert(sort, ops.sort_by_expert.default, narrow, int(value(ends).shape[0]))
    offs, order, inverse = (insert(sort, operator.getitem, call, i) for i in (1, 2, 3))
    replace(ends, offs)
    for scattered in list(users_through(permutation, aten.scatter.src, aten.index_put.default)):
        if _inverts(scattered, permutation):
            wide = insert(scattered, prims.convert_element_type.default, inverse, torch.int64)
            replace(scattered, insert(scattered, aten.view.default, wide, [-1]))
    replace(permutation, insert(sort, prims.convert_element_type.default, order, torch.int64))
    return 1


def _ends(flat: fx.Node, sort: fx.Node) -> Iterator[fx.Node]:
    """int32 running sums of how many copies each expert has: counted by adding ones, or by a histogram."""
    counts = [s for s in flat.users if is_call(s, aten.scatter_add.default) and s.args[2] is flat]
    for ordered in (user for user in sort.users if user.args[1] == 0):
        counts += [h for h in users_through(ordered, aten.histc.default) if h.args[2:] == (0, h.args[1] - 1)]
    for count in counts:
        yield from (c for c in count.users if is_call(c, aten.cumsum.default) and value(c).dtype == torch.int32)


def _inverts(node: fx.Node, permutation: fx.Node) -> bool:
    if is_call(node, aten.scatter.src):
        return node.args[2] is permutation and is_call(node.args[3], prims.iota.default)
    return list(node.args[1]) == [permutation] and is_call(node.args[2], prims.iota.default) and len(node.args) == 3
