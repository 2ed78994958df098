"""``dsv3c schedule``: price pipeline schedules, draw one, search for a better one.

Times are read as fractions and scaled to whole ticks, so that what is printed is exact, in the user's unit.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from tabulate import tabulate
from typer import Option

from dsv3c.schedules import (
    GENERATORS,
    Cost,
    Program,
    ScheduleError,
    Timeline,
    actions,
    canonical,
    from_text,
    generate,
    search,
    simulate,
    to_text,
)
from dsv3c.schedules import plot as draw
from dsv3c.schedules import trace as perfetto
from dsv3c.schedules.graph import graph


def schedule(
    ranks: Annotated[int | None, Option(help="Pipeline ranks.")] = None,
    microbatches: Annotated[int | None, Option(help="Micro-batches of a step, both directions together.")] = None,
    forward: Annotated[str, Option(metavar="TIME", help="A micro-batch's forward through a rank's share.")] = "1",
    backward: Annotated[str, Option(metavar="TIME", help="Its full backward.")] = "2",
    weight: Annotated[str, Option(metavar="TIME", help="The weight gradient's part of the backward.")] = "1",
    overlapped: Annotated[
        str | None, Option(metavar="TIME", help="A forward and a backward overlapped.", show_default="their sum")
    ] = None,
    comm: Annotated[str, Option(metavar="TIME", help="From rank to rank.")] = "0",
    memory: Annotated[str | None, Option(metavar="N", help="Leave out what holds more activations on a rank.")] = None,
    only: Annotated[
        list[str] | None, Option(metavar="NAME", help="This one; may be repeated. 'search' looks for a better one.")
    ] = None,
    program: Annotated[
        Path | None, Option(metavar="FILE", help="The schedule in this file, written as by --text.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print a JSON list instead of the table.")] = False,
    text: Annotated[bool, Option("--text", help="Print the order of each rank instead of the table.")] = False,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Draw the schedule, to a .svg or .png.")] = None,
    trace: Annotated[Path | None, Option(metavar="FILE", help="Write its timeline for ui.perfetto.dev.")] = None,
) -> None:
    """Price pipeline schedules: bubble, makespan, peak activations, parameter copies.

    Times are in any unit and for a rank's share of the model, 1/ranks of it: where a rank holds two stages
    (interleaved, zbv, dualpipev) each takes half as long. The bubble is the idle time of the rank that idles most;
    activations are a micro-batch's on a rank's share, parameters copies of the share.
    """
    times = _times(forward, backward, weight, overlapped, comm)
    limit = None if memory is None else _number("--memory", memory)
    if program is None:
        rows = list(_generated(_count("--ranks", ranks), _count("--microbatches", microbatches), only, times, limit))
    else:
        rows = [_read(program, times)]

    fitting = [row for row in rows if limit is None or row.activations <= limit]
    if not fitting:
        least = min(rows, key=lambda row: row.activations)
        raise ScheduleError(
            f"--memory: expected at least {_plain(least.activations)}, what {least.name} holds, found {memory}; "
            "try --only search"
        )
    for row in (row for row in rows if row not in fitting):
        print(f"left out: {row.name}, which holds {_plain(row.activations)} activations", file=sys.stderr)
    if (text or plot or trace) and len(fitting) > 1:
        raise ScheduleError(
            f"--text, --plot, --trace: expected one schedule, found {len(fitting)}; try --only dualpipe"
        )

    row = fitting[0]
    try:
        if plot is not None:
            draw(row.timeline, plot, title=row.title(), unit=row.unit)
        if trace is not None:
            trace.write_text(perfetto(row.timeline, unit=row.unit))
    except OSError as error:
        raise ScheduleError(f"{error.filename}: expected a file to write, found: {error.strerror}") from error
    if text:
        print(to_text(row.program), end="")
    elif as_json:
        print(json.dumps([row.entry() for row in fitting], indent=2))
    else:
        _print_table(fitting)
    for row in (row for row in fitting if row.note):
        print(f"{row.name}: {row.note}", file=sys.stderr)


@dataclass(frozen=True)
class _Row:
    """A schedule and its prices. A stage is ``share`` of a rank's share of the model, a tick ``unit`` of the user's."""

    name: str
    program: Program
    timeline: Timeline
    share: Fraction
    unit: Fraction
    note: str = ""

    @property
    def activations(self) -> Fraction:
        return max(self.timeline.activations) * self.share

    def entry(self) -> dict[str, str | int | float]:
        """The five fields of the JSON list."""
        return {
            "name": self.name,
            "bubble": _plain(max(self.timeline.bubbles) * self.unit),
            "makespan": _plain(self.timeline.makespan * self.unit),
            "activations": _plain(self.activations),
            "parameters": _plain(max(self.timeline.copies) * self.share),
        }

    def title(self) -> str:
        """A picture's title."""
        entry, microbatches = self.entry(), sum(graph(self.program).num_microbatches)
        return (
            f"{self.name}: {len(self.program)} ranks, {microbatches} micro-batches, makespan {entry['makespan']}, "
            f"bubble {entry['bubble']}, {entry['activations']} activations"
        )


def _plain(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)


def _number(flag: str, text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if value < 0:
        raise ScheduleError(f"{flag}: expected a number from 0, found '{text}'; try 1 or 0.5")
    return value


def _count(flag: str, value: int | None) -> int:
    if value is None:
        raise ScheduleError(f"{flag}: expected a number, found none; try --ranks 16 --microbatches 64")
    return value


def _times(forward: str, backward: str, weight: str, overlapped: str | None, comm: str) -> dict[str, Fraction]:
    """The times of a rank's share, by name; the errors that Cost raises too, in the words of the command line."""
    given = {"forward": forward, "backward": backward, "weight": weight, "comm": comm}
    times = {name: _number(f"--{name}", text) for name, text in given.items()}
    both, longer = times["forward"] + times["backward"], max(times["forward"], times["backward"])
    times["overlapped"] = both if overlapped is None else _number("--overlapped", overlapped)
    if both == 0:
        raise ScheduleError("--forward, --backward: expected some time in all, found 0; try --forward 1 --backward 2")
    if times["weight"] > times["backward"]:
        raise ScheduleError(f"--weight: expected a part of --backward, at most {backward}, found {weight}")
    if times["overlapped"] < longer:
        raise ScheduleError(
            f"--overlapped: expected at least {_plain(longer)}, the longer of --forward and --backward, "
            f"found {overlapped}"
        )
    return times


def _costs(times: Mapping[str, Fraction], shares: Iterable[Fraction]) -> tuple[dict[Fraction, Cost], Fraction]:
    """What stages of these shares cost, in common ticks, and what a tick is."""
    exact = {share: {name: t * (1 if name == "comm" else share) for name, t in times.items()} for share in shares}
    scale = math.lcm(*(t.denominator for part in exact.values() for t in part.values()))
    costs = {share: Cost(**{name: int(t * scale) for name, t in part.items()}) for share, part in exact.items()}
    return costs, Fraction(1, scale)


def _share(program: Program) -> Fraction:
    return Fraction(len(program), 1 + max(a.stage for row in program for cell in row for a in actions(cell)))


def _priced(name: str, program: Program, times: Mapping[str, Fraction]) -> _Row:
    share = _share(program)
    costs, unit = _costs(times, [share])
    return _Row(name, program, simulate(program, costs[share]), share, unit)


def _read(path: Path, times: Mapping[str, Fraction]) -> _Row:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"--program: expected a text file, found {path}: {error}") from error
    try:
        return _priced(path.stem, from_text(text, where=str(path)), times)
    except ScheduleError as error:
        if error.grid:
            print(error.grid, file=sys.stderr)
        raise


def _generated(
    ranks: int, microbatches: int, only: list[str] | None, times: Mapping[str, Fraction], limit: Fraction | None
) -> Iterator[_Row]:
    for name in only or GENERATORS:
        if name == "search":
            yield _searched(ranks, microbatches, times, limit)
            continue
        try:
            program = generate(name, ranks, microbatches)
        except ScheduleError as error:
            raise error if only else ScheduleError(f"{error.message}, or choose others with --only") from error
        yield _priced(canonical(name), program, times)


def _searched(ranks: int, microbatches: int, times: Mapping[str, Fraction], limit: Fraction | None) -> _Row:
    shares = (Fraction(1), Fraction(1, 2))
    by_share, unit = _costs(times, shares)
    costs = {int(ranks / share): replace(cost, activation=int(2 * share)) for share, cost in by_share.items()}
    found = search(ranks, microbatches, costs, memory=math.inf if limit is None else float(2 * limit))
    note = f"from {found.source}; the shortest takes at least {_plain(found.bound * unit)}, this {found.gap:.1%} more"
    return _Row("search", found.program, found.timeline, _share(found.program), unit, note)


def _print_table(rows: list[_Row]) -> None:
    table = []
    for row in rows:
        name, bubble, *rest = row.entry().values()
        table.append([name, bubble, f"{max(row.timeline.bubbles) / row.timeline.makespan:.1%}", *rest])
    print(tabulate(table, headers=["schedule", "bubble", "", "makespan", "activations", "parameters"]))
