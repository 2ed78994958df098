"""Checker, sends and simulator against an interpreter of ten lines, on generated, random and broken programs."""

import re
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3c.schedules import (
    GENERATORS,
    Action,
    Cost,
    Overlap,
    ScheduleError,
    Transfer,
    actions,
    check,
    check_communication,
    communicate,
    dualpipe,
    from_text,
    generate,
    one_f_one_b,
    simulate,
)


def interpret(program, cost=None):
    """Oracle: makespan by running what can run until nothing can; None if something never can."""
    last = max(a.stage for row in program for cell in row for a in actions(cell))
    done, clock, step = {}, [0] * len(program), [0] * len(program)  # done: (stage, what, ...) -> (time, rank)

    def inputs(a):
        rest = (a.microbatch, a.direction)
        if a.kind == "F":
            return [(a.stage - 1, "F", *rest)] if a.stage else []
        if a.kind == "W":
            return [(a.stage, "I", *rest)]
        return [(a.stage, "F", *rest)] + ([(a.stage + 1, "I", *rest)] if a.stage < last else [])

    for _ in range(sum(map(len, program))):
        for rank, row in enumerate(program):
            if step[rank] < len(row) and all(i in done for a in actions(row[step[rank]]) for i in inputs(a)):
                cell = row[step[rank]]
                come = [done[i] for a in actions(cell) for i in inputs(a)]
                start = max([clock[rank], *(t + (cost.comm if cost and r != rank else 0) for t, r in come)])
                clock[rank], step[rank] = start + (cost.ticks(cell) if cost else 1), step[rank] + 1
                for a in actions(cell):
                    for what in {"F": "F", "I": "I", "W": "W", "B": "IW"}[a.kind]:
                        done[a.stage, what, a.microbatch, a.direction] = clock[rank], rank
    return max(clock) if step == [len(row) for row in program] else None


@st.composite
def runnable(draw):
    """A random program that runs: any placement, B or I and W, pairs, any order that is possible."""
    stages, count, directions = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    home = {(s, d): draw(st.integers(0, 2)) for s in range(stages) for d in range(directions)}
    used = sorted(set(home.values()))
    rows = {rank: [] for rank in used}
    ready = [Action(0, "F", m, d) for m in range(count) for d in range(directions)]
    before = None
    while ready:
        a = ready.pop(draw(st.integers(0, len(ready) - 1)))
        row = rows[home[a.stage, a.direction]]
        backward = draw(st.sampled_from("BI"))
        if a.kind == "F":
            ready.append(replace(a, stage=a.stage + 1) if a.stage < stages - 1 else replace(a, kind=backward))
        elif a.kind != "W" and a.stage:
            ready.append(replace(a, stage=a.stage - 1, kind=backward))
        if a.kind == "I":
            ready.append(replace(a, kind="W"))
        # What came right before, on the same rank, and is not what this one waited for, may run beside it.
        if a.kind == "B" and row[-1:] == [before] and before.kind == "F" and before != replace(a, kind="F"):
            row[-1:] = [Overlap(before, a) if draw(st.booleans()) else before]
        if not (row and isinstance(row[-1], Overlap) and row[-1].backward == a):
            row.append(a)
        before = a
    return tuple(tuple(rows[rank]) for rank in used)


costs = st.builds(
    lambda f, i, w, gain, comm: Cost(f, i + w, w, max(f, i + w, f + i + w - gain), comm=comm),
    *(st.integers(0, 5) for _ in range(5)),
)


@settings(max_examples=150, deadline=None)
@given(runnable(), costs)
def test_random_programs_run_as_the_interpreter_says(program, cost):
    check(program)
    timeline = simulate(program, cost)
    assert timeline.makespan == interpret(program, cost)
    assert tuple(tuple(span.cell for span in row) for row in timeline.rows) == program
    assert all(span.end - span.start == cost.ticks(span.cell) for row in timeline.rows for span in row)
    assert timeline.bubbles == tuple(timeline.makespan - sum(map(cost.ticks, row)) for row in program)


@settings(max_examples=100, deadline=None)
@given(runnable(), costs)
def test_the_critical_path_explains_the_makespan(program, cost):
    timeline = simulate(program, cost)
    path = [(rank, timeline.rows[rank][step]) for rank, step in timeline.critical_path]
    assert path[0][1].start == 0
    assert path[-1][1].end == timeline.makespan
    for (rank, first), (other, then) in pairwise(path):
        assert then.start - first.end in ({0, cost.comm} if rank != other else {0})


@settings(max_examples=100, deadline=None)
@given(runnable(), st.booleans())
def test_communicate_never_deadlocks_and_sends_what_is_needed_once(program, batched):
    rows = communicate(program)
    check_communication(rows, batched=batched)
    assert tuple(tuple(step for step in row if not isinstance(step, Transfer)) for row in rows) == program


def cells_of(program):
    return [(rank, step) for rank, row in enumerate(program) for step in range(len(row))]


def with_row(program, rank, row):
    return (*program[:rank], tuple(row), *program[rank + 1 :])


def caught(program):
    """Whether the checker refuses the program; with the grid and the bad cell marked, if the error has a place."""
    try:
        check(program)
    except ScheduleError as error:
        refused = error
    else:
        return False
    first, *grid = str(refused).split("\n")
    assert first == refused.message
    if place := re.match(r"rank (\d+), step (\d+): expected .*, found", first):
        rank, step = int(place[1]), int(place[2])
        assert [line.count(">") for line in grid] == [int(row == rank) for row in range(-1, len(program))]
        assert f">{program[rank][step]}<" in grid[rank + 1]
    else:
        assert first.startswith("program: expected ")
    return True


sizes = st.sampled_from([(2, 4), (4, 8), (4, 10), (6, 12)])
generated = st.builds(lambda name, size: generate(name, *size), st.sampled_from(list(GENERATORS)), sizes)


@settings(max_examples=100, deadline=None)
@given(generated | runnable(), st.data())
def test_a_missing_cell_is_always_caught(program, data):
    rank, step = data.draw(st.sampled_from(cells_of(program)))
    row = program[rank]
    mutant = with_row(program, rank, row[:step] + row[step + 1 :])
    # The whole last micro-batch of a program of one action each is a smaller program, not a broken one.
    left = {a for row in mutant for cell in row for a in actions(cell)}
    lost = {(a.microbatch, a.direction) for a in actions(row[step])}
    assert caught(mutant) or not lost & {(a.microbatch, a.direction) for a in left}


@settings(max_examples=100, deadline=None)
@given(generated | runnable(), st.data())
def test_a_doubled_cell_is_always_caught(program, data):
    (rank, step), (other, place) = (data.draw(st.sampled_from(cells_of(program))) for _ in range(2))
    row = program[other]
    assert caught(with_row(program, other, (*row[:place], program[rank][step], *row[place:])))


@settings(max_examples=200, deadline=None)
@given(generated | runnable(), st.data())
def test_swapped_cells_are_caught_if_and_only_if_the_program_no_longer_runs(program, data):
    """Swapping two cells that do not depend on each other gives another good program: the interpreter decides."""
    rank = data.draw(st.integers(0, len(program) - 1))
    row = list(program[rank])
    a, b = (data.draw(st.integers(0, len(row) - 1)) for _ in range(2))
    row[a], row[b] = row[b], row[a]
    mutant = with_row(program, rank, row)
    assert caught(mutant) == (interpret(mutant) is None)


@settings(max_examples=100, deadline=None)
@given(generated, st.data())
def test_cells_swapped_between_ranks_are_always_caught(program, data):
    (rank, step), (other, place) = (data.draw(st.sampled_from(cells_of(program))) for _ in range(2))
    if rank == other:
        return
    mutant = with_row(program, rank, (*program[rank][:step], program[other][place], *program[rank][step + 1 :]))
    mutant = with_row(mutant, other, (*mutant[other][:place], program[rank][step], *mutant[other][place + 1 :]))
    assert caught(mutant)


def test_an_error_shows_the_grid_with_the_bad_cell_marked():
    """Ranks 0 and 1 wait for each other: 0B0 stands before 0F1, and 1B0 behind 1F1, which needs it."""
    with pytest.raises(ScheduleError) as error:
        check(from_text("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1"))
    assert str(error.value) == (
        "rank 0, step 1: expected an order that runs, found waiting in a circle: 0B0 (rank 0, step 1) for "
        "1B0 (rank 1, step 2) for 1F1 (rank 1, step 1) for 0F1 (rank 0, step 2) for 0B0 (rank 0, step 1)\n"
        "step   0   1     2   3\n"
        "rank 0 0F0 >0B0< 0F1 0B1\n"
        "rank 1 1F0 1F1   1B0 1B1"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0B0 0I0", "rank 0, step 2: expected every action once, found 0I0 beside 0B0 at step 1"),
        ("0F0 0B0 0W0", "rank 0, step 2: expected every action once, found 0W0 beside 0B0 at step 1"),
        ("0F0 0I0", "expected B or W of every stage and micro-batch, found no 0W0"),
        ("0F0 0F1 0B1", "rank 0, step 0: expected B or I of every stage and micro-batch, found no 0I0"),
        ("0F0 1F0 1B0\n0B0", "rank 1, step 0: expected 0B0 on rank 0, where stage 0 is"),
        ("0F0 2F0 0B0 2B0", "program: expected F of every stage and micro-batch, found no 1F0"),
        ("0F0 (0F1;0B1) 0B0", r"circle: \(0F1;0B1\) \(rank 0, step 1\) for \(0F1;0B1\)"),
        ("0F0 0W0 0I0", "circle: 0W0 .* for 0I0"),
        ("999999999F0", "found no 0F0"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(ScheduleError, match=message):
        check(from_text(text))


def test_values_that_no_text_gives():
    forward, backward = Action(0, "F", 0), Action(0, "B", 0)
    for program in ((), ((forward, backward), ()), ((Action(0, "F", -1),),), ((Overlap(backward, forward),),)):
        with pytest.raises(ScheduleError, match="expected"):
            check(program)
        with pytest.raises(ScheduleError, match="expected"):
            simulate(program, Cost(1, 2, 1, 3))


def test_the_memory_bound():
    program = dualpipe(4, 8)
    check(program, activations=5)
    with pytest.raises(ScheduleError, match=r"rank 0, step 7: expected at most 4 micro-batches' .*, found 5") as error:
        check(program, activations=4)
    assert ">(0F3;3B1r)<" in str(error.value)


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("gpipe", {"blocking", "batched"}),
        ("1f1b", {"batched"}),
        ("zb1p", {"batched"}),
        ("interleaved", set()),
        ("zbv", set()),
        ("dualpipe", set()),
        ("dualpipev", set()),
    ],
)
@pytest.mark.parametrize("size", [(2, 4), (4, 8), (4, 12)])
def test_which_programs_need_receives_that_are_posted_early(name, runs, size):
    program = generate(name, *size)
    check(program, sends="posted")
    for sends in ("blocking", "batched"):
        if sends in runs:
            check(program, sends=sends)
        else:
            with pytest.raises(ScheduleError, match=r"waiting in a circle: .*(SEND|RECV)"):
                check(program, sends=sends)
        check_communication(communicate(program), batched=sends == "batched")


def test_sends_and_receives_by_eye():
    rows = communicate(one_f_one_b(2, 2))
    assert [" ".join(map(str, row)) for row in rows] == [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
    ]
    assert [step.peer for step in rows[0] if isinstance(step, Transfer)] == [1, 1, 1, 1]


def test_a_result_sent_too_late_is_a_deadlock_unless_batched_with_what_it_waits_for():
    """Rank 0 asks for the gradient before it has sent what the gradient is of."""
    first, second = communicate(one_f_one_b(2, 1))
    assert [str(step) for step in first] == ["0F0", "0SEND_F0", "0RECV_B0", "0B0"]
    rows = ((first[0], first[2], first[1], first[3]), second)
    check_communication(rows, batched=True)
    with pytest.raises(ScheduleError, match=r"circle: .*0RECV_B0"):
        check_communication(rows, batched=False)


@settings(max_examples=100, deadline=None)
@given(generated, st.data())
def test_a_broken_exchange_is_caught(program, data):
    rows = communicate(program)
    places = [(r, i) for r, row in enumerate(rows) for i, step in enumerate(row) if isinstance(step, Transfer)]
    rank, step = data.draw(st.sampled_from(places))
    row = rows[rank]
    others = (
        replace(row[step], microbatch=row[step].microbatch + 1),
        replace(row[step], peer=row[step].peer + 1),
    )
    mutants = [row[:step] + row[step + 1 :], (*row, row[step]), *((*row[:step], o, *row[step + 1 :]) for o in others)]
    for mutant in mutants:
        with pytest.raises(ScheduleError, match="expected"):
            check_communication(with_row(rows, rank, mutant), batched=data.draw(st.booleans()))


def test_costs_per_stage_and_memory():
    program = one_f_one_b(2, 3)
    cost = Cost((1, 2), (3, 4), (1, 2), ((4, 5), (5, 6)), comm=2, activation=(10, 1), parameters=(100, 7))
    timeline = simulate(program, cost)
    assert timeline.makespan == interpret(program, cost)
    assert timeline.activations == (2, 1)
    assert timeline.memory == (120, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 2, 1, 3), "cost forward: expected whole numbers from 0, found -1"),
        ((1, 2.5, 1, 4), "cost backward: expected whole numbers from 0, found 2.5; try scaling all"),
        ((1, 2, 3, 4), "cost weight: expected a part of the backward, at most 2, found 3"),
        ((1, 4, 1, 3), "cost overlapped: expected at least the longer of forward and backward, 4, found 3"),
        (((1, 1), (2, 2, 2), 1, 3), r"cost: expected one value per stage, found tuples of \[2, 3\]"),
        (((1, 1), 2, 1, ((3, 3), (3, 1))), "cost overlapped: expected at least .*, 2, found 1"),
    ],
)
def test_costs_that_cannot_be(arguments, message):
    with pytest.raises(ScheduleError, match=message) as error:
        Cost(*arguments)
    assert "\n" not in str(error.value)


def test_costs_for_another_number_of_stages():
    with pytest.raises(ScheduleError, match="cost forward: expected 2 values, one per stage, found 3"):
        simulate(one_f_one_b(2, 2), Cost((1, 1, 1), 2, 1, 3))


@pytest.mark.parametrize("name", ["dualpipe", "zbv"])  # fewest and most cells
def test_64_ranks_and_512_microbatches_in_5_seconds(name):
    seconds = []
    while len(seconds) < 3 and min(seconds, default=5) >= 5:  # a busy neighbour of the core slows a run down
        start = time.process_time()
        program = generate(name, 64, 512)
        check(program)
        timeline = simulate(program, Cost(1, 2, 1, 3))
        seconds.append(time.process_time() - start)
    assert min(seconds) < 5
    assert max(timeline.bubbles) == {"dualpipe": 31 * 2, "zbv": 63}[name]
