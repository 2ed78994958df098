"""Float32 accumulation keeps what a bfloat16 sum loses, and steps reach the compiled model."""

import copy

import pytest
import torch

from dsv3c.main_grad import MainGradOptimizer
from dsv3c.numerics import unit_roundoff


def sgd(weights):
    return torch.optim.SGD(weights, lr=1.0)


def small_gradient_steps(model, count):
    for _ in range(count):
        (model.weight * 2.0**-9).sum().backward()


@pytest.fixture
def linear():
    module = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(module.weight)
    return module


def test_a_bfloat16_sum_stops_and_main_grad_does_not(linear):
    plain = copy.deepcopy(linear)
    MainGradOptimizer(linear, sgd)
    for model in (linear, plain):
        small_gradient_steps(model, 1000)
    assert linear.weight.grad is None
    assert linear.weight.main_grad.unique().item() == 1000 * 2.0**-9
    assert plain.weight.grad.unique().item() == 256 * 2.0**-9


def test_small_steps_add_up_in_the_float32_weights(linear):
    optimizer = MainGradOptimizer(linear, sgd)
    for _ in range(8):
        small_gradient_steps(linear, 1)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.weights[0].unique().item() == 1 - 8 * 2.0**-9  # a bfloat16 weight of 1 ignores each of them
    assert linear.weight.unique().item() == 1 - 8 * 2.0**-9


@pytest.mark.parametrize(
    "gradient",
    [
        torch.ones(4, 4, dtype=torch.bfloat16),
        torch.arange(16.0).view(4, 4).t().bfloat16(),
        torch.eye(4).bfloat16().to_sparse(),
    ],
    ids=["contiguous", "transposed", "sparse"],
)
def test_gradients_of_all_layouts(linear, gradient):
    MainGradOptimizer(linear, sgd)
    for _ in range(2):
        linear.weight.grad = gradient.clone()
        for hook in linear.weight._post_accumulate_grad_hooks.values():
            hook(linear.weight)
    assert torch.equal(linear.weight.main_grad, 2 * gradient.to_dense().float())
    assert linear.weight.grad is None


def test_state_survives(linear):
    first = MainGradOptimizer(linear, lambda weights: torch.optim.AdamW(weights, lr=0.1))
    small_gradient_steps(linear, 1)
    first.step()
    again = MainGradOptimizer(copy.deepcopy(linear), lambda weights: torch.optim.AdamW(weights, lr=0.1))
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    first.step()
    for parameter in again.parameters:
        parameter.main_grad.copy_(linear.weight.main_grad)
    again.step()
    assert torch.equal(first.weights[0], again.weights[0])


@pytest.mark.usefixtures("without_codegen")
def test_compiled_fp8_training_step(make_model, compiled):
    model = compiled(make_model(torch.bfloat16, num_hidden_layers=1), "fp8")
    optimizer, tokens = MainGradOptimizer(model, sgd), torch.randint(0, 256, (1, 16))
    before = model(tokens).detach()
    for _ in range(2):
        model(tokens).float().square().mean().backward()
    gradients = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert not torch.equal(model(tokens), before)
    for (name, parameter), weight in zip(model.named_parameters(), optimizer.weights, strict=True):
        assert parameter.grad is None
        assert gradients[name].dtype == torch.float32
        assert gradients[name].any(), name
        assert (parameter - weight).abs().max() <= unit_roundoff(torch.bfloat16) * weight.abs().max()
