"""Modules to compiled units: equal ones share one, each unit is compiled once for each variant of its inputs.

A unit is a function of ours, `unit(parameters, *tensors)`, around a template: a copy of the module on the meta device,
whose own parameters never take part. Sizes vary freely within a variant. Sizes of one don't: torch specialises them,
so "one sequence", "one token", "one cached token" are variants of their own, with a code object of their own. That
makes the set of compilations finite and known; only from 2^31 elements on, where indices get wider, is one compiled
again.
"""

import copy
import hashlib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.func import functional_call

from dsv3c.direct import KEPT, Compiled, Way, signature
from dsv3c.errors import Dsv3cError
from dsv3c.families import LAYERS, OTHERS, Outputs, call_of
from dsv3c.out_of_memory import watch_backward
from dsv3c.passes.regions import REGIONS
from dsv3c.twin import HOOKS, eager_twin

CONSTANTS = (int, float, bool, str, type(None))  # of attributes that what a module computes may depend on
NOT_COMPUTED_WITH = ("training", "layer_idx", "gradient_checkpointing")  # or layers would be compiled one by one
BackendFactory = Callable[["Unit"], Callable]
OutOfMemory = Callable[[str, torch.OutOfMemoryError, Any], None]  # where, what was raised, a layer's backward node


class Argument(NamedTuple):
    """What a unit is specialised on in one of its tensors."""

    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    sizes: tuple[int, ...]  # 0 and 1 as they are, a larger varying size as 2, a fixed one as it is

    @classmethod
    def of(cls, tensor: Tensor | None, symbolic: tuple[int, ...]) -> "Argument | None":
        if tensor is None:
            return None
        sizes = list(tensor.shape)
        for dim in symbolic:
            if sizes[dim] > 2:
                sizes[dim] = 2
        return cls(tensor.dtype, tensor.device, tensor.requires_grad, tuple(sizes))


class Kind(NamedTuple):
    """Modules of one kind run the same code on other parameters."""

    module_class: str
    parameters: tuple[tuple[str, torch.Size, torch.dtype], ...]
    parts: tuple[tuple, ...] = ()  # of each its path, its class, and the numbers and words that it computes with

    @classmethod
    def of(cls, module: nn.Module) -> "Kind":
        parameters = tuple((name, p.shape, p.dtype) for name, p in tensors_of(module).items())
        parts = tuple(
            (path, f"{type(part).__module__}.{type(part).__qualname__}", *_constants(part))
            for path, part in module.named_modules()
        )
        return cls(type(module).__name__, parameters, parts)

    @property
    def name(self) -> str:
        if self.module_class not in LAYERS:
            return OTHERS[self.module_class][0]
        moe = any(name.startswith("mlp.experts.") for name, *_ in self.parameters)
        return f"{'mtp' if self.module_class == 'MTPLayer' else 'moe' if moe else 'dense'}_layer"


def _constants(part: nn.Module) -> list[tuple[str, object]]:
    return [
        (name, constant)
        for name, constant in vars(part).items()
        if type(constant) in CONSTANTS and not name.startswith("_") and name not in NOT_COMPUTED_WITH
    ]


class Variant(NamedTuple):
    """What one compilation of a unit holds for."""

    arguments: tuple[Argument | None, ...]
    trained: tuple[bool, ...]  # which parameters require a gradient
    gradients: bool

    @property
    def name(self) -> str:
        x, *rest = self.arguments
        words = ["one_sequence" if x.sizes[0] == 1 else "many_sequences"]
        words.append("one_token" if x.sizes[1] == 1 else "many_tokens")
        words += [
            word
            for word, argument in zip(("masked", "cached", "paged"), rest[2:], strict=False)
            if argument is not None
        ]
        return "_".join([*words, "training" if self.gradients else "inference"])


@dataclass(eq=False)
class Unit:
    """One kind of module in one variant, and the sizes it was first called with."""

    kind: Kind
    variant: Variant
    template: nn.Module
    shapes: tuple[torch.Size | None, ...]
    function: Callable[..., Outputs] = field(init=False)

    def __post_init__(self) -> None:
        template, call = self.template, call_of(self.template)

        def unit(parameters, *tensors):
            return call.trace(lambda *args, **kwargs: functional_call(template, parameters, args, kwargs), *tensors)

        # Dynamo keeps what it compiled by code object, and what it learned about sizes by name: another model's layer
        # of this kind, with other sizes, would make this one's parameters vary.
        digest = hashlib.sha256(repr((self.kind, self.variant)).encode()).hexdigest()[:8]
        code = unit.__code__.replace(co_name=f"{self.name}_{digest}")
        self.function = types.FunctionType(code, unit.__globals__, self.name, None, unit.__closure__)

    @property
    def name(self) -> str:
        return f"{self.kind.name}_{self.variant.name}"

    def compiled(self, backend: Callable) -> Compiled:
        return Compiled(self.function, backend)


@contextmanager
def varying(tensors: tuple[Tensor | None, ...], symbolic: tuple[tuple[int, ...], ...]) -> Iterator[None]:
    """Inside, Dynamo compiles for any sizes of the dimensions `symbolic`; it raises if one turns out to be fixed.

    Afterwards the tensors are as they were: a mark left on a caller's cache would bind what else is compiled for it.
    """
    marked = [
        (tensor, dims, set(vars(tensor))) for tensor, dims in zip(tensors, symbolic, strict=True) if tensor is not None
    ]
    try:
        for tensor, dims, _ in marked:
            for dim in dims:
                if tensor.shape[dim] > 1:
                    torch._dynamo.mark_dynamic(tensor, dim)
        yield
    finally:
        for tensor, _, before in marked:
            for name in set(vars(tensor)) - before:
                delattr(tensor, name)


class Units:
    """The compiled units of one model."""

    def __init__(self, backend: BackendFactory, out_of_memory: OutOfMemory) -> None:
        self.backend, self.out_of_memory = backend, out_of_memory
        self.units: dict[tuple[Kind, Variant], Unit] = {}
        self.functions: dict[tuple[Kind, Variant], Compiled] = {}
        self.ways: dict[Kind, dict[tuple, Way]] = {}
        self.templates: dict[Kind, nn.Module] = {}

    def runner(self, module: nn.Module) -> Callable[..., Outputs]:
        """`run(*tensors)`: the compiled unit of `module`, with the parameters it has at the time of the call."""
        slots = [
            (f"{path}.{name}" if path else name, table, name)
            for tables in ("_parameters", "_buffers")  # in the order of tensors_of
            for path, part in module.named_modules()
            for table in (part.__dict__[tables],)
            for name, tensor in table.items()
            if tensor is not None
        ]
        kind, ways = f"a {Kind.of(module).name}", self.ways.setdefault(Kind.of(module), {})
        functions: dict[tuple, Compiled] = {}

        # Runs once a module and call, ahead of the GPU: plain lists, and no name that is not needed.
        def run(*tensors: Tensor | None) -> Outputs:
            parameters = [table[name] for _, table, name in slots]
            key = signature(parameters, tensors)
            way = ways.get(key)
            try:
                if way is not None and way.conditions.hold(parameters):
                    return way([*parameters, *tensors])
                named = {path: table[name] for path, table, name in slots}
                outputs, way = self._call(module, functions, named, tensors)
            except torch.OutOfMemoryError as error:
                self.out_of_memory(kind, error, getattr(tensors[0], "grad_fn", None))
                raise
            except BackendCompilerFailed as failure:  # torch's wrapping, a page long, of an error of ours
                ours = isinstance(failure.inner_exception, Dsv3cError)
                raise (failure.inner_exception if ours else failure) from None
            if way is not None:
                if len(ways) >= KEPT:
                    ways.clear()
                ways[key] = way
            return outputs

        return run

    @torch._dynamo.disable(recursive=False)  # a caller's torch.compile would trace how units are made
    def _call(
        self, module: nn.Module, functions: dict[tuple, Compiled], parameters: dict[str, Tensor], tensors: tuple
    ) -> tuple[Outputs, Way | None]:
        """Through Dynamo. `functions` are those that the module has been called with. Returns the way of later calls,
        too."""
        symbolic = call_of(module).symbolic
        tensors = tuple(_varying_sizes(x) for x in tensors)
        arguments = tuple(map(Argument.of, tensors, symbolic))
        kinds = [(p.requires_grad, p.dtype) for p in parameters.values()]
        key = (arguments, *kinds, torch.is_grad_enabled())
        if key in functions:
            return functions[key](parameters, *tensors)
        variant = Variant(arguments, tuple(p.requires_grad for p in parameters.values()), torch.is_grad_enabled())
        function = functions[key] = self._function(module, variant, tensors)
        with varying(tensors, symbolic):
            outputs, way = function(parameters, *tensors)
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        watch_backward(results, partial(self.out_of_memory, f"the backward of a {Kind.of(module).name}"))
        return outputs, way

    def _function(self, module: nn.Module, variant: Variant, tensors: tuple) -> Compiled:
        """The compiled function of these tensors: another module's of the same kind, or a new one."""
        kind = Kind.of(module)
        if (kind, variant) not in self.functions:
            if kind not in self.templates:
                self.templates[kind] = template_of(module)
            shapes = tuple(None if t is None else t.shape for t in tensors)
            unit = self.units[kind, variant] = Unit(kind, variant, self.templates[kind], shapes)
            self.functions[kind, variant] = unit.compiled(self.backend(unit))
        return self.functions[kind, variant]


def _varying_sizes(x: Tensor | None) -> Tensor | None:
    """x, or all of it: to Dynamo a Parameter's sizes are fixed, those of inputs that are trained too."""
    return torch.ops.aten._unsafe_view.default(x, x.shape) if isinstance(x, nn.Parameter) else x


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


@torch._dynamo.disable  # else a caller's torch.compile traces it
def template_of(module: nn.Module) -> nn.Module:
    """A copy of `module` on the meta device, as it was before `compile`, in evaluation mode."""
    memo = {}
    for tensor in tensors_of(module).values():
        meta = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    template = copy.deepcopy(eager_twin(module), memo)
    for part in template.modules():
        for name in HOOKS:
            getattr(part, name).clear()
    return template.eval()


def quantizable(template: nn.Module) -> tuple[str, ...]:
    """Names of the weights that FP8 is for: those of linears and experts; not the gate's, nor that of a linear which is
    a unit of its own, the head."""
    names = []
    for path, module in template.named_modules():
        kind = REGIONS.get(type(module).__name__)
        if kind == "linear" and path:
            names.append(f"{path}.weight")
        elif kind == "experts":
            names += [f"{path}.{name}" for name, p in module.named_parameters(recurse=False) if p.dim() == 3]
    parameters = tensors_of(template)
    return tuple(name for name in names if parameters[name].dtype.itemsize > 1)
