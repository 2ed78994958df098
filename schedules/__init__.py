"""Pipeline schedules as values: generated, checked, priced, drawn, searched. No torch, nothing of ours.

>>> program = dualpipe(num_ranks=4, num_microbatches=8)
>>> check(program, activations=5)
>>> max(simulate(program, Cost(forward=1, backward=2, weight=1, overlapped=3)).bubbles)
2
"""

from dsv3c.schedules.check import Transfer, check, check_communication, communicate
from dsv3c.schedules.draw import plot, trace
from dsv3c.schedules.generators import (
    GENERATORS,
    canonical,
    dualpipe,
    dualpipev,
    generate,
    gpipe,
    interleaved,
    one_f_one_b,
    zb1p,
    zbv,
)
from dsv3c.schedules.layer_pair import DEEPSEEK, LayerCost, LayerTimeline, best_order, simulate_pairs
from dsv3c.schedules.program import (
    Action,
    Cell,
    Kind,
    Overlap,
    Program,
    ScheduleError,
    actions,
    from_text,
    to_text,
    to_torch_csv,
)
from dsv3c.schedules.search import Found, search
from dsv3c.schedules.simulate import Cost, Span, Timeline, simulate

__all__ = [
    "DEEPSEEK",
    "GENERATORS",
    "Action",
    "Cell",
    "Cost",
    "Found",
    "Kind",
    "LayerCost",
    "LayerTimeline",
    "Overlap",
    "Program",
    "ScheduleError",
    "Span",
    "Timeline",
    "Transfer",
    "actions",
    "best_order",
    "canonical",
    "check",
    "check_communication",
    "communicate",
    "dualpipe",
    "dualpipev",
    "from_text",
    "generate",
    "gpipe",
    "interleaved",
    "one_f_one_b",
    "plot",
    "search",
    "simulate",
    "simulate_pairs",
    "to_text",
    "to_torch_csv",
    "trace",
    "zb1p",
    "zbv",
]
