"""The FP8 copies of the weights are made once, and again whenever a weight has changed."""

import copy

import pytest
import torch

from dsv3c.numerics import Recipe
from dsv3c.weights import QuantizedWeights


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.randn(128, 256))


@pytest.fixture
def weights():
    return QuantizedWeights(Recipe())


def is_fresh(weights, weight) -> bool:
    now = weights.quantize(weight)
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(weights.pair(weight), now, strict=True)
    )


def test_made_once(weights, weight):
    assert weights.pair(weight)[0] is weights.pair(weight)[0]
    assert is_fresh(weights, weight)


def in_place(weight):
    with torch.no_grad():
        weight.mul_(torch.randn_like(weight))


def other_storage(weight):
    weight.data = torch.randn_like(weight)


def loaded(weight):
    module = torch.nn.Linear(256, 128, bias=False)
    module.weight = weight
    module.load_state_dict({"weight": torch.randn_like(weight)})


def stepped(optimizer):
    def change(weight):
        weight.grad = torch.randn_like(weight)
        optimizer([weight]).step()

    return change


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        other_storage,
        loaded,
        stepped(lambda p: torch.optim.SGD(p, lr=1.0)),
        stepped(lambda p: torch.optim.AdamW(p, lr=1.0)),
        stepped(lambda p: torch.optim.AdamW(p, lr=1.0, fused=True)),
        stepped(lambda p: torch.optim.SGD(p, lr=1.0, fused=True)),
    ],
    ids=["in_place", "storage", "load_state_dict", "sgd", "adamw", "fused_adamw", "fused_sgd"],
)
def test_made_again_after(change, weights, weight):
    before = weights.pair(weight)[0].clone()
    change(weight)
    assert is_fresh(weights, weight)
    assert not torch.equal(before.view(torch.uint8), weights.pair(weight)[0].view(torch.uint8))


def test_a_write_through_data_needs_to_be_told(weights, weight):
    weights.pair(weight)
    weight.data.mul_(torch.randn_like(weight))
    assert not is_fresh(weights, weight)  # why weights_changed exists
    weights.forget()
    assert is_fresh(weights, weight)


def test_a_new_weight_at_an_old_address_is_another(weights):
    for _ in range(20):
        weight = torch.nn.Parameter(torch.randn(128, 128))
        assert is_fresh(weights, weight)
        del weight


def test_copies_of_dead_weights_are_dropped(weights):
    weight = torch.nn.Parameter(torch.randn(128, 128))
    weights.pair(weight)
    assert weights.bytes() > 0
    del weight
    assert weights.bytes() == 0


@pytest.mark.usefixtures("without_codegen")
def test_a_training_step_reaches_the_compiled_model(make_model, compiled):
    model = make_model(torch.bfloat16)
    result = compiled(model, "fp8")
    optimizer = torch.optim.AdamW(result.parameters(), lr=0.05, fused=True)
    tokens = torch.randint(0, 256, (1, 16))
    result(tokens).float().square().mean().backward()
    optimizer.step()
    stepped, untouched = result(tokens), compiled(copy.deepcopy(model), "fp8")(tokens)
    assert torch.equal(stepped, untouched)
