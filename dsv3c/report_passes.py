"""What the passes did: sites, operators, and what the joint graph costs before and after each.

A captured graph (L0) holds torch functions, whose work is not known before AOTAutograd has taken them apart, so passes
on it have no costs. Bytes are those of dsv3c/pricing.py: Inductor's fusions are taken into account on both sides.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from dsv3c.passes import Record
from dsv3c.passes.regions import Region
from dsv3c.report_table import Table, counts, grouped, region_dict, sums

Records = dict[str, list[Record]]  # by level
_QUANTITIES = ("nodes", "flops", "moved_bytes", "predicted_us")


def passes_table(records: Records) -> Table:
    """One line a pass."""
    rows = []
    for level, r in _all(records):
        moved = [sums(costs)["moved_bytes"] / 1e6 for costs in r.priced] if r.priced else [None, None]
        what = r.name, level, r.tier, r.sites, len(r.skipped), r.time_us / 1e3
        rows.append([*what, *moved, counts(r.added), counts(r.removed)])
    headers = ["pass", "level", "tier", "sites", "left", "ms", "MB before", "MB after", "added", "removed"]
    return Table(headers, rows, (None,) * 8 + (48, 32))


def regions_table(records: Records) -> Table:
    """One line for each region that a pass changed, with its operators, FLOPs and bytes before and after."""
    rows = []
    for _, r in _all(records):
        for region, *both in _changed(r):
            path = region.path if region else "(none)"
            columns = [[side[key] / unit for side in both] for key, unit in (("flops", 1e9), ("moved_bytes", 1e6))]
            rows.append([r.name, path, *(side["nodes"] for side in both), *columns[0], *columns[1]])
    names = ("operators", "GFLOP", "MB")
    return Table(["pass", "region", *(f"{name} {when}" for name in names for when in ("before", "after"))], rows)


def passes_list(records: Records) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [{"level": level, **asdict(replace(r, priced=None)), "priced": _priced(r)} for level, r in _all(records)]


def _all(records: Records) -> Iterator[tuple[str, Record]]:
    return ((level, record) for level, each in records.items() for record in each)


def _priced(r: Record) -> dict[str, Any] | None:
    if r.priced is None:
        return None
    before, after = map(sums, r.priced)
    regions = [{**region_dict(region), "before": old, "after": new} for region, old, new in _changed(r)]
    return {"before": before, "after": after, "regions": regions}


def _changed(r: Record) -> Iterator[tuple[Region | None, dict[str, Any], dict[str, Any]]]:
    before, after = (grouped(costs, lambda cost: cost.region) for costs in r.priced or ((), ()))
    for region in dict.fromkeys([*before, *after]):
        both = sums(before.get(region, ())), sums(after.get(region, ()))
        if any(both[0][key] != both[1][key] for key in _QUANTITIES):
            yield region, *both
