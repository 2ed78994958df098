"""Tables of a report, and the sums in them."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from dsv3c.passes.regions import Region
from dsv3c.pricing import Cost


@dataclass(frozen=True)
class Table:
    headers: list[str]
    rows: list[list[Any]]
    widths: tuple[int | None, ...] = ()  # of text columns, at most

    def __str__(self) -> str:
        return tabulate(self.rows, self.headers, floatfmt=".1f", maxcolwidths=list(self.widths) or None)


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def sums(costs: Iterable[Cost]) -> dict[str, Any]:
    costs = list(costs)
    return {
        "nodes": sum(cost.nodes for cost in costs),
        "flops": sum(cost.flops for cost in costs),
        "moved_bytes": sum(cost.moved_bytes for cost in costs),
        "predicted_us": sum(cost.predicted_us for cost in costs),
    }


def region_dict(region: Region | None) -> dict[str, str | None]:
    return {"path": region.path, "kind": region.kind} if region else {"path": None, "kind": None}


def counts(histogram: dict[str, int]) -> str:
    return ", ".join(f"{name.removesuffix('.default')} {count}" for name, count in sorted(histogram.items()))
