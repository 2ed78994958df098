"""A program's cells as the nodes of a graph: what waits for what, and when each can start.

The edges that no program writes down: a forward waits for the stage before; a backward (B or I) for its own forward and
the stage after; W for its I. An overlapped pair waits for what both wait for, and delivers both when it ends.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product

from dsv3c.schedules.program import Action, Cell, Overlap, Program, ScheduleError, actions, grid

NEVER = -1


@dataclass(frozen=True)
class Graph:
    """Nodes number the cells row by row: ``rows[r]`` are rank r's, ``needs[i]`` are what node i waits for."""

    program: Program
    cells: list[Cell]
    rank: list[int]
    rows: list[range]
    needs: list[tuple[int, ...]]
    placement: dict[tuple[int, int], int]  # (stage, direction) -> rank
    num_stages: int
    num_microbatches: list[int]  # of each direction

    def failure(self, node: int, message: str) -> ScheduleError:
        """An error at a node."""
        return failure(self.program, self.rank[node], node - self.rows[self.rank[node]].start, message)

    def messages(self) -> Iterator[tuple[int, int, Action]]:
        """What ranks send each other: (from node, to node, the action there that needs it)."""
        for node, required in enumerate(self.needs):
            for source in dict.fromkeys(required):
                if self.rank[source] == self.rank[node]:
                    continue
                for a, b in product(actions(self.cells[node]), actions(self.cells[source])):
                    same = (a.kind == "F", a.microbatch, a.direction) == (b.kind == "F", b.microbatch, b.direction)
                    if same and a.stage - b.stage == (1 if a.kind == "F" else -1):
                        yield source, node, a


def failure(rows: Sequence[Sequence[object]], rank: int, step: int, message: str) -> ScheduleError:
    """An error at a rank's step, with the grid around it."""
    return ScheduleError(f"rank {rank}, step {step}: {message}", grid(rows, rank, step))


def graph(program: Program) -> Graph:
    """The graph of a complete program: every stage on one rank, every action once.

    Raises:
        ScheduleError: an action twice or missing, a stage on two ranks, a pair that is not a forward and a backward.
    """
    if not program or not all(program):
        raise ScheduleError("program: expected a cell or more on every rank, found none; try fewer ranks")
    cells = [cell for row in program for cell in row]
    flat = [a for cell in cells for a in actions(cell)]
    nodes = [node for node, cell in enumerate(cells) for _ in actions(cell)]  # of flat
    rank = [r for r, row in enumerate(program) for _ in row]
    rows = [range(start, end) for start, end in pairwise([0, *accumulate(map(len, program))])]
    if odd := next((a for a in flat if min(a.stage, a.microbatch) < 0 or a.direction not in (0, 1)), None):
        raise ScheduleError(f"program: expected stages and micro-batches from 0, directions 0 and 1, found {odd!r}")
    stages = max(a.stage for a in flat) + 1
    microbatches = [0] * (max(a.direction for a in flat) + 1)
    for a in flat:
        microbatches[a.direction] = max(microbatches[a.direction], a.microbatch + 1)
    value = Graph(program, cells, rank, rows, [()] * len(cells), {}, stages, microbatches)

    # Who makes what: the output of a forward, the input gradient (B or I), the weight gradient (B or W). Numbers for
    # (stage, micro-batch) and direction, a stage's in a row and the next stage's after it: tuples take twice as long.
    width = max(microbatches)
    numbers = [(a.direction * stages + a.stage) * width + a.microbatch for a in flat]
    makers: dict[str, dict[int, int]] = {"F": {}, "I": {}, "W": {}}
    for node, a, number in zip(nodes, flat, numbers, strict=True):
        if (home := value.placement.setdefault((a.stage, a.direction), rank[node])) != rank[node]:
            raise value.failure(node, f"expected {a} on rank {home}, where stage {a.stage} is, found it here")
        for kind in "IW" if a.kind == "B" else a.kind:
            if (other := makers[kind].setdefault(number, node)) != node:
                twin = f"{cells[other]} at step {other - rows[rank[other]].start}"
                raise value.failure(node, f"expected every action once, found {a} beside {twin}; try leaving out one")
    for node, cell in enumerate(cells):
        if isinstance(cell, Overlap) and (cell.forward.kind, cell.backward.kind) != ("F", "B"):
            raise value.failure(node, f"expected a pair of F and B, found {cell}; try its actions one by one")
    if any(len(made) < stages * sum(microbatches) for made in makers.values()):
        raise _missing(value, makers, width)

    output, gradient = makers["F"], makers["I"]
    for node, a, number in zip(nodes, flat, numbers, strict=True):
        if a.kind == "W":
            value.needs[node] += (gradient[number],)
        elif a.kind == "F":
            value.needs[node] += (output[number - width],) if a.stage > 0 else ()
        else:
            later = (gradient[number + width],) if a.stage < stages - 1 else ()
            value.needs[node] += (output[number], *later)
    return value


def _missing(value: Graph, makers: Mapping[str, Mapping[int, int]], width: int) -> ScheduleError:
    """The error for the first action that is missing, at another of its stage and micro-batch if there is one."""
    absent = (
        (kind, stage, m, direction, number)
        for direction, count in enumerate(value.num_microbatches)
        for stage in range(value.num_stages)
        for m in range(count)
        for number in [(direction * value.num_stages + stage) * width + m]
        for kind, made in makers.items()
        if number not in made
    )
    kind, stage, m, direction, number = next(absent)
    word = {"F": "F", "I": "B or I", "W": "B or W"}[kind]
    action = Action(stage, kind, m, direction)  # type: ignore[arg-type]
    message = f"expected {word} of every stage and micro-batch, found no {action}; try adding it"
    kin = next((made[number] for made in makers.values() if number in made), None)
    return ScheduleError(f"program: {message}") if kin is None else value.failure(kin, message)


def held(row: Sequence[Cell], units: Sequence[int]) -> list[int]:
    """What a rank holds in each step: ``units[stage]`` a micro-batch, from the start of F to the end of B or W."""
    now, steps = 0, []
    for cell in row:
        first, last = (cell.forward, cell.backward) if isinstance(cell, Overlap) else (cell, cell)
        now += units[first.stage] if first.kind == "F" else 0
        steps.append(now)
        now -= units[last.stage] if last.kind in "BW" else 0
    return steps


def earliest(
    rows: Sequence[Sequence[int]], durations: Sequence[int], needs: Sequence[Sequence[int]], lag: int = 0
) -> tuple[list[int], list[int | None]]:
    """When every node starts, if each row runs its nodes in order and none waits longer than it must.

    A node starts when the one before it in its row has ended, and those it needs, ``lag`` later if of another row.
    Returns the starts, NEVER for a node that cannot, and for each node the one that held it up last.
    """
    home = {node: r for r, row in enumerate(rows) for node in row} if lag else {}
    starts = [NEVER] * len(needs)
    cause: list[int | None] = [None] * len(needs)
    step = [0] * len(rows)
    asleep: dict[int, list[int]] = {}  # node -> the rows whose next node needs it
    awake = list(range(len(rows)))
    while awake:
        r = awake.pop()
        row = rows[r]
        while step[r] < len(row):
            node, before = row[step[r]], row[step[r] - 1] if step[r] else None
            start = 0 if before is None else starts[before] + durations[before]
            for need in needs[node]:
                if starts[need] == NEVER:
                    asleep.setdefault(need, []).append(r)
                    break
                there = starts[need] + durations[need] + (lag if lag and home[need] != r else 0)
                if before is None or there > start:
                    start, before = there, need
            else:
                starts[node], cause[node] = start, before
                step[r] += 1
                awake += asleep.pop(node, ())
                continue
            break
    return starts, cause


def start_times(
    rows: Sequence[Sequence[int]],
    durations: Sequence[int],
    needs: Sequence[Sequence[int]],
    labels: Sequence[Sequence[object]],
    lag: int = 0,
) -> tuple[list[int], list[int | None]]:
    """``earliest``, for nodes that all must start; ``labels[r][step]`` is what ``rows[r][step]`` is called.

    Raises:
        ScheduleError: nodes that wait for each other in a circle.
    """
    starts, cause = earliest(rows, durations, needs, lag)
    if NEVER in starts:
        raise _circle(rows, needs, starts, labels)
    return starts, cause


def _circle(
    rows: Sequence[Sequence[int]],
    needs: Sequence[Sequence[int]],
    starts: Sequence[int],
    labels: Sequence[Sequence[object]],
) -> ScheduleError:
    """The error for nodes that never start."""
    place = {node: (r, step) for r, row in enumerate(rows) for step, node in enumerate(row)}
    before = {node: previous for row in rows for previous, node in pairwise(row)}

    path: list[int] = []
    node = next(i for i in place if starts[i] == NEVER)
    while node not in path:
        path.append(node)
        behind = [*needs[node], before.get(node, node)]
        node = next(i for i in behind if starts[i] == NEVER)
    circle = path[path.index(node) :]

    # Of nodes that only wait for the one in front of them in their row, the first is enough.
    only_behind = [b not in needs[a] for a, b in zip(circle, [*circle[1:], circle[0]], strict=True)]
    turns = [node for i, node in enumerate(circle) if not (only_behind[i] and only_behind[i - 1])]
    names = [f"{labels[r][step]} (rank {r}, step {step})" for r, step in (place[i] for i in [*turns, turns[0]])]
    found = " for ".join(names if len(names) <= 6 else [*names[:5], "..."])
    return failure(labels, *place[turns[0]], f"expected an order that runs, found waiting in a circle: {found}")
