"""A program's cells as the nodes of a graph: what waits for what, and when each can start.

The edges that no program writes down: a forward waits for the stage before; a backward (B or I) for its own forward and
the stage after; W for its I. An overlapped pair waits for what both wait for, and delivers both when it ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from dsv3c.schedules.program import Action, Cell, Overlap, Program, ScheduleError, actions, grid


@dataclass(frozen=True)
class Graph:
    """Nodes number the cells row by row: ``rows[r]`` are rank r's, ``needs[i]`` are what node i waits for."""

    program: Program
    cells: list[Cell]
    rank: list[int]
    rows: list[range]
    needs: list[list[int]]
    messages: list[tuple[int, int, Action]]  # from node, to node of another rank, the action there that needs it
    placement: dict[tuple[int, int], int]  # (stage, direction) -> rank
    num_stages: int
    num_microbatches: list[int]  # of each direction

    def failure(self, node: int, message: str) -> ScheduleError:
        """An error at a node."""
        return failure(self.program, self.rank[node], node - self.rows[self.rank[node]].start, message)


def failure(rows: Sequence[Sequence[object]], rank: int, step: int, message: str) -> ScheduleError:
    """An error at a rank's step, with the grid around it."""
    return ScheduleError(f"rank {rank}, step {step}: {message}", grid(rows, rank, step))


def graph(program: Program) -> Graph:
    """The graph of a complete program: every stage on one rank, every action once.

    Raises:
        ScheduleError: an action twice or missing, a stage on two ranks, a pair that is not a forward and a backward.
    """
    cells = [cell for row in program for cell in row]
    flat = [(node, a) for node, cell in enumerate(cells) for a in actions(cell)]
    rank = [r for r, row in enumerate(program) for _ in row]
    ends = [0, *accumulate(map(len, program))]
    rows = [range(start, end) for start, end in pairwise(ends)]
    stages = max((a.stage for _, a in flat), default=-1) + 1
    microbatches = [0] * (max((a.direction for _, a in flat), default=0) + 1)
    for _, a in flat:
        microbatches[a.direction] = max(microbatches[a.direction], a.microbatch + 1)
    value = Graph(program, cells, rank, rows, [[] for _ in cells], [], {}, stages, microbatches)

    # Who makes what: the output of a forward, the input gradient (B or I), the weight gradient (B or W). Numbers for
    # (stage, micro-batch) and direction, a stage's in a row and the next stage's after it: tuples take twice as long.
    width = max(microbatches)
    numbers = [(a.direction * stages + a.stage) * width + a.microbatch for _, a in flat]
    makers: dict[str, dict[int, int]] = {"F": {}, "I": {}, "W": {}}
    for (node, a), number in zip(flat, numbers, strict=True):
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

    for (node, a), number in zip(flat, numbers, strict=True):
        source = None  # what the rank of another stage makes, perhaps the same
        if a.kind == "W":
            value.needs[node].append(makers["I"][number])
        elif a.kind == "F":
            source = makers["F"][number - width] if a.stage > 0 else None
        else:
            value.needs[node].append(makers["F"][number])
            source = makers["I"][number + width] if a.stage < stages - 1 else None
        if source is not None:
            value.needs[node].append(source)
            if rank[source] != rank[node]:
                value.messages.append((source, node, a))
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
        now += sum(units[a.stage] for a in actions(cell) if a.kind == "F")
        steps.append(now)
        now -= sum(units[a.stage] for a in actions(cell) if a.kind in "BW")
    return steps


def earliest(
    rows: Sequence[Sequence[int]], durations: Sequence[int], needs: Sequence[Sequence[int]], lag: int = 0
) -> tuple[list[int | None], list[int | None]]:
    """When every node starts, if each row runs its nodes in order and none waits longer than it must.

    A node starts when the one before it in its row has ended, and those it needs, ``lag`` later if of another row.
    A node may stand in two rows, which then meet in it, or in none. Returns the starts, None for a node that never can,
    and for each node the one that held it up last.
    """
    home = [-1] * len(needs)
    users: list[list[int]] = [[] for _ in needs]
    waiting = [len(required) for required in needs]
    for node, required in enumerate(needs):
        for need in required:
            users[need].append(node)
    for r, row in enumerate(rows):
        for node in row:
            home[node] = r
        for before, node in pairwise(row):
            users[before].append(node)
            waiting[node] += 1

    begin = [0] * len(needs)
    cause: list[int | None] = [None] * len(needs)
    starts: list[int | None] = [None] * len(needs)
    ready = [node for node, count in enumerate(waiting) if count == 0]
    while ready:
        node = ready.pop()
        starts[node] = begin[node]
        end = begin[node] + durations[node]
        for user in users[node]:
            there = end + lag if home[user] != home[node] else end
            if cause[user] is None or there > begin[user]:
                begin[user], cause[user] = there, node
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
    return starts, cause


def deadlock(
    rows: Sequence[Sequence[int]],
    needs: Sequence[Sequence[int]],
    starts: Sequence[int | None],
    labels: Sequence[Sequence[object]],
) -> ScheduleError:
    """The error for nodes that never start: a circle of nodes that wait for each other.

    ``labels[r][step]`` is the text of ``rows[r][step]``; a node in no row has none.
    """
    place = {node: (r, step) for r, row in enumerate(rows) for step, node in enumerate(row)}
    before: dict[int, dict[int, int]] = {}  # per node: the row it waits in -> the node in front of it
    for r, row in enumerate(rows):
        for earlier, later in pairwise(row):
            before.setdefault(later, {})[earlier] = r

    path: list[int] = []
    node = next(i for i in place if starts[i] is None)
    while node not in path:
        path.append(node)
        behind = [*needs[node], *before.get(node, ())]
        node = next(i for i in behind if starts[i] is None)
    circle = path[path.index(node) :]

    # Of the steps that only wait for the one in front of them in the same row, the first is enough.
    edges = [before.get(a, {}).get(b) for a, b in zip(circle, [*circle[1:], circle[0]], strict=True)]
    turns = [i for i, edge in enumerate(edges) if edge is None or edge != edges[i - 1]]
    names = [
        f"{labels[place[i][0]][place[i][1]]} (rank {place[i][0]}, step {place[i][1]})"
        for i in (circle[t] for t in [*turns, turns[0]])
        if i in place
    ]
    rank, step = place[next(circle[t] for t in turns if circle[t] in place)]
    found = " for ".join(names if len(names) <= 6 else [*names[:5], "..."])
    return failure(labels, rank, step, f"expected an order that runs, found waiting in a circle: {found}")
