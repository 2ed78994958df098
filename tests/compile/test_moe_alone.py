"""A MoE module that is all there is: a unit of its own. Its numerics are the benchmark's gate's: mode moe."""

import copy

import pytest
import torch

from dsv3c import families
from dsv3c.compiler import compilation_of
from dsv3c.numerics import distance, quantized_layer_rms

pytestmark = pytest.mark.usefixtures("without_codegen")


def output(moe, x):
    out = moe(x)
    return out if isinstance(out, torch.Tensor) else out[0]


def test_like_eager(model, compiled, units):
    moe = model.model.layers[-1].mlp
    alone = compiled(moe, "fp8")
    assert type(alone) is type(moe)
    x = torch.randn(2, 24, 256, requires_grad=True)
    expected, found, again = (output(module, x) for module in (moe, alone, copy.deepcopy(alone)))
    assert torch.equal(found, again)
    assert 0 < distance(found.detach(), expected.detach())[0] <= quantized_layer_rms(gradient=False)
    dout = torch.randn_like(found)
    gradients = [torch.autograd.grad(out, x, dout)[0] for out in (found, expected)]
    assert 0 < distance(*gradients)[0] <= quantized_layer_rms(gradient=True)
    assert [unit.name for unit in units(alone).values()] == ["moe_many_sequences_many_tokens_training"]
    with torch.no_grad():
        assert torch.equal(output(alone, x), output(compiled(moe, "fp8"), x))
    assert isinstance(moe, type(alone))
    assert not hasattr(moe, "weights_changed")


@pytest.mark.parametrize("training", [False, True])
def test_the_shared_expert_starts_first(model, compiled, training):
    """Its first product stands in front of the gate, and no bit of an output or gradient is another."""
    moe, x, results = model.model.layers[-1].mlp, torch.randn(2, 24, 256), []
    for skip in ((), ("HoistSharedExpert",)):
        alone, leaf = compiled(moe, "fp8", skip=skip), x.clone().requires_grad_(training)
        moe.zero_grad()
        with torch.set_grad_enabled(training):
            results.append([output(alone, leaf)])
        if training:
            results[-1][0].backward(torch.ones_like(x))
            results[-1] += [leaf.grad, *(p.grad.clone() for p in moe.parameters())]
        (backend,) = compilation_of(alone).backends.values()
        graph = backend.joint.text
        assert (graph.index("dsv3c.gemm") < graph.index("dsv3c.gate")) == (not skip)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_in_a_model_it_is_its_layers(model):
    paths = [path for path, _ in families.compiled_modules(model)]
    assert paths == [*(f"model.layers.{i}" for i in range(3)), "model.rotary_emb", "model.norm", "lm_head"]
