"""A report as one page of HTML with nothing outside it: the timeline of each unit as a picture, then the tables."""

from dataclasses import dataclass
from html import escape

from tabulate import tabulate

from dsv3c.pricing import FUSED
from dsv3c.report import Report, UnitReport
from dsv3c.report_table import Table

WIDTH, LANE = 1100, 26
COLORS = {"product": "#1a73e8", "attention": "#a142f4", "cast": "#34a853", "routing": "#fbbc04", "fused": "#9aa0a6"}
_STYLE = """body{font:14px sans-serif;margin:2em;color:#202124;max-width:1200px}h2{font-size:1.1em;margin-top:2.5em}
table{border-collapse:collapse;margin:1em 0;font-size:12px}td,th{padding:2px 8px;border-bottom:1px solid #e8eaed}
th{text-align:left}.key{display:inline-block;width:10px;height:10px;margin:0 4px 0 12px}li{font-size:12px}"""


@dataclass(frozen=True)
class _Bar:
    lane: str
    start_us: float
    time_us: float
    operator: str
    region: str


def page(report: Report) -> str:
    """HTML. Bars are measured kernels if the report has them, else predicted ones, one behind the other."""
    keys = "".join(f'<span class="key" style="background:{color}"></span>{kind}' for kind, color in COLORS.items())
    parts = [
        "<!doctype html><html><head><meta charset='utf-8'><title>dsv3c</title>",
        f"<style>{_STYLE}</style></head><body><h1>{escape(report.head()[0])}</h1>",
        *(f"<p>{escape(line)}</p>" for line in report.head()[1:]),
        _table(report.overview()),
        f"<p>{keys}</p>",
    ]
    for unit in report.units:
        regions, kernels, over, *passes = (_table(table) if table.rows else "" for table in unit.tables())
        parts += [f"<h2>{escape(unit.title)}</h2>", _timeline(unit), regions, kernels, over]
        parts += ["<details><summary>what the passes changed</summary>", *passes, "</details>"]
        parts += ["<ul>", *(f"<li>{escape(line)}</li>" for line in unit.left()), "</ul>"]
    return "\n".join([*parts, "</body></html>\n"])


def _table(table: Table) -> str:
    return str(tabulate(table.rows, table.headers, tablefmt="html", floatfmt=".1f"))


def _timeline(unit: UnitReport) -> str:
    """SVG: a lane for forward and one for backward, in the scale of the longer one; a bar says what it is when pointed
    at."""
    bars = _bars(unit)
    lanes: dict[str, list[_Bar]] = {}
    for bar in bars:
        lanes.setdefault(bar.lane, []).append(bar)
    spans = {lane: max(b.start_us + b.time_us for b in found) - found[0].start_us for lane, found in lanes.items()}
    longest = max(spans.values(), default=0.0)
    if not longest:
        return ""
    height = LANE * len(lanes)
    svg = [f'<svg width="{WIDTH}" height="{height}" role="img">']
    for number, (lane, found) in enumerate(lanes.items()):
        first = found[0].start_us
        for bar in found:
            x, width = (WIDTH * us / longest for us in (bar.start_us - first, bar.time_us))
            title = f"{lane}: {bar.operator}, {bar.region or 'several regions'}, {bar.time_us:.1f} us"
            svg.append(
                f'<rect x="{x:.1f}" y="{number * LANE}" width="{max(width, 0.5):.1f}" height="{LANE - 4}" '
                f'fill="{COLORS[kind_of(bar.operator)]}"><title>{escape(title)}</title></rect>'
            )
    busy = {lane: sum(bar.time_us for bar in found) for lane, found in lanes.items()}
    sums = ", ".join(f"{lane} {spans[lane]:.0f} us, {busy[lane]:.0f} of them in kernels" for lane in lanes)
    what = "measured" if unit.launches else "predicted"
    return "".join([*svg, f"</svg><p>{what}: {sums}</p>"])


def _bars(unit: UnitReport) -> list[_Bar]:
    if unit.launches:
        return [
            _Bar(
                "backward" if x.backward else "forward",
                x.start_us,
                x.time_us,
                x.operator,
                x.region.path if x.region else "",
            )
            for x in unit.launches
        ]
    bars, now = [], 0.0
    for cost in unit.costs:
        lane, region = "backward" if cost.backward else "forward", cost.region.path if cost.region else ""
        bars.append(_Bar(lane, now, cost.predicted_us, cost.operator, region))
        now += cost.predicted_us
    return bars


def kind_of(operator: str) -> str:
    """Which of COLORS an operator is drawn in."""
    name = operator.split(".")[1] if "." in operator else operator
    if operator == FUSED:
        return "fused"
    if "attention" in name or "mla" in name:
        return "attention"
    if "gemm" in name or "mm" in name:
        return "product"
    if "quantize" in name or "cast" in name:
        return "cast"
    if any(word in name for word in ("gate", "sort", "permute")):
        return "routing"
    return "fused"
