"""Generators: (ranks, micro-batches) -> program. Pure; what does not fit is a ScheduleError that says what would.

In the formulas P is the number of ranks, n of micro-batches; F, B = I + W and W are the times of a forward, a full
backward and a weight gradient of one stage, F&B that of an overlapped pair, communication is free and all stages are
equal. The *bubble* is the idle time of the rank that idles most: makespan minus its work. *Activations* are stages'
micro-batches that a rank holds at most, from the start of F to the end of B or W. tests/schedules/test_formulas.py
holds every formula against the simulator. Two facts carry most derivations: the last rank idles until its first input
has come down P-1 stages, (P-1)F; and once it has done its last backward, the gradient climbs P-1 stages before rank 0
can end.
"""

from collections import deque
from collections.abc import Callable
from difflib import get_close_matches
from itertools import pairwise

from dsv3c.schedules.program import Action, Cell, Kind, Overlap, Program, ScheduleError


def _require(name: str, fits: bool, expected: str, found: str, remedy: str) -> None:
    if not fits:
        raise ScheduleError(f"{name}: expected {expected}, found {found}; try {remedy}")


def at_least_one(name: str, num_ranks: int, num_microbatches: int) -> None:
    """Raise ScheduleError for no ranks or no micro-batches."""
    _require(name, num_ranks >= 1, "1 rank or more", str(num_ranks), "--ranks 1")
    _require(name, num_microbatches >= 1, "1 micro-batch or more", str(num_microbatches), "--microbatches 1")


class _Row:
    """One rank's cells. Each stage takes its micro-batches in order; weight gradients put off by I queue up for W."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []
        self._next: dict[tuple[int, bool], int] = {}
        self._queue: deque[Action] = deque()

    def _take(self, kind: Kind, stage: int) -> Action:
        microbatch = self._next.get((stage, kind == "F"), 0)
        self._next[stage, kind == "F"] = microbatch + 1
        if kind == "I":
            self._queue.append(Action(stage, "W", microbatch))
        return Action(stage, kind, microbatch)

    def add(self, kind: Kind, stage: int) -> None:
        if kind == "W":
            self.weight(stage)
        else:
            self.cells.append(self._take(kind, stage))

    def overlap(self, forward_stage: int, backward_stage: int) -> None:
        self.cells.append(Overlap(self._take("F", forward_stage), self._take("B", backward_stage)))

    def weight(self, stage: int | None = None) -> None:
        """The weight gradient that has waited longest (of one stage)."""
        action = next(a for a in self._queue if stage in (None, a.stage))
        self._queue.remove(action)
        self.cells.append(action)

    def weights(self) -> None:
        while self._queue:
            self.weight()


def gpipe(num_ranks: int, num_microbatches: int) -> Program:
    """All forwards, then all backwards.

    Bubble (P-1)(F+B): the last rank waits (P-1)F for its first input, and its last gradient climbs (P-1)B.
    Activations n. Source: Huang et al., arXiv:1811.06965.
    """
    at_least_one("gpipe", num_ranks, num_microbatches)
    kinds: tuple[Kind, ...] = ("F", "B")
    return tuple(
        tuple(Action(rank, kind, m) for kind in kinds for m in range(num_microbatches)) for rank in range(num_ranks)
    )


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Program:
    """1F1B: P-1-r forwards, then a forward and a backward in turn, then the backwards that are left.

    Bubble (P-1)(F+B), as GPipe's: the order changes memory, not time. Activations of rank r min(P-r, n): a micro-batch
    is back at rank r when P-1-r later ones have set out. Source: Narayanan et al., arXiv:2006.09503.
    """
    at_least_one("1f1b", num_ranks, num_microbatches)
    return interleaved(num_ranks, num_microbatches, stages_per_rank=1)


def interleaved(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Program:
    """Interleaved 1F1B: rank r holds the v stages r, P+r, 2P+r, ... and runs 1F1B over them, round by round.

    A round are P micro-batches, or up to twice as many where P does not divide n: n // P rounds of nearly equal size.
    Bubble (P-1)(F+B) where n >= P, and F and B are a v-th of what 1F1B's stages cost: it starts and ends like 1F1B,
    with smaller stages. Activations of rank r (v-1)m + 2(P-1-r) + 1 for v > 1 and m in the longest round, vn at most:
    it runs ahead by v-1 rounds, and by one on the way to the last rank and one on the way back for each rank between.
    Source: Narayanan et al., arXiv:2104.04473.
    """
    at_least_one("interleaved", num_ranks, num_microbatches)
    num_rounds = max(1, num_microbatches // num_ranks)
    cuts = [num_microbatches * i // num_rounds for i in range(num_rounds + 1)]
    rounds = [range(a, b) for a, b in pairwise(cuts)]
    local = range(stages_per_rank)
    ahead = 1 if stages_per_rank == 1 else 2  # per rank on the way out and, if later stages are waiting for it, back

    def row(rank: int) -> tuple[Cell, ...]:
        stages = [i * num_ranks + rank for i in local]
        forward = [Action(s, "F", m) for members in rounds for s in stages for m in members]
        backward = [Action(s, "B", m) for members in rounds for s in reversed(stages) for m in members]
        warmup = min((stages_per_rank - 1) * max(map(len, rounds)) + ahead * (num_ranks - 1 - rank), len(forward))
        steady = [a for pair in zip(forward[warmup:], backward, strict=False) for a in pair]
        return (*forward[:warmup], *steady, *backward[len(forward) - warmup :])

    return tuple(row(rank) for rank in range(num_ranks))


def zb1p(num_ranks: int, num_microbatches: int) -> Program:
    """ZB-1P, the paper's ZB-H1: 1F1B with the backward split, rank r doing W behind I by r micro-batches.

    Bubble (P-1)(F+B-2W) where W <= F and W <= I: the last rank waits (P-1)F for its first input; after its last I the
    gradient climbs (P-1)I and rank 0 ends with one W, while the last rank has P of them left: it idles (P-1)(I-W).
    Activations min(P, n) on every rank: the r weight gradients put off are what 1F1B holds less on rank r.
    Source: Qi et al., arXiv:2401.10241.
    """
    at_least_one("zb1p", num_ranks, num_microbatches)

    def row(rank: int) -> tuple[Cell, ...]:
        cells = _Row()
        warmup = min(num_ranks - 1 - rank, num_microbatches)
        for _ in range(warmup):
            cells.add("F", rank)
        for m in range(num_microbatches):
            if warmup + m < num_microbatches:
                cells.add("F", rank)
            cells.add("I", rank)
            if m >= rank:
                cells.weight()
        cells.weights()
        return tuple(cells.cells)

    return tuple(row(rank) for rank in range(num_ranks))


def zbv(num_ranks: int, num_microbatches: int) -> Program:
    """ZB-V: rank r holds stages r and 2P-1-r; the last stage is on rank 0, where its backwards start at once.

    Bubble (P-1)max(I, 2(I-W)) where W <= F <= I and n >= 2P-1. With F = I = W that is (P-1)F, and all of it is the wait
    for the first input: rank r starts r F after rank 0 and ends as much later, so that ranks which need not stop
    together see no bubble at all, hence the name. A dearer I makes the last rank wait (P-1)(I-F) more, between
    gradients; W below I/2 no longer fills the gaps between those of the two stages.
    Activations min(2P, 2n), of stages half as large as 1F1B's: the same memory.
    Source: Qi et al., arXiv:2401.10241, section 6.
    """
    at_least_one("zbv", num_ranks, num_microbatches)
    longest = max(num_microbatches, 2 * num_ranks - 1)  # fewer micro-batches: the same order with the others left out

    def row(rank: int) -> tuple[Cell, ...]:
        down, up = rank, 2 * num_ranks - 1 - rank
        cells = _Row()

        def add(*words: str) -> None:
            for word in words:
                cells.add(word[0], up if word[1] == "1" else down)  # type: ignore[arg-type]

        for _ in range(2 * (num_ranks - rank) - 1):
            add("F0")
        for _ in range(rank):
            add("F1", "F0")
        for _ in range(num_ranks - rank):
            add("F1", "I1", "W1")
        for _ in range(longest - 2 * num_ranks + rank + 1):
            add("F0", "I0", "W0", "F1", "I1", "W1")
        for _ in range(num_ranks - rank - 1):
            add("I0", "W0", "F1", "I1", "W1")
        for _ in range(rank):
            add("I0", "I1")
        for _ in range(num_ranks - rank):
            add("I0", "W0")
        for _ in range(rank):
            add("W1")
        cells.weights()
        return tuple(a for a in cells.cells if isinstance(a, Action) and a.microbatch < num_microbatches)

    return tuple(row(rank) for rank in range(num_ranks))


def dualpipev(num_ranks: int, num_microbatches: int) -> Program:
    """DualPipeV, DualPipe cut in half: rank r holds stages r and 2P-1-r, and overlaps the forwards of each with the
    backwards of the other.

    Bubble (P-1)(F&B+B-3W) where W <= F = I (their PP counts stages, 2P of them). The last rank, which idles most, waits
    (P-1)F for its first input; P-1 times in the cooldown it has only a B to do while others overlap one with an F: it
    idles F&B-B; and after its last I the gradient climbs (P-1)I while it has P-1 more W to do than rank 0: it idles
    (P-1)(I-W). In all (P-1)(F&B+F-2W). A rank r < P-1 overlaps P-2-r pairs less than the last one, so works longer and
    idles less by what these would save. With F < I, gradients are waited for between pairs, too.
    Activations 2P+1: 2P forwards before the first backward, one more while a pair is under way.
    Source: Sea AI Lab's "cut in half", github.com/deepseek-ai/DualPipe.

    Raises:
        ScheduleError: fewer than 2P micro-batches; the main step would be cut off before the last rank reaches it.
    """
    at_least_one("dualpipev", num_ranks, num_microbatches)
    least = 2 * num_ranks
    _require(
        "dualpipev",
        num_microbatches >= least,
        f"{least} micro-batches or more for {num_ranks} ranks (two a rank)",
        str(num_microbatches),
        f"--microbatches {least}",
    )
    return tuple(_dualpipev_row(rank, num_ranks, num_microbatches) for rank in range(num_ranks))


def _dualpipev_row(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Cell, ...]:
    """The eight steps of a rank; 0 is the stage on the way down, 1 on the way up, braces are overlapped pairs."""
    down, up = rank, 2 * num_ranks - 1 - rank
    after = num_ranks - 1 - rank  # ranks between this one and the turn
    row = _Row()
    for _ in range(2 * after):  # 1: F0
        row.add("F", down)
    for _ in range(rank + 1):  # 2: F0 F1
        row.add("F", down)
        row.add("F", up)
    for _ in range(after):  # 3: I1 W1 F1
        row.add("I", up)
        row.weight()
        row.add("F", up)
    for i in range(num_microbatches - 2 * num_ranks + rank + 1):  # 4: {F0 B1} {F1 B0}
        if i == 0 and after == 0:  # apart on the last rank: its B1 is the first of all, the others wait for it
            row.add("F", down)
            row.add("B", up)
        else:
            row.overlap(down, up)
        row.overlap(up, down)
    for _ in range(after):  # 5: B1 {F1 B0}
        row.add("B", up)
        row.overlap(up, down)
    for i in range(2 * (rank + 1)):  # 6: B1 B0, then I1 I0: the later half puts its weight gradients off
        row.add("B" if i <= rank else "I", down if i % 2 else up)
    for _ in range(after):  # 7: W I0
        row.weight()
        row.add("I", down)
    row.weights()  # 8: W
    return tuple(row.cells)


def dualpipe(num_ranks: int, num_microbatches: int) -> Program:
    """DualPipe: two DualPipeV halves face to face; rank r holds stage r of one direction and P-1-r of the other.

    The first half of the ranks does what DualPipeV does on P/2 ranks with n/2 micro-batches, but what came back from
    the turn there comes from the other half's first ranks here; the second half is its mirror image. So bubble and
    activations are DualPipeV's on half the ranks: (P/2-1)(F&B+B-3W) where W <= F = I, and P+1. Every rank has the
    parameters of two stages, twice what it would need without directions.
    Source: DeepSeek-V3 report, arXiv:2412.19437, section 3.2.1; github.com/deepseek-ai/DualPipe.

    Raises:
        ScheduleError: odd ranks; micro-batches odd or fewer than 2P.
    """
    _require(
        "dualpipe",
        num_ranks >= 2 and num_ranks % 2 == 0,
        "an even number of ranks (the two directions meet in the middle)",
        str(num_ranks),
        f"--ranks {max(2, num_ranks + 1)}",
    )
    least = 2 * num_ranks
    _require(
        "dualpipe",
        num_microbatches >= least and num_microbatches % 2 == 0,
        f"an even number of micro-batches, {least} or more for {num_ranks} ranks (each direction takes half)",
        str(num_microbatches),
        f"--microbatches {max(least, num_microbatches + 1)}",
    )
    half = num_ranks // 2

    def turned(action: Action, mirror: int) -> Action:
        return Action(action.stage, action.kind, action.microbatch, int(action.stage >= half) ^ mirror)

    def placed(cell: Cell, mirror: int) -> Cell:
        if isinstance(cell, Overlap):
            return Overlap(turned(cell.forward, mirror), turned(cell.backward, mirror))
        return turned(cell, mirror)

    first = dualpipev(half, num_microbatches // 2)
    return tuple(
        tuple(placed(cell, mirror) for cell in row) for mirror, rows in enumerate((first, first[::-1])) for row in rows
    )


GENERATORS: dict[str, Callable[[int, int], Program]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "zbv": zbv,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}


def canonical(name: str) -> str:
    """The key in GENERATORS of a name spelt with capitals, hyphens or underscores.

    Raises:
        ScheduleError: unknown name.
    """
    key = name.lower().replace("-", "").replace("_", "")
    if key not in GENERATORS:
        close = (get_close_matches(key, GENERATORS) or ["dualpipe"])[0]
        raise ScheduleError(f"schedule: expected one of {', '.join(GENERATORS)}, found '{name}'; try {close}")
    return key


def generate(name: str, num_ranks: int, num_microbatches: int) -> Program:
    """The program of the generator of that name.

    Raises:
        ScheduleError: unknown name; ranks or micro-batches that do not fit.
    """
    return GENERATORS[canonical(name)](num_ranks, num_microbatches)
