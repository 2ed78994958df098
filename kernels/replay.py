"""What an operator's launcher did is done again without asking it.

A launcher checks, allocates, chooses a kernel and its configuration, and lays out arguments. All of that follows from
the shapes, strides, dtypes and alignments of the tensors and from the other arguments, the *signature* of a call, and
from the tuning table, which a process reads once. At the second call with a signature the launcher is watched. If all
it did was to allocate, to make views, to launch kernels and to call a library's product, the calls after it allocate
the same (workspaces at once, not one after the other), launch the same kernels at their own addresses and call the same
products. A launcher that does more (copies what is not contiguous, fills) is asked each time. On an H200's host a call
costs 18 to 24 µs so, instead of 43 to 67; and all operators share this code, which stays in the processor's caches.
"""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from dsv3c.kernels.launch import Launch, Loaded, hooked, recorded

KEPT = 4096  # signatures of an operator; more, and they are forgotten
ALIGNMENT = 16  # bytes; all that kernels and launchers ask of an address

_empty = torch._C._dynamo.guards._empty_strided_cuda  # what Inductor's code calls; on the current device
_reinterpret = torch._C._dynamo.guards._reinterpret_tensor
_aten = torch.ops.aten
_PRODUCTS = {_aten._scaled_mm_v2.out, _aten.mm.out, _aten.mm.dtype_out}
_ALLOCATE = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.new_empty.default,
             _aten.new_empty_strided.default, _aten.empty_like.default}  # fmt: skip

Spec = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype
Place = tuple[int, int]  # a tensor of the call (arguments, results, workspaces, in this order), and bytes behind it


class _Step(NamedTuple):
    """A launch whose addresses are left out."""

    kernel: Loaded
    grid: tuple[int, int, int]
    descs: list[tuple[Callable[..., list], Place, tuple[int, ...], tuple[int, ...]]]  # encoder, and what it encodes
    values: list
    pointers: list[tuple[int, Place]]  # positions in `values`


class _View(NamedTuple):
    """Of a tensor of the call."""

    source: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # elements


class _Product(NamedTuple):
    """A library's product, with views in place of tensors."""

    func: Callable
    args: list
    kwargs: dict[str, Any]

    def __call__(self, tensors: list[Tensor]) -> None:
        kwargs = {name: _filled(value, tensors) for name, value in self.kwargs.items()}
        self.func(*_filled(self.args, tensors), **kwargs)


def _filled(value: Any, tensors: list[Tensor]) -> Any:
    if type(value) is _View:
        return _reinterpret(tensors[value.source], value.shape, value.strides, value.offset)
    return [_filled(part, tensors) for part in value] if type(value) is list else value


class _Plan(NamedTuple):
    """What the calls of a signature do."""

    made: list[Spec]  # results, then workspaces
    results: Callable[[list[Tensor]], Any]  # of what is made, what the operator returns
    steps: list[_Step | _Product]

    def replay(self, signature: tuple, args: tuple, addresses: list[int]):
        made = [_empty(*spec) for spec in self.made]
        addresses += [x.data_ptr() for x in made]
        stream = driver.active.get_current_stream(signature[0])
        for step in self.steps:
            if type(step) is _Product:
                step([x for x in args if isinstance(x, Tensor)] + made)
                continue
            kernel, grid, descs, values, pointers = step
            arguments: list = []
            for encode, (source, offset), shape, strides in descs:
                arguments += encode(addresses[source] + offset, shape, strides)
            behind = len(arguments)
            arguments += values
            for at, (source, offset) in pointers:
                arguments[behind + at] = addresses[source] + offset
            kernel.start(grid, stream, arguments)
        return self.results(made)


class Replay:
    """An operator on a GPU.

    Args:
        allocate: checks the arguments and makes the results: None, a tensor, or a sequence of them.
        launcher: fills those: launcher(*args, *results).
    """

    def __init__(self, allocate: Callable, launcher: Callable) -> None:
        self.allocate, self.launcher = allocate, launcher
        self.ways: dict[tuple, Callable] = {}  # by signature, how the next call is done

    def __call__(self, *args):
        signature, addresses, first = self._signature(args)
        way = self._call if hooked() else self.ways.get(signature, first)
        return way(signature, args, addresses)

    def known(self, args: tuple) -> Callable[[tuple], Any] | None:
        """Does calls with arguments like these without another look at them; None as long as the launcher is asked."""
        signature, addresses, _ = self._signature(args)
        plan = getattr(self.ways.get(signature), "__self__", None)
        if not isinstance(plan, _Plan) or any(address % ALIGNMENT for address in addresses):
            return None

        def call(args: tuple) -> Any:
            addresses = [x.data_ptr() for x in args if isinstance(x, Tensor)]
            if hooked() or any(address % ALIGNMENT for address in addresses):
                return self(*args)
            return plan.replay(signature, args, addresses)

        return call

    def _signature(self, args: tuple) -> tuple[tuple, list[int], Callable]:
        """And the addresses, and what is done with a call like none before."""
        key: list = [driver.active.get_current_device()]
        addresses, first = [], self._first
        for arg in args:
            if isinstance(arg, Tensor):
                address = arg.data_ptr()
                addresses.append(address)
                key.append((arg.shape, arg.stride(), arg.dtype, arg.get_device(), address % ALIGNMENT))
            elif isinstance(arg, list):
                key.append(tuple((x.shape, x.dtype, x.get_device()) if isinstance(x, Tensor) else x for x in arg))
                first = self._listed
            else:
                key.append(arg)
        return tuple(key), addresses, first

    def _call(self, signature, args: tuple, addresses: list[int]):
        out = self.allocate(*args)
        self.launcher(*args, *(() if out is None else (out,)))
        return out

    def _first(self, signature: tuple, args: tuple, addresses: list[int]):
        """Watching takes time, and sizes that vary may not come again."""
        self._keep(signature, self._second)
        return self._call(signature, args, addresses)

    def _keep(self, signature: tuple, way: Callable) -> None:
        if len(self.ways) >= KEPT:
            self.ways.clear()
        self.ways[signature] = way

    def _listed(self, signature: tuple, args: tuple, addresses: list[int]):
        """With lists, the launcher makes a table of their addresses, and is asked each time. The results, as many, need
        not be: checking and making them took a third of the call."""
        out = self._call(signature, args, addresses)
        if isinstance(out, list) and all(x.get_device() == signature[0] for x in out):
            self._keep(signature, partial(self._made, [_spec(x) for x in out]))
        return out

    def _made(self, specs: list[Spec], signature: tuple, args: tuple, addresses: list[int]):
        out = [_empty(*spec) for spec in specs]
        self.launcher(*args, out)
        return out

    def _second(self, signature: tuple, args: tuple, addresses: list[int]):
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if len(set(map(id, tensors))) < len(tensors):
            return self._call(signature, args, addresses)  # which is which shows in a call with others
        out = self.allocate(*args)
        results = [] if out is None else [out] if isinstance(out, Tensor) else list(out)
        with recorded() as (tape, seen), _Watch(tensors + results, tape) as watch:
            self.launcher(*args, *(() if out is None else (out,)))
        made, steps = watch.tensors[len(tensors) :], [watch.step(done) for done in tape]
        here = all(x.get_device() == signature[0] for x in watch.tensors)
        if watch.exact and len(seen) == sum(isinstance(done, Launch) for done in tape) and here:
            self.ways[signature] = _Plan([_spec(x) for x in made], _returned(out), steps).replay
        else:
            self.ways[signature] = self._call
        return out


def _spec(x: Tensor) -> Spec:
    return tuple(x.shape), x.stride(), x.dtype


def _returned(out) -> Callable[[list[Tensor]], Any]:
    if out is None:
        return lambda made: None
    if isinstance(out, Tensor):
        return itemgetter(0)
    number = len(out)
    return lambda made: tuple(made[:number])


class _Watch(TorchDispatchMode):
    """Where each tensor comes from. `exact` says whether all that torch did was to allocate, to make views and to call
    products, which go on the tape."""

    def __init__(self, tensors: list[Tensor], tape: list) -> None:
        super().__init__()
        self.tensors, self.tape, self.exact = tensors, tape, True
        self.places: dict[int, Place] = {id(x): (source, 0) for source, x in enumerate(tensors)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATE:
            self.places[id(out)] = len(self.tensors), 0
            self.tensors.append(out)
        elif func.is_view and isinstance(out, Tensor) and id(args[0]) in self.places and _shares(out, args[0]):
            source, offset = self.places[id(args[0])]
            self.places[id(out)] = source, offset + out.data_ptr() - args[0].data_ptr()
        elif func in _PRODUCTS:
            kwargs = {name: self._view(value) for name, value in kwargs.items()}
            self.tape.append(_Product(func, self._view(list(args)), kwargs))
        else:
            self.exact = False
        return out

    def _view(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._view(part) for part in value]
        if not isinstance(value, Tensor):
            return value
        source, offset = self._place(value)
        self.exact &= value.dtype == self.tensors[source].dtype
        return _View(source, tuple(value.shape), value.stride(), offset // value.itemsize)

    def step(self, launch: Launch | _Product) -> _Step | _Product:
        if isinstance(launch, _Product):
            return launch
        pointers = [(at, self._place(value)) for at, value in enumerate(launch.values) if isinstance(value, Tensor)]
        values = [0 if isinstance(value, Tensor) else value for value in launch.values]
        self.exact &= not any(isinstance(value, (tuple, list)) for value in values)
        descs = [
            (encode, self._place(desc.base), desc.shape, desc.strides)
            for encode, desc in zip(launch.kernel.encoders, launch.descs, strict=True)
        ]
        return _Step(launch.kernel, launch.grid, descs, values, pointers)

    def _place(self, x: Tensor) -> Place:
        self.exact &= id(x) in self.places
        return self.places.get(id(x), (0, 0))


def _shares(view: Tensor, x: Tensor) -> bool:
    """`contiguous` and `reshape`, which torch counts as views, may copy; a view of nothing has no address."""
    return view.numel() > 0 and view.untyped_storage()._cdata == x.untyped_storage()._cdata
