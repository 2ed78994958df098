"""Drawings: the picture of a timeline as in the papers (SVG, PNG), and a trace for Perfetto.

A picture has a row per rank and a cell per step with its micro-batch's number; colours are kinds, paler for the reverse
direction and for a rank's later stages; an overlapped pair is one framed cell, the forward's part first.
"""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from dsv3c.schedules.graph import graph, held
from dsv3c.schedules.program import Action, Overlap, ScheduleError, actions
from dsv3c.schedules.simulate import Span, Timeline

_KINDS = {
    "F": ("#f2a33a", "forward"),
    "B": ("#3f9f5f", "backward"),
    "I": ("#b8dc46", "input gradient"),
    "W": ("#5b9bd5", "weight gradient"),
}
_INK, _IDLE = "#262626", "#f0f0f0"
_DIGIT, _ROW, _WIDEST = 0.066, 0.28, 120.0  # inches: a digit, a rank, the widest picture


def plot(timeline: Timeline, path: Path, *, title: str = "", unit: Fraction = Fraction(1)) -> None:
    """Draw a timeline to a .svg or .png; a tick is ``unit`` on the axis.

    Raises:
        ScheduleError: another suffix; no matplotlib.
    """
    if path.suffix not in (".svg", ".png"):
        raise ScheduleError(f"plot: expected a file ending in .svg or .png, found '{path}'; try {path.stem}.svg")
    try:
        from matplotlib import rc_context
        from matplotlib.collections import PolyCollection
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ScheduleError("plot: expected matplotlib, found none; try pip install 'dsv3c[plot]'") from error

    ranks, end = len(timeline.rows), timeline.makespan
    parts = [(rank, *part) for rank, row in enumerate(timeline.rows) for span in row for part in _parts(timeline, span)]
    roomy = max(((len(str(a.microbatch)) + 1) * _DIGIT / (stop - start) for _, start, stop, a in parts if stop > start))
    inch = min(roomy, _WIDEST / end)  # of a tick: the longest number fits its cell, unless that is too wide a picture
    width, height = end * inch, ranks * _ROW

    def box(rank: int, start: float, stop: float) -> list[tuple[float, float]]:
        return [(start, rank), (stop, rank), (stop, rank + 0.9), (start, rank + 0.9)]

    def paler(action: Action) -> bool:
        return bool(action.direction) or action.stage >= ranks

    def colour(action: Action) -> tuple[float, ...]:
        return tuple(c + (1 - c) * 0.45 * paler(action) for c in to_rgb(_KINDS[action.kind][0]))

    figure = Figure(figsize=(max(width, 6.0) + 0.9, height + 1.0))
    total = figure.get_size_inches()
    left = 0.7 / total[0]
    axes = figure.add_axes((left, 0.65 / total[1], width / total[0], height / total[1]))
    axes.add_collection(PolyCollection([box(r, 0, end) for r in range(ranks)], facecolors=_IDLE, edgecolors="none"))
    boxes = [box(rank, start, stop) for rank, start, stop, _ in parts]
    fills = [colour(action) for *_, action in parts]
    axes.add_collection(PolyCollection(boxes, facecolors=fills, edgecolors=_INK, linewidths=0.3))
    pairs = [box(r, s.start, s.end) for r, row in enumerate(timeline.rows) for s in row if isinstance(s.cell, Overlap)]
    axes.add_collection(PolyCollection(pairs, facecolors="none", edgecolors=_INK, linewidths=1.0))
    for rank, start, stop, action in parts:
        if (stop - start) * inch > len(str(action.microbatch)) * _DIGIT:
            place = ((start + stop) / 2, rank + 0.45)
            axes.annotate(str(action.microbatch), place, ha="center", va="center", fontsize=7, color=_INK)

    axes.set(xlim=(0, end), ylim=(ranks, -0.1), yticks=[r + 0.45 for r in range(ranks)])
    axes.set_yticklabels([f"rank {r}" for r in range(ranks)], fontsize=8)
    axes.xaxis.set_major_formatter(lambda tick, _: f"{float(tick * unit):g}")
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10, pad=3)
    shown = {action.kind for *_, action in parts}
    legend = [Patch(facecolor=_KINDS[k][0], edgecolor=_INK, lw=0.3, label=_KINDS[k][1]) for k in _KINDS if k in shown]
    legend.append(Patch(facecolor=_IDLE, label="idle"))
    if any(paler(action) for *_, action in parts):
        legend.append(Patch(facecolor="none", label="paler: reverse direction or a rank's later stages"))
    style = {"ncols": len(legend), "frameon": False, "fontsize": 8}
    figure.legend(handles=legend, loc="lower left", bbox_to_anchor=(left, 0), **style)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "dsv3c"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _parts(timeline: Timeline, span: Span) -> Iterator[tuple[float, float, Action]]:
    """(start, stop, action) of a span; a pair's time is shared out as its halves would take it alone."""
    cell = span.cell
    if isinstance(cell, Action):
        yield span.start, span.end, cell
        return
    forward, backward = timeline.cost.ticks(cell.forward), timeline.cost.ticks(cell.backward)
    middle = span.start + (span.end - span.start) * forward / max(1, forward + backward)
    yield span.start, middle, cell.forward
    yield middle, span.end, cell.backward


def trace(timeline: Timeline, *, unit: Fraction = Fraction(1)) -> str:
    """JSON for ui.perfetto.dev: a thread per rank, arrows for transfers, a counter of activations per rank.

    A tick is ``unit`` microseconds, which is what the viewer will call whatever unit the costs are in.
    """
    rows = timeline.rows
    g = graph(tuple(tuple(span.cell for span in row) for row in rows))
    spans = [span for row in rows for span in row]

    def at(ticks: int) -> float:
        return float(ticks * unit)

    events: list[dict[str, object]] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "pipeline"}}]
    for rank, row in enumerate(rows):
        thread = {"pid": 0, "tid": rank}
        events.append({"ph": "M", "name": "thread_name", **thread, "args": {"name": f"rank {rank}"}})
        for span, count in zip(row, held([span.cell for span in row], [1] * g.num_stages), strict=True):
            kinds = "&".join(action.kind for action in actions(span.cell))
            time = {"ts": at(span.start), "dur": at(span.end - span.start)}
            events.append({"ph": "X", "name": str(span.cell), "cat": kinds, **thread, **time})
            counter = {"ph": "C", "name": f"activations, rank {rank}", "pid": 0, "ts": at(span.start)}
            events.append({**counter, "args": {"held": count}})
    for number, (source, target, action) in enumerate(g.messages()):
        flow = {"name": str(action), "cat": "transfer", "id": number, "pid": 0}
        leave, arrive = spans[source], spans[target]
        # An arrow binds to the slice that covers its time: the last moment of the one, the first of the other.
        events.append({"ph": "s", **flow, "tid": g.rank[source], "ts": at(max(leave.start, leave.end - 1))})
        events.append({"ph": "f", "bp": "e", **flow, "tid": g.rank[target], "ts": at(arrive.start)})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
