"""What passes over aten graphs share: reading through transposes, and inserting operators with their values."""

import operator
from collections.abc import Callable, Collection

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from dsv3c.passes.contract import PassError

aten = torch.ops.aten

# Metadata of a rewritten node that its replacement keeps: region, source, forward or backward, user annotations.
_KEPT = ("nn_module_stack", "fwd_nn_module_stack", "stack_trace", "partitioner_tag", "custom", "seq_nr")


def through_transposes(node: fx.Node) -> tuple[fx.Node, bool]:
    """The node under any transposes of the last two dimensions, and whether they add up to one transpose."""
    transposed = False
    while node.op == "call_function" and _swaps_last_two(node):
        node, transposed = node.args[0], not transposed
    return node, transposed


def _swaps_last_two(node: fx.Node) -> bool:
    if node.target is aten.t.default:
        return True
    rank = value(node).dim()
    identity = list(range(rank))
    swapped = identity[:-2] + identity[-2:][::-1]
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]] == swapped
    if node.target is aten.transpose.int:
        return rank >= 2 and {d % rank for d in node.args[1:]} == set(identity[-2:])
    return False


def is_backward(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") == "is_backward"


def value(node: fx.Node) -> torch.Tensor:
    return node.meta["val"]


def insert(at: fx.Node, target: Callable, *args, **kwargs) -> fx.Node:
    """A call of `target` just before `at`, with its value inferred and `at`'s region and source.

    Raises:
        PassError: the graph carries no fake values to infer from.
    """
    graph = at.graph
    fake_mode = next((v.fake_mode for n in graph.nodes if isinstance(v := n.meta.get("val"), FakeTensor)), None)
    if fake_mode is None:
        raise PassError(
            f"{target}: expected a graph whose nodes carry fake values, found none; try tracing with AOTAutograd"
        )
    with graph.inserting_before(at):
        node = graph.call_function(target, args, kwargs)
    node.meta = {key: at.meta[key] for key in _KEPT if key in at.meta}
    with fake_mode:
        values, options = fx.map_arg((args, kwargs), value)
        node.meta["val"] = target(*values, **options)
    return node


def insert_pair(at: fx.Node, target: Callable, *args) -> tuple[fx.Node, fx.Node]:
    """`insert` for an operator with two results: (x_fp8, x_scale_inv)."""
    both = insert(at, target, *args)
    return insert(at, operator.getitem, both, 0), insert(at, operator.getitem, both, 1)


def under(node, *targets) -> fx.Node:
    """What `node` is a view of, through calls of `targets`."""
    while isinstance(node, fx.Node) and node.target in targets:
        node = node.args[0]
    return node


def made_of(node: fx.Node, known: Collection[fx.Node]) -> bool:
    """Whether `node` is computed from `known`, sizes and constants alone."""
    seen, frontier = set(known), [node]
    while frontier:
        node = frontier.pop()
        if node not in seen and not isinstance(node.meta.get("val"), torch.SymInt):
            if node.op == "placeholder":
                return False
            seen.add(node)
            frontier += node.all_input_nodes
    return True


def end_of(start: fx.Node, known: Collection[fx.Node], is_end: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The one node that all ends in which is computed from `start` with values made of `known`; None if there are
    several, or something else takes part."""
    between, ends, frontier = set(), set(), list(start.users)
    while frontier:
        node = frontier.pop()
        if is_end(node):
            ends.add(node)
        elif node.op == "output":
            return None
        elif node not in between:
            between.add(node)
            frontier += node.users
    read = {argument for node in between | ends for argument in node.all_input_nodes} - between - {start}
    return ends.pop() if len(ends) == 1 and all(made_of(node, known) for node in read) else None


def replace(node: fx.Node, new: fx.Node) -> None:
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def replace_results(node: fx.Node, new: fx.Node, *, first: int) -> None:
    """Result number `first + i` of `new`, which stands before `node`, in place of result i of `node`."""
    for user in list(node.users):
        replace(user, insert(node, operator.getitem, new, first + user.args[1]))
    node.graph.erase_node(node)


def size(at: fx.Node, x: fx.Node, dim: int) -> fx.Node | int:
    """The size of x: a number, or, where it varies, a node just before `at`."""
    found = value(x).shape[dim]
    return insert(at, aten.sym_size.int, x, dim) if isinstance(found, torch.SymInt) else found


def insert_captured(at: fx.Node, target: Callable | str, *args, **kwargs) -> fx.Node:
    """`insert` for a captured graph: a call of a function, or of the first argument's method of that name."""
    method = isinstance(target, str)
    with at.graph.inserting_before(at):
        node = at.graph.create_node("call_method" if method else "call_function", target, args, kwargs)
    node.meta = {key: at.meta[key] for key in ("nn_module_stack", "stack_trace") if key in at.meta}
    # AOTAutograd's cache looks for a value where a method is called on the result.
    inputs, options = fx.map_arg((args, kwargs), lambda argument: argument.meta["example_value"])
    with torch.no_grad():
        call = getattr(type(inputs[0]), target) if method else target
        node.meta["example_value"] = call(*inputs, **options)
    return node


def erase_unread(node: fx.Node) -> None:
    """Erases a call that nothing reads, and with it what only it read. For captured graphs, which are not swept, since
    they mutate in place: to be called where nothing does."""
    unread = {node}
    for each in reversed(list(node.graph.nodes)):
        if each in unread and not each.users and each.op in ("call_function", "call_method"):
            unread.update(each.all_input_nodes)
            node.graph.erase_node(each)
