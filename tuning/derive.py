"""A table for a device that is not here, from one that was measured: `python -m dsv3c.tuning.derive h800 h100`.

Times are scaled by what the targets' rooflines say of each problem, and rows are marked predicted. The targets differ
in memory and links, not in multiprocessors: the buckets and the choice within a row stay what they are.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace

from dsv3c.tuning import tables, targets
from dsv3c.tuning.buckets import bucket
from dsv3c.tuning.tables import Entry, Row
from dsv3c.tuning.targets import Target
from dsv3c.tuning.workloads import flops_and_bytes

MEASURED = "h200"


def derive(rows: Iterable[Row], source: Target, target: Target) -> list[Row]:
    """`rows`, measured on `source`, as predicted for `target`."""
    return [_scaled(row, source, target) for row in rows]


def _scaled(row: Row, source: Target, target: Target) -> Row:
    work = *flops_and_bytes(row.problem), "fp8"
    factor = target.roofline_us(*work) / source.roofline_us(*work)

    def entry(found: Entry) -> Entry:
        times = {name: round(factor * getattr(found, name), 2) for name in ("median_us", "p20_us", "p80_us")}
        return replace(found, **times)

    return replace(
        row,
        bucket=bucket(row.problem, target.sms),
        best=entry(row.best),
        runner_up=row.runner_up and entry(row.runner_up),
        predicted=True,
    )


def main(names: list[str]) -> None:
    source = targets.load(MEASURED)
    rows = tables.read(tables.SHIPPED / f"{MEASURED}.json", MEASURED)
    for name in names:
        tables.write(tables.SHIPPED / f"{name}.json", name, derive(rows, source, targets.load(name)))


if __name__ == "__main__":
    main(sys.argv[1:])
