"""Good programs for sizes that no solver masters: list scheduling, then exchanges on the critical path."""

import random
import time
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import pairwise

from dsv3c.schedules.graph import NEVER, earliest, graph, held
from dsv3c.schedules.placement import Placement, Spot
from dsv3c.schedules.program import Action, Cell, Kind, Overlap, Program, actions
from dsv3c.schedules.simulate import Cost


def greedy(placement: Placement, cost: Cost, space: Sequence[float], *, overlap: bool, lazy: bool) -> Program | None:
    """List scheduling: whenever a rank is free it starts the most urgent cell there is.

    Most urgent first: an overlapped pair (with ``overlap``), the input gradient of the oldest micro-batch, the forward
    of the latest stage, a weight gradient; without ``lazy`` a weight gradient follows its input gradient at once.
    ``space`` is the memory of each rank for activations; directions share it equally, and an early stage leaves room
    for a rank's later ones, so that no micro-batch is stuck on its way. None where not even one fits.
    """
    units = cost.per_stage("activation", placement.num_stages)
    directions = range(len(placement.num_microbatches))
    spots = [sorted(placement.spots(rank), reverse=True) for rank in range(placement.num_ranks)]
    limit = {
        (s, d): space[rank] / len(directions) - sum(units[later] for later, e in own if e == d and later > s)
        for rank, own in enumerate(spots)
        for s, d in own
    }
    if any(units[s] > limit[s, d] for s, d in limit):
        return None

    inputs: dict[tuple[Kind, Spot], list[int]] = {(kind, spot): [] for kind in ("F", "I") for spot in limit}
    for d in directions:
        inputs["F", (0, d)] = [0] * placement.num_microbatches[d]
    taken = dict.fromkeys(inputs, 0)  # of the micro-batches that these lists say are there, and since when
    live = [[0] * len(directions) for _ in spots]
    waiting: list[deque[Action]] = [deque() for _ in spots]
    rows: list[list[Cell]] = [[] for _ in spots]
    free = [0] * len(spots)
    wake = [(0, rank) for rank in range(len(spots))]

    def ready(kind: Kind, rank: int) -> list[Action]:
        return [
            Action(s, kind, number, d)
            for s, d in spots[rank]
            if (number := taken[kind, (s, d)]) < len(there := inputs[kind, (s, d)]) and there[number] <= free[rank]
        ]

    def fits(a: Action, rank: int) -> bool:
        return live[rank][a.direction] + units[a.stage] <= limit[a.stage, a.direction]

    def deliver(kind: Kind, spot: Spot, rank: int) -> None:
        there = free[rank] + (cost.comm if placement.rank_of[spot] != rank else 0)
        inputs[kind, spot].append(there)
        heappush(wake, (there, placement.rank_of[spot]))

    def run(cell: Cell, rank: int) -> None:
        rows[rank].append(cell)
        free[rank] += cost.ticks(cell)
        heappush(wake, (free[rank], rank))
        for a in actions(cell):
            s, d = a.stage, a.direction
            if a.kind == "F":
                live[rank][d] += units[s]
                taken["F", (s, d)] += 1
                turn = s == placement.num_stages - 1
                deliver("I" if turn else "F", (s, d) if turn else (s + 1, d), rank)
            if a.kind in "BI":
                taken["I", (s, d)] += 1
                if s > 0:
                    deliver("I", (s - 1, d), rank)
            if a.kind in "BW":
                live[rank][d] -= units[s]
            if a.kind == "I":
                waiting[rank].append(Action(s, "W", a.microbatch, d))

    while wake:
        now, rank = heappop(wake)
        if now < free[rank]:
            continue
        free[rank] = now
        forwards = [a for a in ready("F", rank) if fits(a, rank)]
        backward = min(ready("I", rank), key=lambda a: a.microbatch, default=None)
        if overlap and forwards and backward:
            run(Overlap(forwards[0], Action(backward.stage, "B", backward.microbatch, backward.direction)), rank)
        elif backward:
            run(backward, rank)
            if not lazy:
                run(waiting[rank].popleft(), rank)
        elif forwards:
            run(forwards[0], rank)
        elif waiting[rank]:
            run(waiting[rank].popleft(), rank)
    return tuple(map(tuple, rows))


def improve(program: Program, cost: Cost, space: Sequence[float], seconds: float, seed: int) -> Program:
    """Exchange neighbours on the critical path as long as that shortens the makespan, or leaves it and time is left.

    Only there can an exchange help: elsewhere the path that is too long remains. What was exchanged is not exchanged
    back for a while, so that equals are wandered through, not swung between. The seed decides the way, the clock its
    end.
    """
    g = graph(program)
    units = cost.per_stage("activation", g.num_stages)
    ticks = [cost.ticks(cell) for cell in g.cells]
    rows = [list(row) for row in g.rows]
    choose = random.Random(seed)
    starts, cause = earliest(rows, ticks, g.needs, cost.comm)
    ends = [start + t for start, t in zip(starts, ticks, strict=True)]
    makespan = best = max(ends)
    kept = [list(row) for row in rows]
    exchanged: deque[tuple[int, int]] = deque(maxlen=20)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        path = [choose.choice([i for i, end in enumerate(ends) if end == makespan])]
        while (before := cause[path[-1]]) is not None:
            path.append(before)
        exchanges = [
            (a, b)
            for b, a in pairwise(path)
            if g.rank[a] == g.rank[b] and a not in g.needs[b] and (b, a) not in exchanged
        ]
        if not exchanges:
            break
        a, b = choose.choice(exchanges)
        rank = g.rank[a]
        at = rows[rank].index(a)
        rows[rank][at : at + 2] = [b, a]
        starts, new_cause = earliest(rows, ticks, g.needs, cost.comm)
        fits = NEVER not in starts and max(held([g.cells[i] for i in rows[rank]], units)) <= space[rank]
        new_ends = [start + t for start, t in zip(starts, ticks, strict=True)]
        if not fits or max(new_ends) > makespan:
            rows[rank][at : at + 2] = [a, b]
            continue
        cause, ends, makespan = new_cause, new_ends, max(new_ends)
        exchanged.append((a, b))
        if makespan < best:
            best, kept = makespan, [list(row) for row in rows]
    return tuple(tuple(g.cells[i] for i in row) for row in kept)
