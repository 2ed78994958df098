"""Correctness before speed: every compiled layer, on the input that eager gives it, against the same layer computed
wider.

Layer by layer, because a whole model is no place for a bound: a rounding moves a token near a tie to another expert,
and from there on its error is the routing's, whatever was compiled. For the same reason errors are those of the
median row (a token, or a row of a gradient). Compiled in exact precision, a layer may be so many times farther from
its wider evaluation than eager is (`MODEL_DISTANCE`); with FP8 products, by `quantized_layer_rms` more.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dsv3c import families
from dsv3c.cache import Pages
from dsv3c.numerics import MODEL_DISTANCE, MODEL_DISTANCE_BF16, quantized_layer_rms

CHUNK = 1 << 26  # values compared at a time: an expert stack's gradient has 7.5e9
Model = Any  # dsv3c.DeepseekV3 or transformers' DeepseekV3ForCausalLM
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Check:
    """One result of one layer: `what` is "x", "latent", or "gradient of <parameter>"."""

    layer: str
    what: str
    error: float
    eager_error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # false for NaN


def record_calls(model: Model, run: Callable[[], object]) -> dict[str, Call]:
    """What each layer is called with in `run()`, by path."""
    calls: dict[str, Call] = {}

    def keep_for(path: str) -> Callable:
        def keep(module, args, kwargs) -> None:
            calls[path] = _map((args, kwargs), Tensor.detach)

        return keep

    hooks = [
        layer.register_forward_pre_hook(keep_for(path), with_kwargs=True) for path, layer in families.layers(model)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def check(
    eager: Model, compiled: dict[str, Model], calls: dict[str, Call], *, backward: bool
) -> dict[str, list[Check]]:
    """By precision ("exact" or "fp8") of the models in `compiled`. Backward: also the gradients of a layer's input and
    parameters, of the mean of squares of its output."""
    checks: dict[str, list[Check]] = {precision: [] for precision in compiled}
    for path, call in calls.items():
        dtype = call[0][0].dtype
        factor = MODEL_DISTANCE_BF16 if dtype == torch.bfloat16 else MODEL_DISTANCE
        for model in compiled.values():
            model.weights_changed()  # frees the FP8 copies: a wide MoE layer of V3 with its gradients takes 111 GB
        with _experts_for(eager, dtype):
            oracle = _oracle(eager.get_submodule(path), call, backward)
        eager_errors = _errors(_results(eager.get_submodule(path), call, backward), oracle)
        for precision, model in compiled.items():
            for what, error in _errors(_results(model.get_submodule(path), call, backward), oracle).items():
                bound = factor * eager_errors[what]
                if precision == "fp8":
                    bound += quantized_layer_rms(gradient=what.startswith("gradient"))
                checks[precision].append(Check(path, what, error, eager_errors[what], bound))
    return checks


def _results(layer: nn.Module, call: Call, backward: bool, forward: Callable | None = None) -> dict[str, Tensor]:
    """`layer` called, or `forward` in its place."""
    (x, *args), kwargs = _map(call, Tensor.detach)
    x.requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        out = (forward or layer)(x, *args, **kwargs)
        out = out if isinstance(out, tuple) else (out,)
        names = ("x", "latent") if args or kwargs else ("x",)  # a MoE alone takes nothing but x, and adds its routing
        results = {what: tensor.detach() for what, tensor in zip(names, out, strict=False)}
        if backward:
            inputs = {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(out[0].float().square().mean(), list(inputs.values()))
            results |= {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}
    return results


def _oracle(layer: nn.Module, call: Call, backward: bool) -> dict[str, Tensor]:
    """Results in float32 of a bfloat16 layer, in float64 of a float32 one; gradients rounded to the parameters' dtype.
    Forward goes sequence by sequence: a long cache, expanded and widened, would not fit otherwise."""
    x = call[0][0]
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32

    def widen(tensor: Tensor) -> Tensor:
        return tensor.to(wide) if tensor.dtype == x.dtype else tensor

    def forward(*args, **kwargs):
        return functional_call(layer, {name: widen(p) for name, p in layer.named_parameters()}, args, kwargs)

    if backward:
        return _results(layer, _map(call, widen), True, forward)

    def sequence(index: int) -> Call:
        def pages(past: Pages) -> Pages:
            own = past.latents_NPL[past.table_BM[index].long()]
            order = torch.arange(len(own), device=own.device, dtype=torch.int32)
            return Pages(widen(own), order[None], past.lengths_B[index : index + 1])

        return _map(call, lambda tensor: widen(tensor[index : index + 1] if len(tensor) == len(x) else tensor), pages)

    sequences = [_results(layer, sequence(index), False, forward) for index in range(len(x))]
    return {what: torch.cat([results[what] for results in sequences]) for what in sequences[0]}


@contextmanager
def _experts_for(model: Model, dtype: torch.dtype) -> Iterator[None]:
    """transformers' default, grouped_mm, knows no float64. The loop that does writes a gradient of all experts for each
    of them: 30 GB a time, were it for 256 of V3 in float32."""
    if dtype != torch.float32 or not hasattr(model.config, "_experts_implementation"):
        yield
        return
    before = model.config._experts_implementation
    model.config._experts_implementation = "eager"  # what set_experts_implementation does, which a MoE alone has not
    try:
        yield
    finally:
        model.config._experts_implementation = before


def _errors(results: dict[str, Tensor], oracle: dict[str, Tensor]) -> dict[str, float]:
    return {what: median_row_distance(result, oracle[what]) for what, result in results.items()}


def median_row_distance(out: Tensor, reference: Tensor) -> float:
    """The median over rows (all dimensions but the last) of the RMS error, over the RMS of `reference`. Rows that are
    zero in both, as an embedding's gradient is for most tokens, do not count."""
    dtype, columns = torch.promote_types(reference.dtype, torch.float32), out.shape[-1]
    rows = max(1, CHUNK // columns)
    errors, squares = [], 0.0
    for mine, wide in zip(*(t.reshape(-1, columns).split(rows) for t in (out, reference)), strict=True):
        counts = mine.any(dim=1) | wide.any(dim=1)
        errors.append((mine.to(dtype) - wide.to(dtype)).square().mean(dim=1)[counts])
        squares += float(wide.to(dtype).square().sum(dtype=torch.float64))
    return float(torch.cat(errors).median().sqrt()) / (squares / reference.numel()) ** 0.5


def _map(value: Any, fn: Callable[[Tensor], Tensor], pages: Callable[[Pages], Pages] = lambda past: past) -> Any:
    """`value` with `fn` of every tensor, in containers of its own. transformers' caches are containers too: a layer
    writes to them. What it writes to pages it writes again each time."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Pages):
        return pages(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, fn, pages) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, fn, pages) for key, item in value.items()}
    if hasattr(value, "layers"):
        cache = copy.copy(value)
        cache.layers = [copy.copy(layer) for layer in value.layers]
        for layer in cache.layers:
            layer.__dict__ |= _map({key: t for key, t in layer.__dict__.items() if isinstance(t, Tensor)}, fn)
        return cache
    return value
