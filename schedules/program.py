"""A pipeline schedule as a value: actions, overlapped pairs, a row of cells per rank; text and CSV forms.

A *program* says in which order each rank computes, nothing else: who sends what to whom follows from it (check.py), and
so do the times, once there are costs (simulate.py). Words: a *stage* is a piece of the model, a *cell* is what a rank
does at one step, an action or an overlapped pair. In bidirectional schedules a micro-batch goes through the ranks in
direction 0 (stage 0 on rank 0) or in direction 1, the reverse one (stage 0 on the last rank).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["F", "B", "I", "W"]


class ScheduleError(ValueError):
    """A schedule that cannot be made, read or run. One line; ``grid`` shows where, when there is a where."""

    def __init__(self, message: str, grid: str = "") -> None:
        super().__init__(f"{message}\n{grid}" if grid else message)
        self.message, self.grid = message, grid


@dataclass(frozen=True, slots=True)
class Action:
    """``3F12``: stage 3 runs the forward of micro-batch 12; ``3F12r`` in the reverse direction.

    Kinds: F forward, B full backward, I its input gradient, W its weight gradient; B does the work of I and W.
    """

    stage: int
    kind: Kind
    microbatch: int
    direction: int = 0

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}{'r' if self.direction else ''}"


@dataclass(frozen=True, slots=True)
class Overlap:
    """``(3F12;4B7)``: a forward and a full backward of two micro-batches, run together to hide communication."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})"


Cell = Action | Overlap
Program = tuple[tuple[Cell, ...], ...]  # row r is rank r's order


def actions(cell: Cell) -> tuple[Action, ...]:
    """The one or two actions of a cell."""
    return (cell.forward, cell.backward) if isinstance(cell, Overlap) else (cell,)


_ACTION = re.compile(r"(\d+)([FBIW])(\d+)(r?)")
_PAIR = re.compile(rf"\(({_ACTION.pattern});({_ACTION.pattern})\)(?:OVERLAP_F_B)?")


def _action(text: str) -> Action:
    stage, kind, microbatch, reverse = _ACTION.fullmatch(text).groups()  # type: ignore[union-attr]
    return Action(int(stage), kind, int(microbatch), int(bool(reverse)))  # type: ignore[arg-type]


def _cell(text: str) -> Cell | None:
    if _ACTION.fullmatch(text):
        return _action(text)
    if (pair := _PAIR.fullmatch(text)) and pair[3] == "F" and pair[8] == "B":
        return Overlap(_action(pair[1]), _action(pair[6]))
    return None


def from_text(text: str, where: str = "program") -> Program:
    """Read a program: a line per rank, cells apart by blanks or commas; ``from_text(to_text(p)) == p``.

    The compute-only CSV files of torch.distributed.pipelining are read too (their empty cells are waiting, which is no
    part of a program).

    Raises:
        ScheduleError: with line and column, both from 1, of what is no cell.
    """

    def cells(line: str, number: int) -> Iterator[Cell]:
        for word in re.finditer(r"[^\s,]+", line):
            if (cell := _cell(word[0])) is None:
                raise ScheduleError(
                    f"{where}:{number}:{word.start() + 1}: expected an action such as 2F0 or an overlapped pair such "
                    f"as (0F7;7B3), found '{word[0]}'; try the form that --text prints"
                )
            yield cell

    rows = (tuple(cells(line, number)) for number, line in enumerate(text.splitlines(), start=1))
    program = tuple(row for row in rows if row)
    if not program:
        raise ScheduleError(f"{where}:1:1: expected a line of actions per rank, found none; try the form --text prints")
    return program


def to_text(program: Program) -> str:
    """A line per rank, cells apart by a blank."""
    return "".join(" ".join(map(str, row)) + "\n" for row in program)


def to_torch_csv(program: Program) -> str:
    """The compute-only CSV that ``torch.distributed.pipelining`` loads (``_PipelineScheduleRuntime._load_csv``).

    Raises:
        ScheduleError: for two directions; torch has one rank per stage, hence no word for the second.
    """
    if reverse := next((a for row in program for cell in row for a in actions(cell) if a.direction), None):
        raise ScheduleError(
            f"torch CSV: expected one direction, found {reverse}; try dualpipev, the same overlap in one direction"
        )
    words = ((f"{cell}OVERLAP_F_B" if isinstance(cell, Overlap) else str(cell) for cell in row) for row in program)
    return "".join(",".join(row) + "\n" for row in words)


def grid(rows: Sequence[Sequence[object]], rank: int, step: int, *, reach: int = 5) -> str:
    """The rank x step grid around one cell, which stands between ``>`` and ``<``."""
    steps = range(max(0, step - reach), min(max(map(len, rows)), step + reach + 1))

    def word(r: int, s: int) -> str:
        text = str(rows[r][s]) if s < len(rows[r]) else ""
        return f">{text}<" if (r, s) == (rank, step) else text

    table = [["step", *map(str, steps)]] + [[f"rank {r}", *(word(r, s) for s in steps)] for r in range(len(rows))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(" ".join(w.ljust(n) for w, n in zip(line, widths, strict=True)).rstrip() for line in table)
