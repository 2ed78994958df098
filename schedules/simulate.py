"""The simulator: a program and integer costs -> exact start times, bubbles, memory, critical path.

Every rank runs its row in order, each cell as soon as what it needs is there (graph.py). Sends take time, no compute: a
result is on another rank ``comm`` ticks after it is made. A tick is whatever unit the costs are in.
"""

from dataclasses import dataclass, fields
from functools import cached_property

from dsv3c.schedules.graph import graph, held, start_times
from dsv3c.schedules.program import Cell, Overlap, Program, ScheduleError

PerStage = int | tuple[int, ...]


def _at(value: PerStage, stage: int) -> int:
    return value[stage] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Cost:
    """Ticks and memory of a stage: an integer for all stages alike, or a tuple with one per stage.

    ``backward`` is the full backward and ``weight`` its weight gradient, so that I costs the rest; ``overlapped`` is a
    pair, or a table ``[forward's stage][backward's stage]``; ``comm`` the way of an activation or gradient to another
    rank; ``activation`` what a micro-batch holds on a stage from the start of F to the end of B or W, ``parameters``
    what a copy of the stage holds, both in one unit of memory.

    Raises:
        ScheduleError: no integer, a negative one, tuples of different lengths, a weight gradient dearer than its
            backward, a pair cheaper than the dearer of its two.
    """

    forward: PerStage
    backward: PerStage
    weight: PerStage
    overlapped: int | tuple[tuple[int, ...], ...]
    comm: int = 0
    activation: PerStage = 1
    parameters: PerStage = 0

    def __post_init__(self) -> None:
        sizes: set[int] = set()
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            rows = value if name == "overlapped" and isinstance(value, tuple) else (value,)
            sizes |= {len(v) for v in (*rows, value) if isinstance(v, tuple)}
            for number in (x for row in rows for x in (row if isinstance(row, tuple) else (row,))):
                if type(number) is not int or number < 0:
                    raise ScheduleError(f"cost {name}: expected whole numbers from 0, found {number}; try scaling all")
        if len(sizes) > 1:
            raise ScheduleError(f"cost: expected one value per stage, found tuples of {sorted(sizes)}; try one length")
        stages = range(max(sizes, default=1))
        for s in stages:
            if _at(self.weight, s) > _at(self.backward, s):
                raise ScheduleError(
                    f"cost weight: expected a part of the backward, at most {_at(self.backward, s)}, found "
                    f"{_at(self.weight, s)}; try the full backward's time as backward"
                )
            for t in stages:
                if self.pair(s, t) < (least := max(_at(self.forward, s), _at(self.backward, t))):
                    raise ScheduleError(
                        f"cost overlapped: expected at least the longer of forward and backward, {least}, found "
                        f"{self.pair(s, t)}; try their sum for a pair that hides nothing"
                    )

    def pair(self, forward_stage: int, backward_stage: int) -> int:
        """Ticks of an overlapped pair."""
        table = self.overlapped
        return table[forward_stage][backward_stage] if isinstance(table, tuple) else table

    def ticks(self, cell: Cell) -> int:
        """Ticks of a cell."""
        if isinstance(cell, Overlap):
            return self.pair(cell.forward.stage, cell.backward.stage)
        if cell.kind == "F":
            return _at(self.forward, cell.stage)
        weight = _at(self.weight, cell.stage)
        return weight if cell.kind == "W" else _at(self.backward, cell.stage) - (weight if cell.kind == "I" else 0)

    def per_stage(self, field: str, num_stages: int) -> list[int]:
        """One field's values by stage.

        Raises:
            ScheduleError: a tuple for another number of stages.
        """
        value = getattr(self, field)
        if isinstance(value, tuple) and len(value) != num_stages:
            raise ScheduleError(f"cost {field}: expected {num_stages} values, one per stage, found {len(value)}")
        return list(value) if isinstance(value, tuple) else [value] * num_stages


@dataclass(frozen=True, slots=True)
class Span:
    """A cell from its start to its end, in ticks."""

    start: int
    end: int
    cell: Cell


@dataclass(frozen=True)
class Timeline:
    """What the simulator found; everything per rank is a tuple in the order of ranks."""

    cost: Cost
    rows: tuple[tuple[Span, ...], ...]
    activations: tuple[int, ...]  # most micro-batches' activations held at a time, over the rank's stages
    memory: tuple[int, ...]  # most memory held at a time, parameters included, in the cost's unit
    copies: tuple[int, ...]  # stages held, each direction counting
    critical_path: tuple[tuple[int, int], ...]  # (rank, step) of cells that each hold up the next, the last ends last

    @cached_property
    def makespan(self) -> int:
        """Ticks from the first start to the last end."""
        return max(row[-1].end for row in self.rows)

    @cached_property
    def bubbles(self) -> tuple[int, ...]:
        """Idle ticks per rank: makespan minus work."""
        return tuple(self.makespan - sum(span.end - span.start for span in row) for row in self.rows)


def simulate(program: Program, cost: Cost) -> Timeline:
    """Run a program on paper.

    Raises:
        ScheduleError: an incomplete program or one that waits for ever (check.py says where), or costs for another
            number of stages.
    """
    g = graph(program)
    activation, parameters, *_ = (
        cost.per_stage(field, g.num_stages) for field in ("activation", "parameters", "forward", "backward", "weight")
    )
    durations = [cost.ticks(cell) for cell in g.cells]
    starts, cause = start_times(g.rows, durations, g.needs, program, cost.comm)
    ends = [start + ticks for start, ticks in zip(starts, durations, strict=True)]

    path = [max(range(len(ends)), key=ends.__getitem__)]
    while (before := cause[path[-1]]) is not None:
        path.append(before)
    owned = [[stage for (stage, _), rank in g.placement.items() if rank == r] for r in range(len(program))]
    return Timeline(
        cost=cost,
        rows=tuple(tuple(Span(starts[i], ends[i], g.cells[i]) for i in row) for row in g.rows),
        activations=tuple(max(held(row, [1] * g.num_stages)) for row in program),
        memory=tuple(
            max(held(row, activation)) + sum(parameters[stage] for stage in own)
            for row, own in zip(program, owned, strict=True)
        ),
        copies=tuple(map(len, owned)),
        critical_path=tuple((g.rank[i], i - g.rows[g.rank[i]].start) for i in reversed(path)),
    )
