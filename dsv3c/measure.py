"""How long each operator of a compiled model takes, from torch's profiler: what a report's measured times are.

An operator of ours and a library's product are found again by name and shapes in the order of the unit's graph, which
gives them their region and their roofline. Kernels that Inductor fused stand for operators of several regions, and are
listed as fused.
On a GPU times are the kernels'; on a CPU those of our operators' calls, and of nothing else.
"""

import os
import re
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from dsv3c import families
from dsv3c.passes.contract import operator_name
from dsv3c.passes.regions import Region
from dsv3c.pricing import FUSED, Cost, hinted, price_operator
from dsv3c.tuning.targets import Target

ROUNDS = 5
_MODULE, _BACKWARD = "dsv3c module ", "CompiledFunctionBackward"
_RUNTIME = re.compile(r"cu(da)?[A-Z]")
Shapes = tuple[tuple[int, ...], ...]


class _Kernel(NamedTuple):
    name: str
    start_us: float
    time_us: float


@dataclass(frozen=True)
class Launch:
    """One operator with its kernels, or one kernel that Inductor made, as it ran in a module."""

    module: str  # its path
    backward: bool
    operator: str  # as in the graph, or FUSED
    kernels: tuple[str, ...]
    shapes: Shapes  # of its first two tensors: what a library writes to may follow
    start_us: float  # of its first kernel, since the call's first
    time_us: float
    cost: Cost | None = None  # of the node it ran for

    @property
    def region(self) -> Region | None:
        return self.cost.region if self.cost else None


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


def located(launches: tuple[Launch, ...], halves: tuple[fx.GraphModule, ...], target: Target) -> tuple[Launch, ...]:
    """One module's launches, with the costs of the nodes of its unit's forward and backward graph."""
    nodes: dict[tuple, deque[fx.Node]] = defaultdict(deque)
    for backward, half in enumerate(halves):
        for node in half.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                nodes[bool(backward), operator_name(node), _shapes(node)].append(node)
            elif node.target is auto_functionalized:
                shapes = tuple(tuple(hinted(a.meta["val"]).shape) for a in node.all_input_nodes)
                nodes[bool(backward), str(node.args[0]), shapes[:2]].append(node)
    found = []
    for launch in launches:
        waiting = nodes.get((launch.backward, launch.operator, launch.shapes))
        cost = price_operator(waiting.popleft(), target, launch.backward) if waiting else None
        found.append(replace(launch, cost=cost))
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
    """In the order of their calls. Backward goes through the modules in reverse."""
    host = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    forward = [e for e in host if e.name.startswith(_MODULE)]
    backward = [e for e in host if e.name == _BACKWARD]
    paths = [e.name.removeprefix(_MODULE) for e in forward]
    spans = [(e, path, False) for e, path in zip(forward, paths, strict=True)]
    trained = [path for path in reversed(paths) if "rotary" not in path]
    spans += [(e, path, True) for e, path in zip(backward, trained[-len(backward) :] if backward else [], strict=False)]
    calls: dict[int, tuple[Any, list[_Kernel]]] = {}  # by what was called: an operator's kernels may be parts' of it
    for event, kernels in _kernels(events, host) if cuda else _operators(host):
        calls.setdefault(id(_outermost(event)), (_outermost(event), []))[1].extend(kernels)
    first = min((kernels[0].start_us for _, kernels in calls.values()), default=0.0)
    for outer, kernels in calls.values():
        where = next((s for s in spans if _within(outer, s[0])), None)
        if where is None:
            continue
        operator = _operator(outer)
        yield Launch(
            module=where[1],
            backward=where[2],
            operator=operator or FUSED,
            kernels=tuple(kernel.name for kernel in kernels),
            shapes=tuple(tuple(shape) for shape in outer.input_shapes or () if shape)[:2] if operator else (),
            start_us=kernels[0].start_us - first,
            time_us=sum(kernel.time_us for kernel in kernels),
        )


def _kernels(events: Any, host: list[Any]) -> Iterator[tuple[Any, list[_Kernel]]]:
    """What each event on the host launched. The profiler says there how long a kernel took, and not when it began: the
    first of that name and time that is left. It finds an event's kernels by number, and numbers the calls of CUDA's
    runtime anew, so that those may be said to have launched what an operator did."""
    starts: dict[tuple[str, float], deque[float]] = defaultdict(deque)
    for event in sorted(events, key=lambda e: e.time_range.start):
        if event.device_type == DeviceType.CUDA:
            starts[event.name, event.time_range.elapsed_us()].append(event.time_range.start)
    for event in host:
        if event.name.startswith(_MODULE) or _RUNTIME.match(event.name):  # a module's is its name, shown on the device
            continue
        left = [(k, starts[k.name, k.duration]) for k in event.kernels]
        kernels = [_Kernel(k.name, begun.popleft(), k.duration) for k, begun in left if begun]
        if kernels:
            yield event, kernels


def _operators(host: list[Any]) -> Iterator[tuple[Any, list[_Kernel]]]:
    """On a CPU: our operators' calls."""
    for event in host:
        if event is _outermost(event) and event.name.startswith("dsv3c::"):
            yield event, [_Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())]


def _outermost(event: Any) -> Any:
    """The operator that was called, of which this is a part."""
    found = event
    while event is not None:
        if event.name.startswith(("dsv3c::", "aten::")):
            found = event
        event = event.cpu_parent
    return found


def _operator(outer: Any) -> str | None:
    """`dsv3c.gemm.default`; None for a kernel that Inductor made."""
    name = outer.name
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
