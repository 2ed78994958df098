"""Measured kernels against their rooflines: which take more than 1.3x, and what of it can be said from their numbers.

The roofline is the target's at the rates that large kernels reach (tuning/targets.py), so that 1.0 is what a good
kernel does and not a limit of physics. What was measured on another device than the target is not compared.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dsv3c.measure import Launch
from dsv3c.pricing import FUSED, Cost
from dsv3c.report_table import Table, grouped
from dsv3c.tuning.targets import Target, is_here

OVER = 1.3
# What a kernel that does nothing takes (H200, benchmarks/LOG.md).
START_US = 3.2


@dataclass(frozen=True)
class Against:
    """The launches of one operator in one region and direction, beside their roofline."""

    operator: str
    region: str | None
    backward: bool
    kernels: int
    measured_us: float
    roofline_us: float
    why: str | None  # if it is over OVER

    @property
    def ratio(self) -> float | None:
        """None for what is in no graph."""
        return self.measured_us / self.roofline_us if self.roofline_us else None


def against_rooflines(launches: Iterable[Launch], costs: Iterable[Cost], target: Target) -> tuple[Against, ...]:
    """One module's, what it exceeds its roofline by in descending order. What Inductor fused is one line a direction:
    its kernels are not the groups that dsv3c/pricing.py foresees, but move the same data."""
    if not is_here(target):
        return ()
    fused = grouped((cost for cost in costs if cost.operator == FUSED), lambda cost: cost.backward)

    def place(launch: Launch) -> tuple[Any, ...]:
        path = launch.region.path if launch.region else None
        return launch.operator, None if launch.operator == FUSED else path, launch.backward

    found = []
    for (operator, region, backward), mine in grouped(launches, place).items():
        known = fused.get(backward, []) if operator == FUSED else [x.cost for x in mine if x.cost]
        kernels, measured = sum(len(x.kernels) for x in mine), sum(x.time_us for x in mine)
        roofline = sum(cost.predicted_us for cost in known)
        over = measured > OVER * roofline
        why = _why(known, kernels, measured, target) if over else None
        found.append(Against(operator, region, backward, kernels, measured, roofline, why))
    return tuple(sorted(found, key=lambda x: x.roofline_us - x.measured_us))


def _why(costs: list[Cost], kernels: int, measured_us: float, target: Target) -> str:
    """What bounds them, in this order: their launches; the time from one access to the next, where there is less work
    than a launch; or what most of their rooflines are of, memory or arithmetic."""
    flops, moved = sum(cost.flops for cost in costs), sum(cost.moved_bytes for cost in costs)
    roofline = sum(cost.predicted_us for cost in costs)
    if not costs:
        return "in no graph: a copy or a fill"
    if measured_us - roofline <= START_US * kernels:
        return f"launch-bound: {kernels} kernel{'s' * (kernels > 1)}, {START_US} us each for nothing"
    if roofline < START_US * kernels:
        return f"latency-bound: work for {roofline:.1f} us, less than {kernels} launch{'es' * (kernels > 1)}"
    several = f"; {kernels} kernels" if kernels > len(costs) else ""
    copying_us = target.roofline_us(0, moved, "bf16")
    of_memory = (x.predicted_us for x in costs if x.predicted_us == target.roofline_us(0, x.moved_bytes, "bf16"))
    if 2 * sum(of_memory) >= roofline:
        return (
            f"memory-bound: {moved / measured_us / 1e6:.2f} TB/s, {copying_us / measured_us:.0%} of a copy's{several}"
        )
    share = roofline / measured_us
    return f"compute-bound: {flops / measured_us / 1e6:.0f} TFLOPS, {share:.0%} of a large product's{several}"


def roofline_table(found: tuple[Against, ...]) -> Table:
    """Those over OVER."""
    headers = ["over its roofline", "region", "", "kernels", "measured us", "roofline us", "ratio", "why"]
    rows = [
        [
            x.operator,
            x.region or "",
            "backward" if x.backward else "forward",
            x.kernels,
            x.measured_us,
            x.roofline_us,
            x.ratio,
            x.why,
        ]
        for x in found
        if x.why
    ]
    return Table(headers, rows)
