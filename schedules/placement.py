"""Where the stages are, before there is an order: the placements worth searching, and what no order on them beats."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from dsv3c.schedules.simulate import Cost

Spot = tuple[int, int]  # (stage, direction)


@dataclass(frozen=True, eq=False)  # a value by identity: a key in the search
class Placement:
    """``rank_of[stage, direction]`` and how many micro-batches go in each direction."""

    name: str
    num_ranks: int
    num_stages: int
    rank_of: Mapping[Spot, int]
    num_microbatches: tuple[int, ...]

    def spots(self, rank: int) -> list[Spot]:
        """The stages of a rank."""
        return [spot for spot, r in self.rank_of.items() if r == rank]

    def lag(self, spot: Spot, step: int, cost: Cost) -> int:
        """Ticks from a stage to the next one (step 1) or the one before (-1)."""
        return cost.comm if self.rank_of[spot] != self.rank_of[spot[0] + step, spot[1]] else 0


def placements(num_ranks: int, num_microbatches: int) -> Iterator[Placement]:
    """A stage a rank; two a rank, in a loop and in a V; a stage a rank in each direction."""
    down = {(s, 0): s for s in range(num_ranks)}
    again = {(num_ranks + s, 0): s for s in range(num_ranks)}
    up = {(2 * num_ranks - 1 - s, 0): s for s in range(num_ranks)}
    yield Placement("line", num_ranks, num_ranks, down, (num_microbatches,))
    yield Placement("loop", num_ranks, 2 * num_ranks, down | again, (num_microbatches,))
    yield Placement("V", num_ranks, 2 * num_ranks, down | up, (num_microbatches,))
    if num_ranks % 2 == 0 and num_microbatches % 2 == 0:
        back = {(s, 1): num_ranks - 1 - s for s in range(num_ranks)}
        half = num_microbatches // 2
        yield Placement("bidirectional", num_ranks, num_ranks, down | back, (half, half))


def room(placement: Placement, cost: Cost, memory: float) -> list[float]:
    """Memory that a rank has for activations: what is left beside its parameters."""
    parameters = cost.per_stage("parameters", placement.num_stages)
    return [memory - sum(parameters[s] for s, _ in placement.spots(rank)) for rank in range(placement.num_ranks)]


def lower_bound(placement: Placement, cost: Cost, memory: float) -> int:
    """Ticks that no order on this placement can beat, the largest of what three arguments say of each rank.

    It ends no sooner than it can start, plus its work, plus what others must still do after it; likewise for the part
    of its work that starts late or leaves much to do after it, so all such parts are tried. Pairs need a forward and a
    backward: before its first gradient can be there a rank has only forwards, and when others wait for its last forward
    only backwards, so what it does then it does alone. And a micro-batch holds its memory on all its way to the last
    stage and back: memory for k lets no more than k be on their way.
    """
    counts = placement.num_microbatches
    fields = ("forward", "backward", "weight", "activation")
    forward, backward, weight, units = (cost.per_stage(field, placement.num_stages) for field in fields)
    work = {"F": forward, "I": [b - w for b, w in zip(backward, weight, strict=True)], "W": weight}
    before, after = _chains(placement, cost, work)

    bound = 0
    for rank, space in enumerate(room(placement, cost, memory)):
        spots = placement.spots(rank)
        jobs = [(kind, spot) for kind in work for spot in spots]
        for start, end in product({before[job] for job in jobs}, {after[job] for job in jobs}):
            if not (part := [job for job in jobs if before[job] >= start and after[job] >= end]):
                continue
            load = sum(work[kind][s] * counts[d] for kind, (s, d) in part)
            pairs = min(sum(counts[d] for k, (_, d) in part if k == kind) for kind in "FI")
            bound = max(bound, start + load - pairs * _saved(cost, part, work) + end)

        first = min(before["F", spot] for spot in spots)
        head, tail = min(before["I", spot] for spot in spots), min(after["F", spot] for spot in spots)
        total, number = sum((forward[s] + backward[s]) * counts[d] for s, d in spots), sum(counts[d] for _, d in spots)
        ends = []
        for pairs in range(number + 1):
            alone_head = min(head - first, (number - pairs) * max(forward[s] for s, _ in spots))
            alone_tail = min(tail, (number - pairs) * max(backward[s] for s, _ in spots))
            between = total - pairs * _saved(cost, jobs, work) - alone_head - alone_tail
            ends.append(head + between + tail if between > 0 else 0)
        bound = max(bound, min(ends))

        held = sum((before["W", (s, d)] + weight[s] - before["F", (s, d)]) * units[s] * counts[d] for s, d in spots)
        if 0 < space < math.inf:
            bound = max(bound, first + math.ceil(held / space))
    return bound


def _chains(
    placement: Placement, cost: Cost, work: Mapping[str, list[int]]
) -> tuple[dict[tuple[str, Spot], int], dict[tuple[str, Spot], int]]:
    """For every action the longest chain of the same micro-batch's work before it can start, and after it has ended."""
    before: dict[tuple[str, Spot], int] = {}
    after: dict[tuple[str, Spot], int] = {}
    for direction in range(len(placement.num_microbatches)):
        spots = [(s, direction) for s in range(placement.num_stages)]
        lags = [placement.lag(spot, 1, cost) for spot in spots[:-1]]  # from a stage to the next, and as long back
        for s, spot in enumerate(spots):
            lower = spots[s - 1]
            before["F", spot] = before["F", lower] + work["F"][s - 1] + lags[s - 1] if s else 0
            climb = after["I", lower] + work["I"][s - 1] + lags[s - 1] if s else 0
            after["I", spot], after["W", spot] = max(climb, work["W"][s]), 0
        for s, spot in reversed(list(enumerate(spots))):
            if s == placement.num_stages - 1:
                before["I", spot] = before["F", spot] + work["F"][s]
                after["F", spot] = after["I", spot] + work["I"][s]
            else:
                before["I", spot] = before["I", spots[s + 1]] + work["I"][s + 1] + lags[s]
                after["F", spot] = after["F", spots[s + 1]] + work["F"][s + 1] + lags[s]
            before["W", spot] = before["I", spot] + work["I"][s]
    return before, after


def _saved(cost: Cost, part: Sequence[tuple[str, Spot]], work: Mapping[str, list[int]]) -> int:
    """The most that one overlapped pair saves of this work; of a backward whose W is not in it, only the I counts."""
    forwards = [s for kind, (s, _) in part if kind == "F"]
    backwards = [spot for kind, spot in part if kind == "I"]
    ticks = {spot: work["I"][spot[0]] + work["W"][spot[0]] * (("W", spot) in part) for spot in backwards}
    return max([0, *(work["F"][f] + ticks[b] - cost.pair(f, b[0]) for f, b in product(forwards, backwards))])
