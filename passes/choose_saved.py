"""What backward gets from forward, and what it computes again: a policy, for torch's partitioner to carry out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

import dsv3c.attention
import dsv3c.operators  # noqa: F401
from dsv3c.passes.contract import Level, PassError, Tier
from dsv3c.passes.fuse_routing import VIEWS, bare
from dsv3c.passes.regions import Region, region_of
from dsv3c.passes.rewrite import aten, is_backward, value

Policy = Literal["default", "low", "none"]
Memory = Policy | Mapping[str, Policy]  # for everything, or by kind of region

# The kinds of regions that can have a policy. Not norms and linears: what they consist of is up to the passes.
NAMED = ("layer", "mtp", "attention", "mlp", "moe", "router", "experts")

prims, ops = torch.ops.prims, torch.ops.dsv3c
_CHEAP = (ops.rms_norm_quantize.default, ops.add_rms_norm_quantize.default, ops.permute.default)
_PRODUCTS = (ops.gemm.default, aten.mm.default, aten.bmm.default)
_LAYOUT = (*VIEWS, aten.permute.default, aten.slice.Tensor)


@dataclass(frozen=True)
class ChooseSaved:
    """Before: the partitioner saves what our operators return, since it knows nothing of their cost. After: it is told
    what to compute again, by `recompute` in the nodes' metadata, which `text` shows.

    "default": what is cheap to compute: norms with their cast (33 us for 29 MB of FP8, 69 with the BF16 result for 88;
    H200, 4096 tokens of V3), tokens permuted to their experts (73 us for 242 MB), casts to a wider dtype, and keys, and
    values if one product stores both (174 us for 335 MB). "low": also queries, q_b's product included (0.3 ms for 201
    MB), and whatever products make keys and values; outside attention it is "default". "none": what the partitioner
    likes.

    `regions` gives kinds of regions a policy of their own: a node has that of the innermost region around it which is
    named. Kinds rather than layers, since equal layers are one unit.

    Source: DeepSeek-V3 report, section 3.2.3 ("recomputation of RMSNorm and MLA up-projection").
    """

    memory: Policy = "default"
    regions: tuple[tuple[str, Policy], ...] = ()
    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.JOINT

    def __post_init__(self) -> None:
        for kind, _ in self.regions:
            if kind not in NAMED:
                raise PassError(f"memory: expected regions among {', '.join(NAMED)}, found {kind!r}")
        for where, policy in (("memory", self.memory), *((f"memory of {kind}", word) for kind, word in self.regions)):
            if policy not in get_args(Policy):
                raise PassError(f"{where}: expected one of {', '.join(get_args(Policy))}, found {policy!r}")

    @classmethod
    def of(cls, memory: Memory) -> "ChooseSaved":
        """As `dsv3c.compile` takes it. Equal mappings make equal passes, in whatever order they are written."""
        return cls(regions=tuple(sorted(memory.items(), key=str))) if isinstance(memory, Mapping) else cls(memory)

    def policy(self, region: Region | None) -> Policy:
        policies = dict(self.regions)
        kinds = (region.kind, *region.within) if region else ()
        return next((policies[kind] for kind in kinds if kind in policies), self.memory)

    @property
    def is_lowest(self) -> bool:
        """Whether `memory="low"` would save no less."""
        attention = self.policy(Region("attention", "", ("layer",)))
        return attention == "low" and "none" not in (self.memory, *dict(self.regions).values())

    def __call__(self, gm: fx.GraphModule) -> int:
        if not any(map(is_backward, gm.graph.nodes)):
            return 0
        marked = 0
        for node in gm.graph.nodes:
            for again in _computed_again(node, self.policy(region_of(node))):
                marked += again.meta.get("recompute") is None
                again.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        return marked


def _computed_again(node: fx.Node, policy: Policy) -> Iterator[fx.Node]:
    if policy == "none":
        return
    if not is_backward(node) and (node.target in _CHEAP or _widens(node)):
        yield node
    if node.target is ops.attention.default:
        keys = bare(node.args[1], _LAYOUT)
        if keys.op == "call_function" and keys.target not in _PRODUCTS:
            yield from _put_together(keys)
        if policy == "low":
            yield from _up_to_products(node.args[:3])


def _put_together(keys: fx.Node) -> Iterator[fx.Node]:
    """Keys; if they are copied into empty memory part by part, that and the copies too, which are as large."""
    yield keys
    if keys.target is aten.slice_scatter.default:
        for part in keys.args[:2]:
            if part.target in (aten.slice_scatter.default, aten.copy.default, aten.empty.memory_format):
                yield from _put_together(part)


def _widens(node: fx.Node) -> bool:
    is_cast = node.target is prims.convert_element_type.default
    return is_cast and value(node.args[0]).dtype.itemsize < value(node).dtype.itemsize


def _up_to_products(nodes: tuple[fx.Node, ...]) -> Iterator[fx.Node]:
    """What `nodes` are made of, back to the last products, those included."""
    seen, frontier = set(), list(nodes)
    while frontier:
        node = frontier.pop()
        if node in seen or node.op != "call_function" or isinstance(value(node), torch.SymInt):
            continue
        seen.add(node)
        yield node
        if node.target not in (*_PRODUCTS, ops.gemm_keys.default):
            frontier += node.all_input_nodes
