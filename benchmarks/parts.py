"""Rows of their own in `dsv3c bench`: what a training step does besides the layers' forward and backward.

Each is a set of calls that are timed in turn, with checks that come before, and the fewest bytes each call can move
where that is what limits it. FP8 on a CPU is emulated.
"""

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3c import families
from dsv3c.benchmarks.gate import Check, median_row_distance
from dsv3c.benchmarks.workloads import Model, Workload, check_memory
from dsv3c.compiler import compilation_of, compile
from dsv3c.kernels.reference.casts import quantize_weights_ref
from dsv3c.layers import at_least_float32
from dsv3c.losses import cross_entropy
from dsv3c.main_grad import MainGradOptimizer
from dsv3c.numerics import (
    MODEL_DISTANCE,
    MODEL_DISTANCE_BF16,
    cross_entropy_bound,
    quantized_layer_rms,
    unit_roundoff,
)

if TYPE_CHECKING:
    from dsv3c.weights import QuantizedWeights

# Bytes a parameter takes besides itself, and how many times its own size. In main-grad: FP8 copies of two models,
# float32 weights and gradients; a second model, a gradient. In deterministic: FP8 copies of two; two gradients. In
# optimizer: float32 weights and gradients, their moments, the check's weights and moments; two copies with gradients,
# and a copy's moments.
ROOM = {"main-grad": (12, 2), "deterministic": (4, 2), "optimizer": (28, 6)}


@dataclass(frozen=True)
class Part:
    """By contender: calls; checks and bytes of some."""

    calls: Mapping[str, Callable[[], object]]
    checks: dict[str, list[Check]]
    moved_bytes: Mapping[str, int] = field(default_factory=dict)


def quantized_weights(model: Model, workload: Workload) -> Part:
    """All FP8 copies of the last layer's weights, for forward and input gradient, as after an optimizer's step; beside
    a copy that moves as many bytes."""
    with _backward(workload).prepared(model) as calls:
        compiled = _fp8(model)
        calls.warm(compiled)
    weights: QuantizedWeights = compilation_of(compiled).weights
    path, layer = list(families.layers(compiled))[-1]
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    mine = [copy for key, copy in weights.copies.items() if not names.keys().isdisjoint(key)]
    stacks = [[weight() for weight, *_ in copy.sources] for copy in mine]
    del mine
    weights.forget()
    run = partial(weights.quantize, stacks, training=True)
    made = run()
    checks = []
    for index, stack in enumerate(stacks):
        wrong = _share_of_wrong(stack, made[4 * index : 4 * index + 4], weights)
        checks.append(Check(path, f"copies of {names[id(stack[0])]}, share of wrong values", wrong, 0.0, 0.0))
    moved = sum(t.nbytes for stack in stacks for t in stack) + sum(t.nbytes for t in made)
    del made
    device = stacks[0][0].device
    source, target = (torch.empty(moved // 2, dtype=torch.uint8, device=device) for _ in range(2))
    contenders = {"copy": lambda: target.copy_(source), "dsv3c fp8": run}
    return Part(contenders, {"dsv3c fp8": checks}, dict.fromkeys(contenders, moved))


def _share_of_wrong(stack: list[Tensor], copies: list[Tensor], weights: "QuantizedWeights") -> float:
    """Against the definition, an expert at a time, since it widens."""
    floor, pow2 = weights.recipe.amax_floor, weights.recipe.pow2
    experts = stack[0].dim() == 3
    wrong = 0
    for found, *parts in zip(zip(*copies, strict=True), *stack, strict=True) if experts else [(copies, *stack)]:
        expected = quantize_weights_ref([part.detach() for part in parts], [len(parts)], floor, pow2, True)
        for f, e in zip(found, expected, strict=True):
            bits = torch.uint8 if f.dtype.itemsize == 1 else f.dtype
            wrong += int((f.view(bits) != e.view(bits)).sum())
    return wrong / sum(copy.numel() for copy in copies)


def deterministic_step(model: Model, workload: Workload) -> Part:
    """Forward and backward of the body, and the same with equal bits in each call."""
    with _backward(workload).prepared(model) as calls:
        models = {"dsv3c fp8": _fp8(model), "dsv3c fp8, deterministic": _fp8(model, deterministic=True)}
        *_, (name, ordered) = models.items()

        def gradients() -> dict[str, Tensor]:
            calls.loss(ordered).backward()
            found = {path: p.grad for path, p in ordered.named_parameters() if p.grad is not None}
            ordered.zero_grad(set_to_none=True)
            return found

        first, again = gradients(), gradients()
        checks = []
        for path, gradient in first.items():
            wrong = int((gradient != again[path]).sum()) / gradient.numel()
            checks.append(Check("", f"gradient of {path}, share of values that differ", wrong, 0.0, 0.0))
    return Part({name: partial(calls.run, one) for name, one in models.items()}, {name: checks})


def main_grad(model: Model, workload: Workload) -> Part:
    """Forward and backward of the body, with gradients in the parameters' dtype, and summed up in float32."""
    with _backward(workload).prepared(model) as calls:
        plain = _fp8(model)
        summed = _fp8(deepcopy(model))  # whose hooks leave the other's gradients alone
        optimizer = MainGradOptimizer(summed, partial(torch.optim.SGD, lr=0.0))
        calls.loss(plain).backward()
        for _ in range(2):
            calls.warm(summed)
        # cuDNN's gradients differ from call to call in their last bit, and casts to FP8 make more of that.
        bound = quantized_layer_rms(gradient=True)
        checks = []
        for (name, parameter), twin in zip(plain.named_parameters(), optimizer.parameters, strict=True):
            error = median_row_distance(twin.main_grad, parameter.grad.mul_(2))
            checks.append(Check("", f"main_grad of {name}", error, 0.0, bound))
        plain.zero_grad(set_to_none=True)
    runs = {"dsv3c fp8": partial(calls.run, plain), "dsv3c fp8, main_grad": partial(calls.run, summed)}
    return Part(runs, {"dsv3c fp8, main_grad": checks})


def cross_entropies(model: Model, workload: Workload) -> Part:
    """The head and its loss over all tokens, forward and backward."""
    weight_VD = model.lm_head.weight
    tokens, generator = workload.batch * workload.tokens, torch.Generator(weight_VD.device).manual_seed(1)
    x_TD = weight_VD.new_empty(tokens, weight_VD.shape[1]).normal_(generator=generator).requires_grad_()
    labels_T = torch.randint(len(weight_VD), (tokens,), generator=generator, device=x_TD.device)

    def theirs(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        logits_TV = F.linear(x_TD, weight_VD)
        return F.cross_entropy(logits_TV.to(at_least_float32(logits_TV.dtype)), labels_T)

    def run(loss: Callable) -> None:
        loss(x_TD, weight_VD, labels_T).backward()
        x_TD.grad = weight_VD.grad = None

    losses = {"eager": theirs, "torch.compile": torch.compile(theirs), "dsv3c": cross_entropy}
    calls = {name: partial(run, loss) for name, loss in losses.items()}
    return Part(calls, {"dsv3c": _checked_cross_entropy(theirs, x_TD, weight_VD, labels_T)})


def _checked_cross_entropy(theirs: Callable, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> list[Check]:
    """Ours against theirs, computed wider; a loss is off by what its logits' rounding and their sum make of it."""

    def results(loss: Callable, *tensors: Tensor) -> list[Tensor]:
        value = loss(*tensors, labels_T)
        return [value.detach(), *torch.autograd.grad(value, tensors)]

    dtype = x_TD.dtype
    wide = [t.detach().to(torch.float64 if dtype == torch.float32 else torch.float32) for t in (x_TD, weight_VD)]
    oracle = results(theirs, *(t.requires_grad_() for t in wide))
    with torch.no_grad():
        logits_TV = F.linear(*wide).float()
    bound = unit_roundoff(dtype) * float(logits_TV.abs().max()) + cross_entropy_bound(logits_TV)
    del logits_TV
    ours, eager = (results(loss, x_TD, weight_VD) for loss in (cross_entropy, theirs))
    losses = [float((found[0].double() - oracle[0].double()).abs()) for found in (ours, eager)]
    checks = [Check("lm_head", "loss", *losses, bound)]
    factor = MODEL_DISTANCE_BF16 if dtype == torch.bfloat16 else MODEL_DISTANCE
    for index, what in ((1, "x"), (2, "weight")):
        error, eager_error = (median_row_distance(found[index], oracle[index]) for found in (ours, eager))
        checks.append(Check("lm_head", f"gradient of {what}", error, eager_error, factor * eager_error))
    return checks


def optimizer_steps(model: Model, workload: Workload) -> Part:
    """Fused AdamW on the last layer's parameters as they are, and on float32 weights with `MainGradOptimizer`."""
    *_, (path, layer) = families.layers(model)
    count = sum(p.numel() for p in layer.parameters())
    adamw = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    plain, ours = (_with_gradients(layer) for _ in range(2))
    optimizer, main = adamw(plain.parameters()), MainGradOptimizer(ours, adamw)
    for parameter in main.parameters:
        parameter.main_grad.normal_()
        parameter.grad = None
    main.step()
    triples = zip(layer.parameters(), main.weights, main.parameters, strict=True)
    wrong = max(_share_of_wrong_steps(adamw, *tensors) for tensors in triples)
    checks = [Check(path, "float32 weights and rounded ones, share of wrong values", wrong, 0.0, 0.0)]
    size = next(layer.parameters()).dtype.itemsize
    moved = {
        "AdamW": count * 7 * size,  # weight and two moments read and written, and the gradient read
        "AdamW, float32 weights": count * (7 * 4 + 4 + size),  # and the weights read again, and rounded
    }
    calls = dict(zip(moved, (optimizer.step, main.step), strict=True))
    return Part(calls, {"AdamW, float32 weights": checks}, moved)


@torch.no_grad()
def _share_of_wrong_steps(make: Callable, before: Tensor, weight: Tensor, parameter: Tensor) -> float:
    """After a first step, against torch's of float32 weights."""
    expected = before.to(torch.float32, copy=True)
    expected.grad = parameter.main_grad
    make([expected]).step()
    return int(((weight != expected) | (parameter != expected.to(parameter.dtype))).sum()) / expected.numel()


def _with_gradients(layer: nn.Module) -> nn.Module:
    layer = deepcopy(layer)
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    return layer


def _backward(workload: Workload) -> Workload:
    return Workload("backward", workload.family, workload.batch, workload.tokens)


def _fp8(model: Model, **options: bool) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that FP8 is emulated: the report says so
        return compile(model, precision="fp8", **options)


def check_room(mode: str, outline: Model, device: torch.device, hint: str) -> None:
    """Raises Dsv3cError if `device` has no room for the model and what `mode` takes besides; `outline` is on meta."""
    *_, (_, layer) = families.layers(outline)
    size, (fixed, times) = outline.lm_head.weight.itemsize, ROOM[mode]
    count = sum(p.numel() for p in (layer if mode == "optimizer" else outline).parameters())
    needed = outline.num_parameters() * size + count * (fixed + times * size)
    check_memory(f"--mode {mode}", needed, device, "of {} memory", hint)


PARTS = {
    "quantize": quantized_weights,
    "main-grad": main_grad,
    "deterministic": deterministic_step,
    "cross-entropy": cross_entropies,
    "optimizer": optimizer_steps,
}
