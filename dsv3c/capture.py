"""Layers to compiled units: equal layers share one, each unit is compiled once for each variant of its inputs.

A unit is a function of ours, `unit(parameters, *tensors)`, around a template: a copy of the layer on the meta device,
whose own parameters never take part. Sizes vary freely within a variant. Sizes of one don't: torch specialises them,
so "one sequence", "one token", "one cached token" are variants of their own, with a code object of their own. That
makes the set of compilations finite and known; only from 2^31 elements on, where indices get wider, is one compiled
again.
"""

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.func import functional_call

from dsv3c.errors import Dsv3cError
from dsv3c.families import Outputs, call_of
from dsv3c.passes.regions import REGIONS

BackendFactory = Callable[["Unit"], Callable]


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
    """Layers of one kind run the same code on other parameters."""

    layer_class: str
    parameters: tuple[tuple[str, torch.Size, torch.dtype], ...]

    @classmethod
    def of(cls, layer: nn.Module) -> "Kind":
        return cls(type(layer).__name__, tuple((name, p.shape, p.dtype) for name, p in tensors_of(layer).items()))

    @property
    def name(self) -> str:
        moe = any(name.startswith("mlp.experts.") for name, *_ in self.parameters)
        return f"{'mtp' if self.layer_class == 'MTPLayer' else 'moe' if moe else 'dense'}_layer"


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
        words += [word for word, argument in zip(("masked", "cached"), rest[2:], strict=False) if argument is not None]
        return "_".join([*words, "training" if self.gradients else "inference"])


@dataclass(eq=False)
class Unit:
    """One kind of layer in one variant, and the sizes it was first called with."""

    kind: Kind
    variant: Variant
    template: nn.Module
    shapes: tuple[torch.Size | None, ...]
    function: Callable[..., Outputs] = field(init=False)

    def __post_init__(self) -> None:
        template, call = self.template, call_of(self.template)

        def unit(parameters, *tensors):
            return call.trace(lambda *args, **kwargs: functional_call(template, parameters, args, kwargs), *tensors)

        # Dynamo keeps what it compiled, and what it learned about sizes, by code object.
        code = unit.__code__.replace(co_name=self.name)
        self.function = types.FunctionType(code, unit.__globals__, self.name, None, unit.__closure__)

    @property
    def name(self) -> str:
        return f"{self.kind.name}_{self.variant.name}"

    def compiled(self, backend: Callable) -> Callable[..., Outputs]:
        return torch.compile(self.function, backend=backend, fullgraph=True, dynamic=None)

    def mark(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Tells Dynamo, before the first call, which sizes vary. It raises if one turns out to be fixed."""
        for tensor, symbolic in zip(tensors, call_of(self.template).symbolic, strict=True):
            if tensor is not None:
                for dim in symbolic:
                    if tensor.shape[dim] > 1:
                        torch._dynamo.mark_dynamic(tensor, dim)


class Units:
    """The compiled units of one model."""

    def __init__(self, backend: BackendFactory) -> None:
        self.backend = backend
        self.units: dict[tuple[Kind, Variant], Unit] = {}
        self.functions: dict[tuple[Kind, Variant], Callable[..., Outputs]] = {}
        self.templates: dict[Kind, nn.Module] = {}

    def runner(self, layer: nn.Module) -> Callable[..., Outputs]:
        """`run(*tensors)`: the compiled unit of `layer`, with the parameters the layer has at the time of the call."""
        slots = [
            (f"{path}.{name}" if path else name, table, name)
            for tables in ("_parameters", "_buffers")  # in the order of tensors_of
            for path, module in layer.named_modules()
            for table in (module.__dict__[tables],)
            for name, tensor in table.items()
            if tensor is not None
        ]
        symbolic = call_of(layer).symbolic
        functions: dict[tuple, Callable[..., Outputs]] = {}

        # Runs once a layer and call, ahead of the GPU: plain tuples, and no name that is not needed.
        def run(*tensors: Tensor | None) -> Outputs:
            parameters = {path: table[name] for path, table, name in slots}
            key = (
                *map(Argument.of, tensors, symbolic),
                *[(p.requires_grad, p.dtype) for p in parameters.values()],
                torch.is_grad_enabled(),
            )
            function = functions.get(key)
            if function is None:
                function = functions[key] = self._function(layer, parameters, tensors)
            try:
                return function(parameters, *tensors)
            except BackendCompilerFailed as failure:  # torch's wrapping, a page long, of an error of ours
                ours = isinstance(failure.inner_exception, Dsv3cError)
                raise (failure.inner_exception if ours else failure) from None

        return run

    def _function(self, layer: nn.Module, parameters: dict[str, Tensor], tensors) -> Callable[..., Outputs]:
        """The compiled function for these tensors: another layer's of the same kind, or a new one."""
        kind = Kind.of(layer)
        arguments = tuple(map(Argument.of, tensors, call_of(layer).symbolic))
        variant = Variant(arguments, tuple(p.requires_grad for p in parameters.values()), torch.is_grad_enabled())
        if (kind, variant) not in self.functions:
            if kind not in self.templates:
                self.templates[kind] = template_of(layer)
            shapes = tuple(None if t is None else t.shape for t in tensors)
            unit = Unit(kind, variant, self.templates[kind], shapes)
            unit.mark(tensors)
            self.units[kind, variant] = unit
            self.functions[kind, variant] = unit.compiled(self.backend(unit))
        return self.functions[kind, variant]


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters(remove_duplicate=False)), **dict(layer.named_buffers(remove_duplicate=False))}


def template_of(layer: nn.Module) -> nn.Module:
    """A copy of `layer` on the meta device, without hooks and without a forward of ours, in evaluation mode."""
    memo = {}
    for tensor in tensors_of(layer).values():
        meta = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    own_forward = layer.__dict__.pop("forward", None)
    try:
        template = copy.deepcopy(layer, memo)
    finally:
        if own_forward is not None:
            layer.forward = own_forward
    return template.eval()


def quantizable(template: nn.Module) -> tuple[str, ...]:
    """Names of the weights that FP8 is for: those of linears and experts, the gate's excepted."""
    names = []
    for path, module in template.named_modules():
        kind = REGIONS.get(type(module).__name__)
        if kind == "linear":
            names.append(f"{path}.weight")
        elif kind == "experts":
            names += [f"{path}.{name}" for name, p in module.named_parameters(recurse=False) if p.dim() == 3]
    parameters = tensors_of(template)
    return tuple(name for name in names if parameters[name].dtype.itemsize > 1)
