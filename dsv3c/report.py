"""`dsv3c.explain`: what the compiler did to a model, and what each part should cost on the target.

One section a compiled unit: its regions and operators with FLOPs, bytes and roofline times (dsv3c/pricing.py says what
is counted), the passes with the sites they rewrote and those they left, and the operators that no region claimed.
Predicted times are rooflines at the target's achievable rates, and are called predicted wherever they appear; measured
ones (dsv3c/measure.py) are there if asked for.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsv3c import families
from dsv3c.backend import Lowered, lower
from dsv3c.capture import Kind, Unit
from dsv3c.compiler import compilation_of
from dsv3c.errors import CompileError
from dsv3c.measure import Launch, located
from dsv3c.measure import measure as measured_launches
from dsv3c.passes import ChooseSaved
from dsv3c.passes.regions import Region
from dsv3c.pricing import FUSED, Cost, price, saved, unrecognised
from dsv3c.report_passes import Records, passes_list, passes_table, regions_table
from dsv3c.report_roofline import Against, against_rooflines, roofline_table
from dsv3c.report_table import Table, counts, grouped, region_dict, sums
from dsv3c.tuning.targets import Target
from dsv3c.weights import QuantizedWeights

_AMOUNTS = ["operators", "GFLOP", "MB"]

EAGER = "the embedding is not compiled and not in these numbers"


@dataclass(frozen=True)
class UnitReport:
    """One compiled unit: a kind of module in one variant, shared by `modules` of them."""

    name: str
    modules: int
    inputs: tuple[str, ...]
    costs: tuple[Cost, ...]
    saved: dict[Region | None, int]  # bytes kept for backward, by the region that computed them
    memory: ChooseSaved
    records: Records
    unrecognised: dict[str, int]
    launches: tuple[Launch, ...] = ()  # of one module, if measured
    against: tuple[Against, ...] = ()  # their rooflines, if measured on the target

    @classmethod
    def of(cls, lowered: Lowered, modules: int, target: Target, launches: tuple[Launch, ...] = ()) -> "UnitReport":
        costs = [cost for i, half in enumerate(lowered.halves) for cost in price(half, target, backward=i == 1)]
        launches = located(launches, lowered.halves, target)
        return cls(
            lowered.unit.name,
            modules,
            tuple(_inputs(lowered.unit)),
            tuple(costs),
            saved(*lowered.halves) if len(lowered.halves) == 2 else {},
            lowered.memory,
            lowered.records,
            dict(Counter(name for half in lowered.halves for name in unrecognised(half))),
            launches,
            against_rooflines(launches, costs, target),
        )

    @property
    def predicted_us(self) -> float:
        """Of one module."""
        return sum(cost.predicted_us for cost in self.costs)

    @property
    def measured_us(self) -> float | None:
        """Of one module; None if it was not measured."""
        return sum(launch.time_us for launch in self.launches) if self.launches else None

    def gaps_us(self, backward: bool) -> float | None:
        """Of one module: the time between its kernels, from the first to the last; None if it was not measured."""
        mine = [launch for launch in self.launches if launch.backward is backward]
        if not mine:
            return None
        last, first = max(x.start_us + x.time_us for x in mine), min(x.start_us for x in mine)
        return last - first - sum(x.time_us for x in mine)

    @property
    def flops(self) -> int:
        return sum(cost.flops for cost in self.costs)

    @property
    def moved_bytes(self) -> int:
        return sum(cost.moved_bytes for cost in self.costs)

    @property
    def saved_bytes(self) -> int:
        return sum(self.saved.values())

    def regions(self) -> dict[Region | None, list[Cost]]:
        return grouped(self.costs, lambda cost: cost.region)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "modules": self.modules,
            "inputs": list(self.inputs),
            **sums(self.costs),
            "saved_bytes": self.saved_bytes,
            "regions": [
                {
                    **region_dict(region),
                    **sums(costs),
                    "saved_bytes": self.saved.get(region, 0),
                    "memory": self.memory.policy(region),
                    **({"measured_us": self._measured(region)} if self.launches else {}),
                }
                for region, costs in self.regions().items()
            ],
            **({"measured_us": self.measured_us, "launches": self._launches()} if self.launches else {}),
            **({"gaps_us": {"forward": self.gaps_us(False), "backward": self.gaps_us(True)}} if self.launches else {}),
            **({"rooflines": [{**asdict(x), "ratio": x.ratio} for x in self.against]} if self.against else {}),
            "operators": [
                {
                    "operator": cost.operator,
                    "region": cost.region.path if cost.region else None,
                    "backward": cost.backward,
                    **sums([cost]),
                }
                for cost in self.costs
            ],
            "passes": passes_list(self.records),
            "unrecognised": self.unrecognised,
        }

    @property
    def title(self) -> str:
        return f"{self.name}: of {self.modules} module{'s' if self.modules != 1 else ''}; {', '.join(self.inputs)}"

    def __str__(self) -> str:
        tables = (str(table) for table in self.tables() if table.rows)
        return "\n\n".join(filter(None, [self.title, *tables, "\n".join(self.left())]))

    def tables(self) -> tuple["Table", ...]:
        passes = passes_table(self.records), regions_table(self.records)
        return self._regions(), self._kernels(), roofline_table(self.against), *passes

    def _launches(self) -> list[dict[str, Any]]:
        return [
            {
                **asdict(replace(x, cost=None)),
                "region": x.region.path if x.region else None,
                "cost": sums([x.cost]) if x.cost else None,
            }
            for x in self.launches
        ]

    def _measured(self, region: Region | None, backward: bool | None = None) -> float | None:
        """Of its operators with a kernel of their own; None without any."""
        times = [x.time_us for x in self.launches if x.region == region and backward in (None, x.backward)]
        return sum(times) if times and region else None

    def _regions(self) -> Table:
        trained = any(cost.backward for cost in self.costs)
        times = {"forward us": False, "backward us": True} if trained else {"us": False}

        def row(path: str, kind: str, costs: list[Cost], kept: list[Any], measured: list[float | None]) -> list[Any]:
            predicted = [sum(c.predicted_us for c in costs if c.backward is backward) for backward in times.values()]
            measured = measured if self.launches else []
            return [path, kind, *_amounts(costs), *(kept if trained else []), *predicted, *measured]

        rows = []
        for region, costs in self.regions().items():
            path, kind = (region.path, region.kind) if region else ("(none)", "")
            measured = [self._measured(region, backward) for backward in times.values()]
            kept = [self.saved.get(region, 0) / 1e6, self.memory.policy(region)]
            rows.append(row(path, kind, costs, kept, measured))
        sides = {b: [x for x in self.launches if x.backward is b] for b in times.values()}
        if self.launches:  # what Inductor fused, and what is in no graph: copies, fills
            blank = [None] * (len(rows[0]) - 2 - len(times))
            fused = [sum(x.time_us for x in launches if x.region is None) for launches in sides.values()]
            rows.append(["(kernels across regions)", "", *blank, *fused])
            rows.append(["(between kernels, in no sum)", "", *blank, *[self.gaps_us(b) for b in times.values()]])
        whole = [sum(x.time_us for x in launches) for launches in sides.values()]
        rows.append(row("", "all", list(self.costs), [self.saved_bytes / 1e6, ""], whole))
        kinds = ("predicted", *["measured"] * bool(self.launches))
        amounts = [*_AMOUNTS, *["saved MB", "memory"] * trained]
        headers = [*amounts, *(f"{kind} {name}" for kind in kinds for name in times)]
        return Table(["region", "kind", *headers], rows)

    def _kernels(self) -> Table:
        by_name = grouped(self.costs, lambda cost: cost.operator)
        measured = grouped(self.launches, lambda launch: launch.operator)
        rows = []
        for name in dict.fromkeys([*by_name, *measured]):
            costs, launches = by_name.get(name, []), measured.get(name, [])
            row = [name, len(costs) or len(launches), *_amounts(costs)[1:], sum(cost.predicted_us for cost in costs)]
            rows.append([*row, *[sum(launch.time_us for launch in launches)] * bool(self.launches)])
        rows.sort(key=lambda row: -row[-1])
        rows = [["groups of fused operators" if row[0] == FUSED else row[0], *row[1:]] for row in rows]
        headers = ["kernel", "calls", *_AMOUNTS[1:], "predicted us", *["measured us"] * bool(self.launches)]
        return Table(headers, rows)

    def left(self) -> list[str]:
        """What passes left alone and why, and what no region claimed."""
        lines = [
            f"{r.name} left {site.where}: {site.reason}"
            for records in self.records.values()
            for r in records
            for site in r.skipped
        ]
        if self.unrecognised:
            lines.append(f"in no recognised region, compiled by Inductor as they are: {counts(self.unrecognised)}")
        return lines


@dataclass(frozen=True)
class Report:
    """What `explain` returns: `str(report)` for reading, `to_dict()` for programs."""

    precision: str
    target: Target
    notes: tuple[str, ...]
    units: tuple[UnitReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, units in the names: `predicted_us`, `moved_bytes`, `flops` of one module, `time_us` of a pass."""
        return {
            "precision": self.precision,
            "target": self.target.name,
            "notes": list(self.notes),
            "units": [unit.to_dict() for unit in self.units],
        }

    def __str__(self) -> str:
        return "\n\n".join(["\n".join(self.head()), self.summary(), *map(str, self.units)]) + "\n"

    def head(self) -> list[str]:
        measured = "Measured times are of kernels, from torch's profiler, in one module." if self.measured else ""
        return [
            f"precision {self.precision}, target {self.target.name} ({self.target.device})",
            *(f"note: {note}" for note in self.notes),
            "Predicted times are rooflines at the rates that large kernels reach on the target, not measurements.",
            *filter(None, [measured]),
        ]

    @property
    def measured(self) -> bool:
        return any(unit.launches for unit in self.units)

    def summary(self) -> str:
        return str(self.overview())

    def overview(self) -> Table:
        """One line a unit."""
        rows = [
            [u.name, u.modules, u.flops / 1e9, u.moved_bytes / 1e6, u.predicted_us, u.modules * u.predicted_us / 1e3]
            + [u.measured_us] * self.measured
            for u in self.units
        ]
        headers = ["unit", "modules", "GFLOP/module", "MB/module", "predicted us/module", "predicted ms/all"]
        return Table([*headers, *["measured us/module"] * self.measured], rows)


def explain(compiled: nn.Module, *example_inputs: Tensor, measure: bool = False, trace: Path | None = None) -> Report:
    """What was compiled, how, and what it should cost on the model's target.

    With `example_inputs`, the model is called on them first, under the grad mode that is on; else the report is about
    the calls made so far. Regions and passes come from lowering each unit once more, so a warm compile cache hides
    nothing; no code is generated and no weights are read. With `measure`, that call, and where gradients are enabled
    its backward (of the mean of squares of what it returns), is timed with torch's profiler too; `trace` is a file to
    write what it saw to, for Perfetto.

    Raises:
        CompileError: `compiled` was not made by dsv3c.compile, or was neither called nor given inputs.
    """
    compilation = compilation_of(compiled)
    if example_inputs:
        compiled(*example_inputs)
    if not compilation.units.units or ((measure or trace) and not example_inputs):
        raise CompileError(
            "dsv3c.explain: expected a compiled model that has been called, found one that has not; "
            "try dsv3c.explain(compiled, input_ids)"
        )
    launches = _measured(compiled, example_inputs, trace) if measure or trace else ()
    modules = dict(families.compiled_modules(compiled))
    modules_of = Counter(map(Kind.of, modules.values()))
    weights = QuantizedWeights(compilation.weights.recipe) if compilation.weights else None
    target = compilation.target

    def of_first(unit: Unit) -> tuple[Launch, ...]:
        """Those of the first module that the unit was measured in."""
        is_called = unit.variant.gradients == torch.is_grad_enabled()
        mine = [x for x in launches if is_called and Kind.of(modules[x.module]) == unit.kind]
        return tuple(x for x in mine if x.module == mine[0].module)

    units = tuple(
        UnitReport.of(
            lower(unit, compilation.pipeline, weights, price=partial(price, target=target)),
            modules_of[unit.kind],
            target,
            of_first(unit),
        )
        for unit in compilation.units.units.values()
    )
    return Report(compilation.precision, target, (*compilation.notes, EAGER), units)


def _measured(compiled: nn.Module, example_inputs: tuple[Tensor, ...], trace: Path | None) -> tuple[Launch, ...]:
    def call() -> None:
        out = compiled(*example_inputs)
        out = getattr(out, "logits", out)
        if out.requires_grad:
            out.float().square().mean().backward()
            compiled.zero_grad(set_to_none=True)

    return measured_launches(compiled, call, trace)


def _inputs(unit: Unit) -> Iterable[str]:
    """`bfloat16[1, 4096, 7168]` for each tensor the unit was called with."""
    for argument, shape in zip(unit.variant.arguments, unit.shapes, strict=True):
        if argument is not None and shape is not None:
            yield f"{str(argument.dtype).removeprefix('torch.')}{list(shape)}"


def _amounts(costs: Iterable[Cost]) -> list[float]:
    whole = sums(costs)
    return [whole["nodes"], whole["flops"] / 1e9, whole["moved_bytes"] / 1e6]
