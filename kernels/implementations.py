"""Which implementation computes an operator, in which configuration.

An operator may have several implementations: kernels of ours, a library. Each has a space of configurations that
change its speed and never a bit of its results; what sums in another order is an implementation of its own. The choice
is by measurement: `dsv3c tune` writes a table for each device (`tuning/tables.py`), which is read at the first launch.
Without a row for a problem, the rule in the operator's kernel file decides (`default`). The choice depends on the
problem and the device alone, and is no part of a compile key. Nothing is measured here. What numbers of rows that have
not come yet would take is compiled with the first (`start`).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from itertools import product
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from dsv3c.errors import CompileError

if TYPE_CHECKING:  # importing this file needs no Triton
    from torch import Tensor

    from dsv3c.kernels.offline import Variant
    from dsv3c.tuning.tables import Table

Config = Mapping[str, Any]


class Problem(NamedTuple):
    """What a call computes, as far as the choice depends on it. A tuple, since each launch makes and hashes one."""

    operator: str  # "gemm", "gemm_wgrad", "grouped_gemm", "grouped_gemm_wgrad", ...
    rows: int  # M, of all groups together; where rows are contracted (wgrad), their number
    N: int
    K: int
    groups: int = 1


class Tile(NamedTuple):
    """What is computed of the result at a time."""

    rows: int
    columns: int
    programs: int = 1  # that compute it together
    parts: int = 1  # in which those of a last wave are dealt out, where there are programs enough


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
        space: a knob's name and its values; empty for a library.
        launch: launch(*operands, out, **config), the operator's arguments without dtype. No operand is empty.
        takes: problems it can compute.
        valid: combinations of knobs that its code supports; whether they fit the device is the assembler's to say.
        variant: a configuration's kernel, for compiling without a GPU. None for a library.
        known: configurations that were good somewhere, where a search begins.
        tile: of a configuration, which says how times grow with rows (`tuning/buckets.py`). cuBLASLt's grow as if it
            took 128×128.
    """

    name: str
    space: Mapping[str, tuple]
    launch: Callable[..., None]
    takes: Callable[[Problem], bool] = lambda problem: True
    valid: Callable[[Config], bool] = lambda config: True
    variant: "Callable[[Config], Variant] | None" = None
    known: tuple[Config, ...] = ()
    tile: Callable[[Config], Tile] = lambda config: Tile(128, 128)

    def holds(self, config: Config) -> bool:
        """Whether `config` is one of its configurations."""
        return (
            config.keys() == self.space.keys()
            and all(config[knob] in values for knob, values in self.space.items())
            and self.valid(config)
        )

    def configs(self) -> Iterator[dict[str, Any]]:
        """Every valid configuration; a library's only one is empty."""
        for values in product(*self.space.values()):
            config = dict(zip(self.space, values, strict=True))
            if self.valid(config):
                yield config


Choice = tuple[Implementation, Config]

# What a library has to be faster by: its first call costs the host 200 µs where ours costs 60 (H200; one MoE whose
# first product is ours: 1.2 % less time in one run, nothing to be seen in a later one).
LIBRARY = 1.03

# Operator -> its kernel files. The first also has `default(problem) -> (name, config)`, the rule without a table.
FILES: dict[str, tuple[str, ...]] = {
    "gemm": ("gemm", "small_gemm", "warp_specialized"),
    "gemm_wgrad": ("wgrad",),
    "grouped_gemm": ("grouped_gemm", "warp_specialized"),
    "grouped_gemm_wgrad": ("wgrad",),
}


@cache
def implementations(operator: str) -> dict[str, Implementation]:
    """By name: what the operator's files list under IMPLEMENTATIONS[operator]."""
    modules = [import_module(f"dsv3c.kernels.{file}") for file in FILES[operator]]
    return {found.name: found for module in modules for found in module.IMPLEMENTATIONS[operator]}


def default(problem: Problem) -> Choice:
    """By rule."""
    name, config = import_module(f"dsv3c.kernels.{FILES[problem.operator][0]}").default(problem)
    return implementations(problem.operator)[name], config


@lru_cache(maxsize=1 << 16)
def choose(problem: Problem) -> Choice:
    """By measurement where this process's GPU has a row for it: of its best and its runner-up, what is faster at this
    number of rows, a library by more than its calls cost. Else by rule.

    A row may name an implementation or a configuration that there is no longer, or not here; it is passed over.
    """
    table, choices = _table(), []
    row = table.row(problem)
    for entry in row.entries if row else ():
        found = implementations(problem.operator).get(entry.implementation)
        if found is None or not found.holds(entry.config):
            _complain(
                f"table: expected an implementation of {problem.operator}, found {entry.implementation} {entry.config}"
            )
        elif found.takes(problem):
            growth = table.growth(row, problem, found.tile(entry.config))
            choices.append((entry.median_us * growth * (1 if found.space else LIBRARY), found, entry.config))
    return min(choices, key=itemgetter(0))[1:] if choices else default(problem)


Start = Callable[[Implementation, Config], None]
_prepared: set[tuple] = set()  # problems but for their rows, and what else decides


def start(
    problem: Problem, launch: Start, out: "Tensor", pick: Callable[[Problem], Choice] = choose, *also: Any
) -> None:
    """Launches what `pick` chooses for `problem`; first, once for all numbers of rows, has compiled what it chooses for
    others, so that a number of rows never seen before compiles nothing; on each device, since kernels are loaded into
    one. `out`: the result. `also`: what `pick` depends on besides."""
    key = problem._replace(rows=0), out.dtype, out.get_device(), also
    if key not in _prepared:
        from dsv3c.kernels.launch import compiling  # needs Triton

        chosen = [pick(problem._replace(rows=rows)) for rows in _rows(problem.groups)]
        with compiling():
            for implementation, config in {(i.name, *c.items()): (i, c) for i, c in chosen}.values():
                if implementation.variant:
                    launch(implementation, config)
        _prepared.add(key)
    launch(*pick(problem))


@cache
def _rows(groups: int) -> tuple[int, ...]:
    """Up to 2^20: one or more between any two that choices turn on, and an odd number beside each."""
    steps = {(4 + quarter) << octave >> 2 for octave in range(21) for quarter in range(4)}
    return tuple(sorted({rows * each + odd for rows in steps for each in {1, groups} for odd in (0, 1)}))


@cache
def _table() -> "Table":
    """Of this process's GPU: all of a machine's are taken to be of one kind."""
    from dsv3c.tuning import tables, targets

    try:
        target = targets.resolve("auto")
    except CompileError as error:
        _complain(str(error))
        return tables.Table([], 1)
    table, complaints = tables.load(target)
    for complaint in complaints:
        _complain(complaint)
    return table


@cache
def _complain(reason: str) -> None:
    """Once."""
    warnings.warn(f"tuning: {reason}; built-in defaults are used", stacklevel=2)
