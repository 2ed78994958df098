"""Gradients summed in float32, and an optimizer over float32 weights, for training in bfloat16.

By default `.grad` has the parameter's dtype, as in eager. A bfloat16 sum over many micro-batches stops growing once
it is 256 times its next term. Here each micro-batch's gradient, rounded to the parameter's dtype once, is added to a
float32 `main_grad` and freed; the optimizer steps float32 weights, and the parameters are their rounded copies.
Source: DeepSeek-V3 report, section 3.3.3 (master weights and gradients in float32); the name is Megatron-LM's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dsv3c.operators  # noqa: F401


class MainGradOptimizer:
    """An optimizer of `model` whose gradients and weights are float32.

    Args:
        model: compiled or eager; its trainable parameters get a `main_grad`, and `.grad` stays None.
        make: makes the torch optimizer from the list of float32 weights, for example
            `lambda weights: torch.optim.AdamW(weights, lr=2e-4)`.
    """

    def __init__(self, model: nn.Module, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.weights = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        self.optimizer = make(self.weights)
        for parameter in self.parameters:
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.register_post_accumulate_grad_hook(_add)

    @torch.no_grad()
    def step(self) -> None:
        """One step with the gradients summed so far. Writing the parameters makes their FP8 copies stale."""
        for weight, parameter in zip(self.weights, self.parameters, strict=True):
            weight.grad = parameter.main_grad
        self.optimizer.step()
        for weight, parameter in zip(self.weights, self.parameters, strict=True):
            parameter.copy_(weight)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.main_grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "weights": self.weights}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        for weight, saved in zip(self.weights, state["weights"], strict=True):
            weight.copy_(saved)


def _add(parameter: Tensor) -> None:
    total, gradient = parameter.main_grad, parameter.grad
    plain = type(gradient) is Tensor and gradient.layout is torch.strided and gradient.dtype == torch.bfloat16
    if plain and total.is_contiguous() and gradient.is_contiguous() and gradient.device.type in ("cpu", "cuda"):
        torch.ops.dsv3c.accumulate_(total, gradient)
    else:
        total.add_(gradient)
    parameter.grad = None
