"""One level down: a forward chunk and a backward chunk go through a layer each, on two resources at once.

While the pipeline runs an overlapped pair (F;B), each MoE layer of the forward chunk is paired with one of the backward
chunk. Attention and experts need the compute units, dispatch and combine the network, and the chunks need nothing of
each other: one computes while the other communicates. What is left to choose is the order on each resource.

    forward   attention > dispatch > experts > combine, and on to the next layer
    backward  combine > experts > dispatch > attention, and on to the layer before
              experts and attention first give the input's gradient, which the next phase waits for,
              then the weights', which nobody waits for

The gradient of a combine goes to the experts, like a dispatch; that of a dispatch comes back from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import permutations, product

from dsv3c.schedules.graph import start_times
from dsv3c.schedules.program import ScheduleError

COMPUTE = (
    "attention_forward",
    "experts_input",
    "experts_weight",
    "experts_forward",
    "attention_input",
    "attention_weight",
)
NETWORK = ("combine_backward", "dispatch_forward", "dispatch_backward", "combine_forward")
_NEEDS = {
    "dispatch_forward": "attention_forward",
    "experts_forward": "dispatch_forward",
    "combine_forward": "experts_forward",
    "experts_input": "combine_backward",
    "experts_weight": "experts_input",
    "dispatch_backward": "experts_input",
    "attention_input": "dispatch_backward",
    "attention_weight": "attention_input",
}
_NEEDS_OF_PAIR_BEFORE = {"attention_forward": "combine_forward", "combine_backward": "attention_input"}

Order = tuple[str, ...]  # the ten phases of a layer pair; each resource runs its own in this order

DEEPSEEK: Order = (
    *("combine_backward", "attention_forward", "experts_input", "dispatch_forward", "dispatch_backward"),
    *("experts_weight", "experts_forward", "attention_input", "attention_weight", "combine_forward"),
)
"""The order of DeepSeek's published training trace (github.com/deepseek-ai/profile-data)."""


@dataclass(frozen=True)
class LayerCost:
    """Ticks of the phases of one layer pair, each as long as it takes while the other resource is busy too.

    Raises:
        ScheduleError: no whole number, or a negative one.
    """

    attention_forward: int
    dispatch_forward: int
    experts_forward: int
    combine_forward: int
    combine_backward: int
    experts_input: int
    experts_weight: int
    dispatch_backward: int
    attention_input: int
    attention_weight: int

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            if type(ticks := getattr(self, name)) is not int or ticks < 0:
                raise ScheduleError(f"layer cost {name}: expected whole ticks from 0, found {ticks}; try scaling all")


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of the layer pair ``pair`` from its start to its end, in ticks."""

    start: int
    end: int
    cell: str
    pair: int


@dataclass(frozen=True)
class LayerTimeline:
    """The phases on both resources, in order of time."""

    compute: tuple[Phase, ...]
    network: tuple[Phase, ...]

    @cached_property
    def makespan(self) -> int:
        """Ticks until both resources are done."""
        return max(row[-1].end for row in (self.compute, self.network))

    @cached_property
    def exposed(self) -> int:
        """Ticks of communication beside which nothing computes."""
        pairs = product(self.network, self.compute)
        hidden = sum(max(0, min(a.end, b.end) - max(a.start, b.start)) for a, b in pairs)
        return sum(phase.end - phase.start for phase in self.network) - hidden


def simulate_pairs(order: Order, costs: Sequence[LayerCost]) -> LayerTimeline:
    """Run one layer pair after the other, each in this order, with these costs.

    Raises:
        ScheduleError: no costs; an order that is not the ten phases, or in which the resources wait for each other.
    """
    if not costs:
        raise ScheduleError("layer pair: expected the costs of a pair or more, found none; try [LayerCost(...)] * 4")
    if sorted(order) != sorted(COMPUTE + NETWORK):
        raise ScheduleError(f"layer pair: expected the phases {', '.join(DEEPSEEK)}, found {', '.join(order)}")
    number = {(phase, pair): i for i, (pair, phase) in enumerate(product(range(len(costs)), order))}
    sources = (((_NEEDS.get(name), pair), (_NEEDS_OF_PAIR_BEFORE.get(name), pair - 1)) for name, pair in number)
    needs = [[number[source] for source in both if source in number] for both in sources]
    ticks = [getattr(costs[pair], phase) for phase, pair in number]
    rows = [[i for (phase, _), i in number.items() if phase in resource] for resource in (COMPUTE, NETWORK)]
    names = list(number)
    starts, _ = start_times(rows, ticks, needs, [[names[i][0] for i in row] for row in rows])
    compute, network = (tuple(Phase(starts[i], starts[i] + ticks[i], *names[i]) for i in row) for row in rows)
    return LayerTimeline(compute, network)


def best_order(costs: Sequence[LayerCost]) -> Order:
    """The order with the shortest makespan of all that are the same in every pair; DeepSeek's, if none is shorter.

    All are tried: 45 that keep what each phase needs on compute before it, times 6 on the network.
    """
    best, shortest = DEEPSEEK, simulate_pairs(DEEPSEEK, costs).makespan
    for order in (compute + network for compute in _orders(COMPUTE) for network in _orders(NETWORK)):
        try:
            makespan = simulate_pairs(order, costs).makespan
        except ScheduleError:  # each resource's order is possible, but they wait for each other
            continue
        if makespan < shortest:
            best, shortest = order, makespan
    return best


def _orders(phases: tuple[str, ...]) -> list[Order]:
    """The orders of one resource that put nothing before what it needs there."""

    def sources(phase: str) -> list[str]:
        source = _NEEDS.get(phase)
        return [source, *sources(source)] if source else []

    return [
        order
        for order in permutations(phases)
        if all(order.index(s) < order.index(phase) for phase in phases for s in sources(phase) if s in order)
    ]
