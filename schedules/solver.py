"""The exact search for small sizes: a placement and its costs as a constraint program for OR-tools' CP-SAT.

Every forward, input gradient and weight gradient is an interval; a rank runs one at a time; a stage takes its
micro-batches in order, which loses nothing as they are alike. An overlapped pair is a choice: where it is made, it is
one interval, and its output and gradients are there when it ends.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from dsv3c.schedules.placement import Placement
from dsv3c.schedules.program import Action, Cell, Kind, Overlap, Program, ScheduleError, actions
from dsv3c.schedules.simulate import Cost, Span, simulate

Task = tuple[int, int, int]  # stage, direction, micro-batch
_KINDS: tuple[Kind, ...] = ("F", "I", "W")


def solve(
    placement: Placement, cost: Cost, space: Sequence[float], start: Program, bound: int, seconds: float
) -> tuple[Program, int]:
    """Improve on a program within each rank's memory for activations; no program on this placement beats ``bound``.

    Returns the shortest program found (``start``, if none is shorter), and the bound as it is known then.

    Raises:
        ScheduleError: no OR-tools.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ScheduleError("search: expected OR-tools, found none; try pip install 'dsv3c[schedules]'") from error

    known = simulate(start, cost)
    limit = known.makespan
    model = cp_model.CpModel()
    tasks = [(s, d, m) for s, d in placement.rank_of for m in range(placement.num_microbatches[d])]
    units = cost.per_stage("activation", placement.num_stages)

    def time() -> Any:
        return model.new_int_var(0, limit, "")

    begin = {(kind, task): time() for kind in _KINDS for task in tasks}
    end = {(kind, task): time() for kind in _KINDS for task in tasks}
    makespan = model.new_int_var(bound, limit, "")

    pairs: dict[tuple[Task, Task], Any] = {}
    for rank in range(placement.num_ranks):
        own = [task for task in tasks if placement.rank_of[task[:2]] == rank]
        busy = []
        chosen: dict[tuple[Kind, Task], list[Any]] = defaultdict(list)  # alone, or one of the pairs it could be in
        for f, b in product(own, own):
            ticks = cost.pair(f[0], b[0])
            saves = ticks < cost.ticks(Action(f[0], "F", f[2])) + cost.ticks(Action(b[0], "B", b[2]))
            if saves and (f[:2] != b[:2] or f[2] > b[2]):
                pairs[f, b] = pair = model.new_bool_var("")
                chosen["F", f].append(pair)
                chosen["I", b].append(pair)
                busy.append(model.new_optional_interval_var(begin["F", f], ticks, end["F", f], pair, ""))
                model.add(begin["I", b] == begin["F", f]).only_enforce_if(pair)
                for kind in ("I", "W"):
                    model.add(end[kind, b] == end["F", f]).only_enforce_if(pair)
        for task in own:
            alone: dict[Kind, Any] = {kind: model.new_bool_var("") for kind in _KINDS[:2]}
            for kind in _KINDS:
                present, ticks = alone["F" if kind == "F" else "I"], cost.ticks(Action(task[0], kind, task[2]))
                busy.append(model.new_optional_interval_var(begin[kind, task], ticks, end[kind, task], present, ""))
            for kind in alone:
                model.add_exactly_one([alone[kind], *chosen[kind, task]])
            model.add(begin["I", task] >= end["F", task])
            model.add(begin["W", task] >= end["I", task]).only_enforce_if(alone["I"])
            model.add(makespan >= end["W", task])
        model.add_no_overlap(busy)
        if space[rank] != math.inf:
            lives = [model.new_interval_var(begin["F", task], time(), end["W", task], "") for task in own]
            model.add_cumulative(lives, [units[task[0]] for task in own], int(space[rank]))

    for s, d, m in tasks:
        later, follower = (s + 1, d, m), (s, d, m + 1)
        if s < placement.num_stages - 1:
            lag = placement.lag((s, d), 1, cost)
            model.add(begin["F", later] >= end["F", (s, d, m)] + lag)
            model.add(begin["I", (s, d, m)] >= end["I", later] + lag)
        if m < placement.num_microbatches[d] - 1:
            for kind in _KINDS:
                model.add(end[kind, (s, d, m)] <= end[kind, follower])
    model.minimize(makespan)

    start_pairs = set()
    for span in (span for row in known.rows for span in row):
        for kind, task, begins, ends in _times(span, cost):
            model.add_hint(begin[kind, task], begins)
            model.add_hint(end[kind, task], ends)
        if isinstance(span.cell, Overlap):
            start_pairs.add((_task(span.cell.forward), _task(span.cell.backward)))
    for members, pair in pairs.items():
        model.add_hint(pair, members in start_pairs)

    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 4
    solver.parameters.random_seed = 0
    status = solver.solve(model)
    bound = max(bound, math.ceil(solver.best_objective_bound))
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE) or solver.objective_value >= known.makespan:
        return start, bound

    together = {key for key, pair in pairs.items() if solver.value(pair)}
    paired = {("F", f) for f, _ in together} | {(kind, b) for _, b in together for kind in ("I", "W")}
    rows: list[list[tuple[int, Cell]]] = [[] for _ in range(placement.num_ranks)]

    def action(kind: Kind, task: Task) -> Action:
        return Action(task[0], kind, task[2], task[1])

    for kind, task in begin:
        if (kind, task) not in paired:
            rows[placement.rank_of[task[:2]]].append((solver.value(begin[kind, task]), action(kind, task)))
    for f, b in together:
        rows[placement.rank_of[f[:2]]].append((solver.value(begin["F", f]), Overlap(action("F", f), action("B", b))))
    return tuple(tuple(cell for _, cell in sorted(row, key=lambda item: item[0])) for row in rows), bound


def _task(a: Action) -> Task:
    return a.stage, a.direction, a.microbatch


def _times(span: Span, cost: Cost) -> Iterator[tuple[Kind, Task, int, int]]:
    """(kind, task, start, end) of what a span runs, a full backward as its input gradient and its weight gradient."""
    for a in actions(span.cell):
        if a.kind != "B":
            yield a.kind, _task(a), span.start, span.end
            continue
        together = isinstance(span.cell, Overlap)
        middle = span.end if together else span.start + cost.ticks(Action(a.stage, "I", a.microbatch))
        yield "I", _task(a), span.start, middle
        yield "W", _task(a), middle, span.end
