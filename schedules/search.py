"""The search: for given costs and memory, a program at least as good as the best generator's, and how good that is.

Candidates are the generators' programs and those of list scheduling (heuristic.py), on every placement (placement.py).
Then, while there is time, each placement that could still do better gets its share of it: small ones with CP-SAT
(solver.py), larger ones with exchanges on the critical path.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from dsv3c.schedules.generators import GENERATORS, at_least_one
from dsv3c.schedules.graph import graph
from dsv3c.schedules.heuristic import greedy, improve
from dsv3c.schedules.placement import Placement, lower_bound, placements, room
from dsv3c.schedules.program import Program, ScheduleError
from dsv3c.schedules.simulate import Cost, Timeline, simulate
from dsv3c.schedules.solver import solve

SMALL = 64  # stages' micro-batches that CP-SAT can still do something for in seconds


@dataclass(frozen=True)
class Found:
    """A program, its timeline, and what is known about better ones."""

    program: Program
    timeline: Timeline
    source: str  # who found it: a generator's name, greedy, exchanges or CP-SAT
    bound: int  # no program on any placement tried ends sooner

    @property
    def gap(self) -> float:
        """How far the makespan may be above the shortest, as a fraction of the bound."""
        return self.timeline.makespan / self.bound - 1 if self.bound else 0.0


def search(
    num_ranks: int, num_microbatches: int, costs: Mapping[int, Cost], *, memory: float = math.inf, seconds: float = 20.0
) -> Found:
    """The shortest program found with ``memory`` on each rank (the costs' unit, parameters included).

    ``costs`` says by number of stages what a stage costs when the model is cut into as many: 16 ranks may hold 16
    stages, or 32 of half the size. Placements with another number of stages are not tried.

    Raises:
        ScheduleError: no ranks or micro-batches; costs for other numbers of stages; nothing fits the memory; no
            OR-tools, where the size is one for it.
    """
    at_least_one("search", num_ranks, num_microbatches)
    if not {num_ranks, 2 * num_ranks} & set(costs):
        raise ScheduleError(
            f"search: expected costs for {num_ranks} or {2 * num_ranks} stages, found them for {sorted(costs)}"
        )
    found: dict[Placement, tuple[Program, int, str]] = {}
    bounds: dict[Placement, int] = {}
    for placement in placements(num_ranks, num_microbatches):
        if placement.num_stages not in costs:
            continue
        cost = costs[placement.num_stages]
        for source, program in _candidates(placement, cost, memory):
            timeline = simulate(program, cost)
            shorter = placement not in found or timeline.makespan < found[placement][1]
            if shorter and max(timeline.memory) <= memory:
                found[placement] = program, timeline.makespan, source
        if placement in found:
            bounds[placement] = lower_bound(placement, cost, memory)
    if not found:
        raise ScheduleError("search: expected memory for a micro-batch on every rank, found too little; try more")

    deadline = time.monotonic() + seconds
    tries = Counter[Placement]()
    while (left := deadline - time.monotonic()) > seconds / 20:
        shortest = min(makespan for _, makespan, _ in found.values())
        if not (hopeful := [placement for placement in found if bounds[placement] < shortest]):
            break
        placement = min(hopeful, key=lambda placement: (tries[placement], found[placement][1]))
        tries[placement] += 1
        program, makespan, source = found[placement]
        cost, space = costs[placement.num_stages], room(placement, costs[placement.num_stages], memory)
        if num_microbatches * len(placement.rank_of) <= SMALL * len(placement.num_microbatches):
            better, bounds[placement] = solve(placement, cost, space, program, bounds[placement], left / 2)
            finder = "CP-SAT"
        else:
            better, finder = improve(program, cost, space, left / 2, seed=tries[placement]), "exchanges"
        if (ends := simulate(better, cost).makespan) < makespan:
            found[placement] = better, ends, f"{source.split(',')[0]}, then {finder}"

    placement = min(found, key=lambda placement: found[placement][1])
    program, _, source = found[placement]
    return Found(program, simulate(program, costs[placement.num_stages]), source, min(bounds.values()))


def _candidates(placement: Placement, cost: Cost, memory: float) -> Iterator[tuple[str, Program]]:
    """(source, program): the generators with this placement, list scheduling with several amounts of memory."""
    for name, generator in GENERATORS.items():
        try:
            program = generator(placement.num_ranks, sum(placement.num_microbatches))
        except ScheduleError:
            continue
        if graph(program).placement == placement.rank_of:
            yield name, program
    space = room(placement, cost, memory)
    units = cost.per_stage("activation", placement.num_stages)
    micro_batch = [sum(units[s] for s, _ in placement.spots(rank)) for rank in range(placement.num_ranks)]
    depths = (placement.num_ranks, placement.num_ranks + 1, math.inf)
    for overlap, lazy, depth in product((False, True), (False, True), depths):
        less = [min(s, depth * unit) for s, unit in zip(space, micro_batch, strict=True)]
        if (listed := greedy(placement, cost, less, overlap=overlap, lazy=lazy)) is not None:
            yield "greedy", listed
