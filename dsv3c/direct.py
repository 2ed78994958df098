"""Calls of a unit whose like has been seen go straight to what the backend made.

In each call Dynamo evaluates guards, and its wrappers run more Python, while the GPU has nothing to do: two units lie
in front of the first long kernel. What Dynamo decides about a unit follows from the classes, shapes, strides, dtypes
and devices of the tensors and from torch's global state. Once a call with that signature has gone through it, and shown
which inputs the graph was given and which of its outputs came back, the calls after it do the same by themselves. Not
so while somebody watches or changes what torch does: modes, torch.func, a stance of the compiler.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards
from torch._dynamo import eval_frame
from torch.nn.parallel import DistributedDataParallel

from dsv3c.ahead import Front

KEPT = 4096  # signatures of a kind of module; more, and they are forgotten
PLAIN = (Tensor, nn.Parameter)  # what a subclass does, no signature says


class Conditions(NamedTuple):
    """What decides about a unit besides a call's signature."""

    state: GlobalStateGuard
    parameters: TensorGuards  # they do not change from call to call, and torch compares faster than Python's tuples do

    @classmethod
    def now(cls, parameters: Iterable[Tensor]) -> "Conditions":
        return cls(GlobalStateGuard(), TensorGuards(*parameters, dynamic_dims_sizes=None, dynamic_dims_strides=None))

    def hold(self, parameters: Iterable[Tensor]) -> bool:
        return self.parameters.check(*parameters) and self.state.check() and allowed()


class Way(NamedTuple):
    """What a call does behind Dynamo."""

    conditions: Conditions
    made: Callable[..., Sequence]  # the compiled graph
    inputs: list[Any]  # its sizes; None in place of tensors
    sources: list[tuple[int, int]]  # a position among its inputs, and one among the call's tensors
    results: list[int]  # positions among its outputs
    single: bool
    front: Front

    def __call__(self, tensors: list[Tensor | None]) -> Tensor | tuple[Tensor, ...]:
        inputs = self.inputs.copy()
        for position, source in self.sources:
            inputs[position] = tensors[source]
        with self.front:
            outputs = self.made(*inputs)
        return outputs[self.results[0]] if self.single else tuple([outputs[position] for position in self.results])


def allowed() -> bool:
    """Whether torch does with a call what it did with the one that was seen."""
    return (
        torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and eval_frame._stance.stance == "default"
        and not get_eval_frame_callback()  # a caller's torch.compile, which would trace what the backend made
    )


def signature(parameters: list[Tensor], tensors: tuple[Tensor | None, ...]) -> tuple:
    """Of a unit's call; what else counts is in a `Way`'s conditions."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *[p.requires_grad for p in parameters],
        *[x if x is None else (type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in tensors],
    )


def _whole() -> AbstractContextManager[object]:
    """Within DistributedDataParallel Dynamo would cut the unit's graph at the edges of gradient buckets."""
    if DistributedDataParallel._get_active_ddp_module() is None:
        return nullcontext()  # torch 2.11's settings are a process's: other threads would see the change
    return torch._dynamo.config.patch(optimize_ddp=False)


class Compiled:
    """A unit, `function(parameters, *tensors)`, compiled whole for tensors of any sizes."""

    def __init__(self, function: Callable[..., Any], backend: Callable) -> None:
        self.backend = backend
        self.function = torch.compile(function, backend=self._compile, fullgraph=True, dynamic=None)
        self.calls: list[tuple[Callable, tuple, Sequence]] = []  # of what the backend made, in a call of the unit

    def _compile(self, gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Sequence]:
        made = self.backend(gm, example_inputs)

        def call(*inputs):
            outputs = made(*inputs)
            self.calls.append((made, inputs, outputs))
            return outputs

        return call

    def __call__(self, parameters: dict[str, Tensor], *tensors: Tensor | None) -> tuple[Any, Way | None]:
        """The unit's outputs, and the way of calls with this signature: None if it is not clear what goes where."""
        conditions, every = Conditions.now(parameters.values()), [*parameters.values(), *tensors]
        try:
            with _whole():
                outputs = self.function(parameters, *tensors)
            calls = self.calls.copy()  # those of other threads too
        finally:
            self.calls.clear()
        plain = allowed() and all(x is None or type(x) in PLAIN for x in every)
        return outputs, _way(conditions, *calls[0], every, outputs) if plain and len(calls) == 1 else None


def _way(conditions: Conditions, made, given: tuple, found: Sequence, tensors: list, outputs: Any) -> Way | None:
    single = isinstance(outputs, Tensor)
    there, results = [x for x in tensors if x is not None], [outputs] if single else list(outputs)
    passed = [(position, x) for position, x in enumerate(given) if isinstance(x, Tensor)]
    places = {id(x): place for place, x in enumerate(tensors)}
    positions = {id(x): position for position, x in enumerate(found)}
    unique = len(set(map(id, there))) == len(there)  # else which is which shows in a call with others
    if not unique or any(id(x) not in places for _, x in passed) or any(id(x) not in positions for x in results):
        return None
    inputs = [None if isinstance(x, Tensor) else x for x in given]
    sources = [(position, places[id(x)]) for position, x in passed]
    return Way(conditions, made, inputs, sources, [positions[id(x)] for x in results], single, Front())
