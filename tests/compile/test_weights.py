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


def same_bits(a, b) -> bool:
    bits = ([t.contiguous().view(torch.uint8) for t in copy] for copy in (a, b))
    return all(map(torch.equal, *bits))


def copy_of(weights, *stack):
    return weights.copies_of([stack], training=False)


def is_fresh(weights, *stack) -> bool:
    return same_bits(copy_of(weights, *stack), weights.quantize([stack], training=False))


def test_made_once(weights, weight):
    assert copy_of(weights, weight)[0] is copy_of(weights, weight)[0]
    assert is_fresh(weights, weight)


def test_training_adds_a_transposed_copy_which_inference_does_not_make(weights, weight):
    pair = copy_of(weights, weight)
    both = weights.copies_of([[weight]], training=True)
    assert same_bits(both[:2], pair)
    assert same_bits(both[2:], pair)
    assert all(t.is_contiguous() for t in both[:2])
    assert all(t.mT.is_contiguous() for t in both[2:])
    assert copy_of(weights, weight)[0] is both[0]
    assert weights.bytes() == 2 * sum(t.nbytes for t in pair)


@pytest.mark.parametrize("training", [False, True])
def test_a_stack_is_quantised_as_one_and_held_once(weights, weight, training):
    stack = weight, torch.nn.Parameter(100 * torch.randn(200, 256))
    copy = weights.copies_of([stack], training=training)
    assert same_bits(copy, weights.quantize([[torch.cat(stack)]], training=training))
    assert weights.bytes() == sum(t.nbytes for t in copy)
    for changed in stack:
        in_place(changed)
        assert same_bits(weights.copies_of([stack], training=training), weights.quantize([stack], training=training))
    weights.forget(stack[1:])
    assert weights.bytes() == 0


def in_place(weight):
    with torch.no_grad():
        weight.mul_(torch.randn_like(weight))


def other_storage(weight):
    weight.data = torch.randn_like(weight)


def other_storage_at_the_same_address(weight):
    """As an allocator gives it to the next but one of replaced weights. Shapes go along, which no version counts."""
    address, shape = weight.data_ptr(), weight.shape
    held = []
    for _ in range(100):
        weight.data = weight.new_empty(0)
        held.append(torch.randn(shape))
        weight.data = held[-1]
        if weight.data_ptr() == address:
            break


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
        other_storage_at_the_same_address,
        loaded,
        stepped(lambda p: torch.optim.SGD(p, lr=1.0)),
        stepped(lambda p: torch.optim.AdamW(p, lr=1.0)),
        stepped(lambda p: torch.optim.AdamW(p, lr=1.0, fused=True)),
        stepped(lambda p: torch.optim.SGD(p, lr=1.0, fused=True)),
    ],
    ids=["in_place", "storage", "address", "load_state_dict", "sgd", "adamw", "fused_adamw", "fused_sgd"],
)
def test_made_again_after(change, weights, weight):
    before = copy_of(weights, weight)[0].clone()
    change(weight)
    assert is_fresh(weights, weight)
    assert not torch.equal(before.view(torch.uint8), copy_of(weights, weight)[0].view(torch.uint8))


def test_a_write_through_data_needs_to_be_told(weights, weight):
    copy_of(weights, weight)
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
    copy_of(weights, weight)
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
