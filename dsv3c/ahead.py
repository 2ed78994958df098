"""The operators that a unit begins with are started before torch comes to call them.

When a call begins and the GPU is idle, the host is what takes the time: torch's wrappers around a unit's graph (200 µs
on an H200's host), and then what lies between its operators. The operators at the front need nothing of that: their
operands are the unit's inputs, or what those before them returned. A unit's call is watched once. From then on its
front is started first, and each operator is handed its result when the graph calls it with just those operands. Since
a front ends where anything else runs, nothing can have written to an operand in between.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

LONGEST = 10  # operators; those in front of a MoE layer's first long product are eight
DEVICES = ("cuda",)  # on a CPU there is nothing to be ahead of, and what Inductor made for it is not seen

# Operator -> what finds out for arguments on a GPU how a call like it is done, if that is known (kernels/replay.py).
known: dict[str, Callable[[tuple], Callable[[tuple], Any] | None]] = {}

_here = threading.local()  # .front: of the unit that this thread calls; .started: operators without their results
_watching = threading.Lock()
_guards: Any = torch._C._dynamo.guards
_reinterpret = _guards._reinterpret_tensor


class _View(NamedTuple):
    """All of an input, or of what an operator returned, in this shape or as it is."""

    source: int
    shape: torch.Size | None = None
    strides: tuple[int, ...] = ()

    def of(self, tensors: list[Tensor]) -> Tensor:
        x = tensors[self.source]
        return x if self.shape is None else _reinterpret(x, self.shape, self.strides, 0)


@dataclass
class _Step:
    name: str
    operator: OpOverload
    args: list  # with views in place of tensors
    run: Callable[[tuple], Any] | None = None  # of such arguments, without a look at them if that can be

    def ask(self, args: tuple) -> Any:
        return self.operator(*args)


class _Started(NamedTuple):
    name: str
    args: tuple
    result: Any


class Front:
    """Of a unit, in calls with one signature: the operators that it begins with, None before a call was watched."""

    steps: list[_Step] | None = None

    def __enter__(self) -> None:
        _here.front = self

    def __exit__(self, *_) -> None:
        _here.front = None


def begin(inputs: Sequence) -> AbstractContextManager:
    """Around the graph of the unit that is called, with all of its inputs."""
    front = getattr(_here, "front", None)
    if front is not None and front.steps is None:
        if not all(x.device.type in DEVICES for x in _tensors(inputs)):
            front.steps = []
        elif _watching.acquire(blocking=False):  # else by another thread, and this one in a later call
            return _Watch(front, inputs)
    return _Start(front.steps, inputs) if front is not None and front.steps else nullcontext()


def result(name: str, args: tuple) -> Any:
    """What operator `name` returns for `args`, if it was started; else None. What was started and is not called next
    is forgotten."""
    started = getattr(_here, "started", None)
    if not started:
        return None
    first = started.popleft()
    if first.name == name and len(first.args) == len(args) and all(map(_same, first.args, args)):
        return first.result
    started.clear()
    return None


class _Start:
    def __init__(self, steps: list[_Step], inputs: Sequence) -> None:
        self.steps, self.inputs = steps, inputs

    def __enter__(self) -> None:
        tensors = _tensors(self.inputs)
        cuda = tensors[0].is_cuda
        if cuda and tensors[0].get_device() != torch.cuda.current_device():
            return  # the graph would make it the current one
        started: deque[_Started] = deque()
        try:
            for step in self.steps:
                args = tuple([arg.of(tensors) if type(arg) is _View else arg for arg in step.args])
                out = step.operator(*args) if step.run is None else step.run(args)
                if cuda and step.run is None:
                    step.run = known[step.name](args) or step.ask
                tensors += _tensors(out)
                started.append(_Started(step.name, args, out))
        except torch.OutOfMemoryError:  # all of it at once is more than the graph needs
            return
        _here.started = started

    def __exit__(self, *_) -> None:
        _here.started = None


class _Watch(TorchDispatchMode):
    """Finds a front. Kernels of Inductor's are no operators: they are seen where its code launches them, which is in
    Python for that (backend.py)."""

    def __init__(self, front: Front, inputs: Sequence) -> None:
        super().__init__()
        self.front, self.tensors, self.open = front, _tensors(inputs), True
        self.steps: list[_Step] = []
        self.kernels: Any = None

    def __enter__(self) -> "_Watch":
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        self.kernels, self.run = CachingAutotuner, CachingAutotuner.run

        thread = threading.get_ident()

        def launched(kernel, *args, **kwargs):
            if threading.get_ident() == thread:
                self.end()
            return self.run(kernel, *args, **kwargs)

        self.kernels.run = launched
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.kernels.run = self.run
        if exception[0] is None:
            self.front.steps = self.steps
        _watching.release()

    def end(self) -> None:
        self.open = False
        self.tensors.clear()  # the graph may not need them any more

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        step = self._step(func, args, kwargs) if self.open else None
        if step is None and not func.is_view:
            self.end()
        out = func(*args, **(kwargs or {}))
        if step is not None:
            self.steps.append(step)
            self.tensors += _tensors(out)
        return out

    def _step(self, func, args: tuple, kwargs: dict | None) -> _Step | None:
        name = func._schema.name.removeprefix("dsv3c::")
        if func.namespace != "dsv3c" or name not in known or func._schema.is_mutable or kwargs:
            return None
        if len(self.steps) == LONGEST:
            return None
        views = [self._view(arg) if isinstance(arg, Tensor) else arg for arg in args]
        tensors = sum(isinstance(arg, (Tensor, list)) for arg in args)
        return _Step(name, func, views) if sum(type(view) is _View for view in views) == tensors else None

    def _view(self, x: Tensor) -> _View | None:
        """Of the same memory, all of it, as the same type."""
        for source, of in enumerate(self.tensors):
            if (of.data_ptr(), of.numel(), of.dtype) == (x.data_ptr(), x.numel(), x.dtype):
                if (of.shape, of.stride(), of.requires_grad) == (x.shape, x.stride(), False):
                    return _View(source)
                if of.is_contiguous():
                    return _View(source, x.shape, x.stride())
        return None


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in ([values] if isinstance(values, Tensor) else values) if isinstance(x, Tensor)]


def _same(a: Any, b: Any) -> bool:
    """Operands: the same values, or the same memory seen the same way."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
