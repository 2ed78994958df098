"""How long each operator of a compiled model takes, from torch's profiler: what a report's measured times are.

An operator of ours and a library's product are found again by name and shapes in the order of the unit's graph, which
gives them their region. Kernels that Inductor fused stand for operators of several regions, and are listed as fused.
On a GPU times are the kernels'; on a CPU those of our operators' calls, and of nothing else.
"""

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from dsv3c import families
from dsv3c.passes.contract import operator_name
from dsv3c.passes.regions import Region, region_of
from dsv3c.pricing import FUSED, hinted

ROUNDS = 5
_MODULE, _BACKWARD = "dsv3c module ", "CompiledFunctionBackward"
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Launch:
    """One operator, or one kernel that Inductor made, as it ran in a module."""

    module: str  # its path
    backward: bool
    operator: str  # as in the graph, or FUSED
    kernel: str
    shapes: Shapes  # of its first two tensors: what a library writes to may follow
    start_us: float  # since the first
    time_us: float
    region: Region | None = None


def measure(compiled: nn.Module, call: Callable[[], object], trace: Path | None = None) -> tuple[Launch, ...]:
    """What `call()`, which calls `compiled`, launches: the times of the median of ROUNDS calls after two others. With
    `trace`, the last call is written there for Perfetto, host included."""
    cuda = next(compiled.parameters()).is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _named(compiled):
        for _ in range(2):
            call()
        rounds = []
        for _ in range(ROUNDS):
            if cuda:
                torch.cuda.synchronize()
            with profile(activities=activities, record_shapes=True) as profiler:
                call()
                if cuda:
                    torch.cuda.synchronize()
            rounds.append(tuple(_launches(profiler.events(), cuda)))
    if trace is not None:
        beside = trace.with_name(trace.name + ".tmp.json")
        profiler.export_chrome_trace(str(beside))
        os.replace(beside, trace)
    return min(rounds, key=lambda r: abs(_total(r) - statistics.median_low(map(_total, rounds))))


def located(launches: tuple[Launch, ...], halves: tuple[fx.GraphModule, ...]) -> tuple[Launch, ...]:
    """One module's launches, with the regions of the nodes of its unit's forward and backward graph."""
    regions: dict[tuple, list[Region | None]] = defaultdict(list)
    for backward, half in enumerate(halves):
        for node in half.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                regions[bool(backward), operator_name(node), _shapes(node)].append(region_of(node))
            elif node.target is auto_functionalized:
                shapes = tuple(tuple(hinted(a.meta["val"]).shape) for a in node.all_input_nodes)
                regions[bool(backward), str(node.args[0]), shapes[:2]].append(region_of(node))
    found = []
    for launch in launches:
        waiting = regions.get((launch.backward, launch.operator, launch.shapes))
        found.append(replace(launch, region=waiting.pop(0)) if waiting else launch)
    return tuple(found)


def _total(launches: tuple[Launch, ...]) -> float:
    return sum(launch.time_us for launch in launches)


@contextmanager
def _named(compiled: nn.Module) -> Iterator[None]:
    """Inside, each compiled module's call is an event of its own."""

    def announced(path: str, forward: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(_MODULE + path):
                return forward(*args, **kwargs)

        return call

    modules = list(families.compiled_modules(compiled))
    forwards = [module.forward for _, module in modules]
    try:
        for path, module in modules:
            module.forward = announced(path, module.forward)
        yield
    finally:
        for (_, module), forward in zip(modules, forwards, strict=True):
            module.forward = forward


def _launches(events: Any, cuda: bool) -> Iterator[Launch]:
    """In the order of their start. Backward goes through the modules in reverse."""
    host = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    forward = [e for e in host if e.name.startswith(_MODULE)]
    backward = [e for e in host if e.name == _BACKWARD]
    paths = [e.name.removeprefix(_MODULE) for e in forward]
    spans = [(e, path, False) for e, path in zip(forward, paths, strict=True)]
    trained = [path for path in reversed(paths) if "rotary" not in path]
    spans += [(e, path, True) for e, path in zip(backward, trained[-len(backward) :] if backward else [], strict=False)]
    first = min((e.time_range.start for e, *_ in spans), default=0.0)
    for event in host:
        times = [kernel.duration for kernel in event.kernels]
        operator = _operator(event)
        if not cuda and event is _outermost(event) and event.name.startswith("dsv3c::"):
            times = [event.time_range.elapsed_us()]
        where = next((s for s in spans if _within(event, s[0])), None)
        if not times or where is None:
            continue
        outer = _outermost(event)
        shapes = tuple(tuple(shape) for shape in outer.input_shapes or () if shape)[:2] if operator else ()
        name = event.kernels[0].name if event.kernels else event.name
        yield Launch(
            where[1], where[2], operator or FUSED, name, shapes, event.time_range.start - first, float(sum(times))
        )


def _outermost(event: Any) -> Any:
    """The operator that was called, of which this is a part."""
    found = event
    while event is not None:
        if event.name.startswith(("dsv3c::", "aten::")):
            found = event
        event = event.cpu_parent
    return found


def _operator(event: Any) -> str | None:
    """`dsv3c.gemm.default`; None for a kernel that Inductor made."""
    name = _outermost(event).name
    return name.replace("::", ".") + ".default" if name.startswith(("dsv3c::", "aten::")) else None


def _within(event: Any, span: Any) -> bool:
    return (
        event.thread == span.thread
        and span.time_range.start <= event.time_range.start
        and event.time_range.end <= span.time_range.end
    )


def _shapes(node: fx.Node) -> Shapes:
    values = [hinted(a.meta["val"]) for a in node.args if isinstance(a, fx.Node) and "val" in a.meta]
    return tuple(tuple(value.shape) for value in values if isinstance(value, torch.Tensor) and value.dim())[:2]
