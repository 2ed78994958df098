"""What a graph costs on a target: FLOPs, bytes, and the roofline time of each operator. Every time is a prediction.

An operator with a kernel of its own (a product, attention, a cast to FP8, a sort) reads its inputs and writes its
results once. The rest is what Inductor fuses: the pointwise operators and reductions of one region that feed each other
are one group, which costs the bytes that enter and leave it. Inductor also fuses across regions, such as a residual
addition with the norm behind it, so that the sum over the groups is on the high side. Views and constants are free.
Sizes that vary are taken as in the call that was captured.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import getitem

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import flop_registry

from dsv3c.numerics import E4M3
from dsv3c.passes.contract import operator_name, operator_of
from dsv3c.passes.regions import Region, region_of
from dsv3c.passes.rewrite import is_backward
from dsv3c.tuning.targets import Target

aten = torch.ops.aten

FUSED = "fused"

# Not in torch's registry: rows [R, K] by weights [E, K, N], or for the weights' gradient [N, R] by [R, K].
_GROUPED_MM = aten._grouped_mm
# Kernels of their own though they multiply nothing: scans, sorts, and writes to places that data decides.
_UNFUSED = {aten.sort, aten.topk, aten.cumsum, aten.scatter, aten.scatter_add, aten.index_put, aten.bincount}


@dataclass(frozen=True)
class Cost:
    """One operator with a kernel of its own, or one group of fused ones (`operator` is then FUSED)."""

    operator: str
    region: Region | None
    backward: bool  # runs in the backward graph
    nodes: int  # operators of the graph that it stands for
    flops: int
    moved_bytes: int
    predicted_us: float


def price(gm: fx.GraphModule, target: Target, *, backward: bool | None = None) -> list[Cost]:
    """The costs of a forward or backward graph (L2), or of the nodes of both in a joint one (L1, `backward` None). The
    nodes carry fake values; costs are in the graph's order."""

    def side(node: fx.Node) -> bool:
        return is_backward(node) if backward is None else backward

    position = {node: number for number, node in enumerate(gm.graph.nodes)}
    with unset_fake_temporarily():  # between passes a fake mode is on, in which `hinted` is slow
        costs = {
            position[node]: price_operator(node, target, side(node)) for node in gm.graph.nodes if _has_kernel(node)
        }
        costs |= {position[group[0]]: _group(group, target, side(group[0])) for group in _groups(gm, side)}
    return [cost for _, cost in sorted(costs.items())]


def price_operator(node: fx.Node, target: Target, backward: bool) -> Cost:
    """The cost of an operator with a kernel of its own."""
    flops = _flops(node)
    moved = sum(_read_bytes([node]).values()) + _bytes(node)
    time_us = target.roofline_us(flops, moved, _rate(node))
    return Cost(operator_name(node), region_of(node), backward, 1, flops, moved, time_us)


def saved(forward: fx.GraphModule, backward: fx.GraphModule) -> dict[Region | None, int]:
    """Bytes that the forward graph keeps for the backward graph beyond its own inputs, by the region that computed
    them; a tensor once and whole, whatever views of it are kept."""
    names = {node.name for node in backward.graph.nodes if node.op == "placeholder"}
    (output,) = forward.graph.find_nodes(op="output")
    roots = {_root(node) for node in output.all_input_nodes if node.name in names}
    bytes_of: dict[Region | None, int] = defaultdict(int)
    for root in roots:
        if root.op == "call_function":
            bytes_of[region_of(root)] += _bytes(root)
    return dict(bytes_of)


def unrecognised(gm: fx.GraphModule) -> Iterator[str]:
    """Names of the operators that belong to no recognised region, one for each time they occur."""
    return (operator_name(node) for node in gm.graph.nodes if _computes(node) and region_of(node) is None)


def _computes(node: fx.Node) -> bool:
    return _has_kernel(node) or _is_fused(node)


def _has_kernel(node: fx.Node) -> bool:
    operator = operator_of(node)
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    packet = operator.overloadpacket
    own = operator.namespace not in ("aten", "prims")
    return own or packet in flop_registry or packet is _GROUPED_MM or packet in _UNFUSED


def _is_fused(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and not _has_kernel(node)
        and not node.target.is_view
        and bool(_tensors(node))
        and any(map(_tensors, node.all_input_nodes))
    )


def _group(group: list[fx.Node], target: Target, backward: bool) -> Cost:
    inside = set(group)
    moved = sum(size for root, size in _read_bytes(group).items() if _owner(root) not in inside)
    moved += sum(_bytes(node) for node in group if any(user not in inside for user in _readers(node)))
    return Cost(FUSED, region_of(group[0]), backward, len(group), 0, moved, target.roofline_us(0, moved, "bf16"))


def _groups(gm: fx.GraphModule, side: Callable[[fx.Node], bool]) -> Iterable[list[fx.Node]]:
    """Fused operators of one region and side that feed each other, each group in the graph's order."""

    def place(node: fx.Node) -> tuple[Region | None, bool]:
        return region_of(node), side(node)

    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in filter(_is_fused, gm.graph.nodes):
        group = groups[node] = [node]
        for before in {_owner(_root(argument)) for argument in node.all_input_nodes}:
            other = groups.get(before)
            if other and other is not group and place(before) == place(node):
                other += group
                groups.update(dict.fromkeys(group, other))
                group = other
    position = {node: number for number, node in enumerate(gm.graph.nodes)}
    return [sorted(group, key=position.__getitem__) for group in {id(g): g for g in groups.values()}.values()]


# Values: what is behind a view, and how many bytes of it are read.


def _is_view(node: fx.Node) -> bool:
    if node.target is getitem:
        return _is_view(node.all_input_nodes[0])
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _root(node: fx.Node) -> fx.Node:
    """The tensor under any views: an input, or what a computation returned (one of its results: a getitem)."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _owner(root: fx.Node) -> fx.Node:
    """The operator that computes `root`."""
    return root.all_input_nodes[0] if root.target is getitem else root


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads the results of `node`, be it through views."""
    for user in node.users:
        if user.target is getitem or _is_view(user):
            yield from _readers(user)
        else:
            yield user


def _read_bytes(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """For each tensor read by `nodes`, the bytes: those of its views that are read, at most the whole."""
    views: dict[fx.Node, dict[fx.Node, int]] = {}
    for node in nodes:
        share = _experts_share(node)
        for argument in node.all_input_nodes:
            size, step = _bytes(argument), argument
            while _is_view(step):  # an expanded view reads what it expands
                step = step.all_input_nodes[0]
                size = min(size, _bytes(step))
            if _is_constant(step):
                continue
            size = int(size * share) if _rank(argument) == 3 else size
            views.setdefault(step, {})[argument] = size
    return {root: min(_bytes(root), sum(sizes.values())) for root, sizes in views.items()}


def _experts_share(node: fx.Node) -> float:
    """The part of the stacked experts that a grouped product reads: no more experts than it has rows."""
    if not _has_kernel(node):
        return 1.0
    tensors = [tensor for argument in node.all_input_nodes for tensor in _tensors(argument)]
    groups = [t.shape[0] for t in tensors if t.dtype == torch.int32 and t.dim() == 1]
    return min(1.0, tensors[0].shape[0] / groups[0]) if groups and groups[0] else 1.0


def _is_constant(node: fx.Node) -> bool:
    return node.op == "call_function" and not any(map(_tensors, node.all_input_nodes))


def _rank(node: fx.Node) -> int:
    return max((tensor.dim() for tensor in _tensors(node)), default=0)


def _bytes(node: fx.Node) -> int:
    return sum(tensor.nbytes for tensor in _tensors(node))


def _tensors(node: fx.Node) -> list[Tensor]:
    value = hinted(node.meta.get("val"))
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Tensor)]


def hinted(value):
    """A node's value with its sizes as in the captured call, on the meta device."""
    if isinstance(value, Tensor):
        return torch.empty([_size(size) for size in value.shape], dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return [hinted(item) for item in value]
    return _size(value)


def _size(size):
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _flops(node: fx.Node) -> int:
    packet = operator_of(node).overloadpacket
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda argument: hinted(argument.meta["val"]))
    if packet is _GROUPED_MM:
        return 2 * args[0].shape[-2] * args[0].shape[-1] * args[1].shape[-1]
    formula = flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=hinted(node.meta["val"])) if formula else 0


def _rate(node: fx.Node) -> str:
    """Which of the target's rates a product runs at."""
    dtypes = {tensor.dtype for argument in node.all_input_nodes for tensor in _tensors(argument)}
    if E4M3 in dtypes:
        return "fp8"
    if torch.bfloat16 in dtypes or torch.float16 in dtypes:
        return "bf16"
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
