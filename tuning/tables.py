"""Tuning tables: for each device, which implementation and configuration was fastest at what.

A table is a JSON file, a row of it a line, sorted. Those that come with dsv3c lie in tuning/tables/; `dsv3c tune`
writes the user's own into `DSV3C_TABLES`, and its rows are preferred. A row says what was measured, at how many rows
and for which bucket of them, with which Triton; times are medians in microseconds, with the 20th and 80th percentile.
`runner_up` is the fastest of another implementation, for a problem of the bucket that the best cannot take.
"""

import json
import os
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsv3c.debug import debug_config
from dsv3c.errors import TuneError
from dsv3c.kernels.implementations import Problem, Tile
from dsv3c.tuning import targets
from dsv3c.tuning.buckets import bucket, growth, in_waves

SHIPPED = Path(__file__).parent / "tables"
FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """A measured choice; times in microseconds."""

    implementation: str
    config: dict[str, Any]
    median_us: float
    p20_us: float
    p80_us: float


@dataclass(frozen=True)
class Row:
    """The fastest of a bucket, and the fastest of another implementation. `rows` is where it was measured; a predicted
    row was measured on another device, and its times are scaled."""

    operator: str
    N: int
    K: int
    groups: int
    bucket: int
    rows: int
    best: Entry
    runner_up: Entry | None
    trials: int
    torch: str
    triton: str
    predicted: bool = False

    @property
    def problem(self) -> Problem:
        return Problem(self.operator, self.rows, self.N, self.K, self.groups)

    @property
    def entries(self) -> list[Entry]:
        return [self.best] if self.runner_up is None else [self.best, self.runner_up]

    @property
    def key(self) -> tuple:
        return self.operator, self.groups, self.N, self.K, self.bucket, self.triton


def read(path: Path, target: str) -> list[Row]:
    """The rows of a target's table; none of a file that is not there.

    Raises:
        TuneError: a file that cannot be read, is no table, or another device's.
    """
    try:
        document = json.loads(path.read_text())
        found = document["format"], document["target"]
        rows = [_row(fields) for fields in document["rows"]] if found == (FORMAT, target) else []
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise TuneError(f"{path}: expected a tuning table, found: {reason}; try another file, or delete it") from error
    if found != (FORMAT, target):
        raise TuneError(
            f"{path}: expected a tuning table of format {FORMAT} for {target}, found format {found[0]} for {found[1]}; "
            "try another file, or delete it"
        )
    return rows


def _row(fields: dict[str, Any]) -> Row:
    runner_up = fields["runner_up"] and Entry(**fields["runner_up"])
    row = Row(**{**fields, "best": Entry(**fields["best"]), "runner_up": runner_up})
    numbers = row.N, row.K, row.groups, row.bucket, row.rows
    if not all(type(n) is int and n > 0 for n in numbers):  # True is an int too
        raise ValueError(f"N, K, groups, bucket, rows {numbers}")
    names = row.operator, row.torch, row.triton, *(entry.implementation for entry in row.entries)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"operator, torch, triton, implementations {names}")
    for entry in row.entries:  # a launch compares times, and gives the configuration to a kernel
        times = entry.median_us, entry.p20_us, entry.p80_us
        if not (isinstance(entry.config, dict) and all(isinstance(t, int | float) and t > 0 for t in times)):
            raise ValueError(f"{entry.implementation} {entry.config} in {times} us")
    return row


def write(path: Path, target: str, rows: Iterable[Row]) -> None:
    """A table with these rows alone. Written beside and renamed, so that a reader sees the old or the new one.

    Raises:
        TuneError: the folder cannot be written.
    """
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in sorted(rows, key=lambda row: row.key))
    device = json.dumps(targets.load(target).device)
    head = f'{{\n "format": {FORMAT}, "target": {json.dumps(target)}, "device": {device},\n "rows": [\n'
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(f"{head}{lines}\n ]\n}}\n")
        beside.replace(path)
    except OSError as error:
        raise TuneError(
            f"{path}: expected a file to write, found: {error.strerror}; try another folder: --output, or "
            "DSV3C_TABLES; until then launches use the shipped tables and built-in defaults"
        ) from error


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Both, the new in place of old ones of the same problem, bucket and Triton."""
    return list({row.key: row for row in (*old, *new)}.values())


def user_path(target: str) -> Path:
    """Where `dsv3c tune` writes.

    Raises:
        TuneError: the folder begins with ~, and whose home that is is not known.
    """
    folder = debug_config().tables
    try:
        return folder.expanduser() / f"{target}.json"
    except RuntimeError as error:
        raise TuneError(
            f"DSV3C_TABLES: expected a folder, found {folder}, in a home that is not known; try another"
        ) from error


class Table:
    """The rows of a device, by problem."""

    def __init__(self, rows: Iterable[Row], sms: int):
        """Of rows for the same problem and bucket the last counts."""
        self._sms = sms
        self._buckets: dict[tuple, dict[int, Row]] = {}
        for row in rows:
            self._buckets.setdefault((row.operator, row.groups, row.N, row.K), {})[row.bucket] = row
        self._bounds = {key: sorted(buckets) for key, buckets in self._buckets.items()}

    def row(self, problem: Problem) -> Row | None:
        """Of its bucket, or of the next larger one, or of the largest; where waves are not what takes the time, of one
        up to twice as large."""
        key = problem.operator, problem.groups, problem.N, problem.K
        if key not in self._bounds:
            return None
        bounds, wanted = self._bounds[key], bucket(problem, self._sms)
        found = bounds[min(bisect_left(bounds, wanted), len(bounds) - 1)]
        return self._buckets[key][found] if found <= 2 * wanted or in_waves(problem) else None

    def growth(self, row: Row, problem: Problem, tile: Tile) -> float:
        """How many times as long as the row's own the problem takes, in tiles like this."""
        return growth(row.problem, problem, tile, self._sms)


@cache
def triton_version() -> str:
    """Major and minor; a patch keeps what a compiler does."""
    return ".".join(version("triton").split(".")[:2])


def load(target: targets.Target) -> tuple[Table, list[str]]:
    """The table of a device, the user's rows before the shipped ones, and this Triton's before another's; and what is
    wrong with a file that was left out, a line each."""
    rows: list[Row] = []
    complaints = []
    for place in (lambda name: SHIPPED / f"{name}.json", user_path):
        try:
            found = read(place(target.name), target.name)
        except TuneError as error:
            complaints.append(str(error))
        else:
            rows += sorted(found, key=lambda row: row.triton == triton_version())
    return Table(rows, target.sms), complaints
