"""The search: bounds that hold, programs that are at least as good as the generators', the solver's optima."""

import math
import sys
from contextlib import suppress
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3c.schedules import GENERATORS, Cost, ScheduleError, check, from_text, generate, search, simulate
from dsv3c.schedules.graph import graph
from dsv3c.schedules.heuristic import greedy, improve
from dsv3c.schedules.placement import lower_bound, placements, room
from dsv3c.schedules.solver import solve


def costs_of(num_ranks, f, i, w, saved, comm):
    """Costs by number of stages: a stage a rank, or two of half the size; saved is what an overlapped pair saves."""
    whole = Cost(2 * f, 2 * (i + w), 2 * w, 2 * max(f, i + w, f + i + w - saved), comm=comm, activation=2)
    half = Cost(f, i + w, w, max(f, i + w, f + i + w - saved), comm=comm, activation=1)
    return {num_ranks: whole, 2 * num_ranks: half}


def generated(num_ranks, num_microbatches, costs, memory=math.inf):
    """The timelines of the generators that fit, by name."""
    found = {}
    for name in GENERATORS:
        try:
            program = generate(name, num_ranks, num_microbatches)
        except ScheduleError:
            continue
        timeline = simulate(program, costs[graph(program).num_stages])
        if max(timeline.memory) <= memory:
            found[name] = timeline
    return found


times = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 4), st.integers(0, 4), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(times, st.sampled_from([(1, 3), (2, 4), (3, 6), (4, 8)]), st.integers(2, 12), st.booleans(), st.booleans())
def test_no_program_beats_the_lower_bound_and_list_scheduling_keeps_to_the_memory(ticks, size, memory, overlap, lazy):
    costs = costs_of(size[0], *ticks)
    fitting = generated(*size, costs, memory)
    bounds = {p: lower_bound(p, costs[p.num_stages], memory) for p in placements(*size)}
    for name, timeline in fitting.items():
        program = generate(name, *size)
        assert timeline.makespan >= next(b for p, b in bounds.items() if p.rank_of == graph(program).placement)
    for placement, bound in bounds.items():
        cost = costs[placement.num_stages]
        program = greedy(placement, cost, room(placement, cost, memory), overlap=overlap, lazy=lazy)
        if program is not None:
            check(program)
            timeline = simulate(program, cost)
            assert timeline.makespan >= bound
            assert max(timeline.memory) <= memory


def test_the_bound_is_reached_where_a_formula_is_optimal():
    """ZB-1P and ZB-V leave only the wait for the first input where F = I = W."""
    line, _, v, _ = placements(4, 8)
    costs = costs_of(4, 1, 1, 1, 0, 0)
    assert lower_bound(line, costs[4], math.inf) == simulate(generate("zb1p", 4, 8), costs[4]).makespan
    assert lower_bound(v, costs[8], math.inf) == simulate(generate("zbv", 4, 8), costs[8]).makespan


def test_exchanges_only_shorten_and_keep_to_the_memory():
    cost = Cost(2, 5, 2, 7, comm=1)
    program = generate("zbv", 4, 8)
    better = improve(program, cost, [8.0] * 4, seconds=1.0, seed=0)
    check(better, activations=8)
    assert simulate(better, cost).makespan < simulate(program, cost).makespan


@pytest.mark.parametrize(
    ("size", "ticks", "memory"),
    [
        ((2, 4), (2, 3, 2, 1, 1), 6),  # small enough to prove
        ((4, 8), (2, 2, 2, 1, 1), 10),
        ((4, 8), (1, 1, 1, 0, 0), 4),  # half the memory of any generator
        ((8, 20), (2, 3, 2, 1, 1), 16),  # for exchanges
        ((3, 5), (1, 2, 1, 0, 1), math.inf),
    ],
)
def test_search_is_at_least_as_good_as_the_best_generator(size, ticks, memory):
    pytest.importorskip("ortools", reason="pip install 'dsv3c[schedules]'")
    costs = costs_of(size[0], *ticks)
    found = search(*size, costs, memory=memory, seconds=1)
    check(found.program)
    assert max(found.timeline.memory) <= memory
    assert found.bound <= found.timeline.makespan
    assert found.gap == found.timeline.makespan / found.bound - 1
    assert all(found.timeline.makespan <= timeline.makespan for timeline in generated(*size, costs, memory).values())


def test_the_solver_finds_what_brute_force_finds():
    """2 ranks, 2 micro-batches, a stage each: all orders of both rows, W included, tried one by one."""
    pytest.importorskip("ortools", reason="pip install 'dsv3c[schedules]'")
    cost = Cost(2, 5, 1, 6, comm=1)
    line = next(placements(2, 2))
    start = generate("gpipe", 2, 2)
    program, bound = solve(line, cost, [2, 2], start, lower_bound(line, cost, 2), seconds=5)
    assert simulate(program, cost).makespan == bound == brute_force(cost, memory=2) < simulate(start, cost).makespan


def brute_force(cost, memory):
    """The shortest makespan of 2 ranks and 2 micro-batches over all rows with micro-batches in order."""

    def rows(stage, row, forward, backward, late):
        if forward == backward == 2 and not late:
            yield " ".join(row)
        free = forward < 2 and forward - backward + len(late) < memory
        if free:
            yield from rows(stage, [*row, f"{stage}F{forward}"], forward + 1, backward, late)
        if free and backward < forward:
            pair = f"({stage}F{forward};{stage}B{backward})"
            yield from rows(stage, [*row, pair], forward + 1, backward + 1, late)
        if backward < forward:
            yield from rows(stage, [*row, f"{stage}I{backward}"], forward, backward + 1, [*late, backward])
        if late:
            yield from rows(stage, [*row, f"{stage}W{late[0]}"], forward, backward, late[1:])

    makespans = []
    for both in product(*(set(rows(stage, [], 0, 0, [])) for stage in range(2))):
        with suppress(ScheduleError):
            makespans.append(simulate(from_text("\n".join(both)), cost).makespan)
    return min(makespans)


def test_what_cannot_be_searched():
    with pytest.raises(ScheduleError, match=r"search: expected memory for a micro-batch .*, found too little"):
        search(4, 8, costs_of(4, 1, 1, 1, 0, 0), memory=1)
    with pytest.raises(ScheduleError, match=r"costs for 4 or 8 stages, found them for \[5\]"):
        search(4, 8, {5: Cost(1, 2, 1, 3)})
    with pytest.raises(ScheduleError, match="search: expected 1 rank or more, found 0"):
        search(0, 8, {0: Cost(1, 2, 1, 3)})


def test_without_ortools_a_small_search_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    with pytest.raises(
        ScheduleError, match=r"search: expected OR-tools, found none; try pip install 'dsv3c\[schedules\]'"
    ):
        search(4, 8, costs_of(4, 2, 2, 2, 1, 1))
