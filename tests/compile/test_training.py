"""The training step of a compiled layer: which operators it is made of, what it saves, and that neither choice changes
the numbers by more than it may."""

import re
from collections import Counter

import pytest
import torch

from dsv3c.capture import quantizable
from dsv3c.compiler import compilation_of
from dsv3c.errors import Dsv3cError
from dsv3c.numerics import distance, quantized_layer_rms

MODELS = ["make_model", "make_their_model"]
FUSED = ("FuseNormBackward", "FuseSwiGLUBackward", "WeighActivations", "TransposeSaved", "QuantizeBoth")
VARIANTS = {
    "plain": {"skip": FUSED, "memory": "none"},
    "none": {"memory": "none"},
    "default": {},
    "low": {"memory": "low"},
    "by region": {"memory": {"attention": "low", "layer": "none"}},
}


def held_by(loss):
    """Bytes by address of what autograd keeps for the backward of `loss`."""
    held, frontier = {}, [loss.grad_fn]
    while frontier:
        node = frontier.pop()
        storages = [tensor.untyped_storage() for tensor in getattr(node, "saved_tensors", ()) if tensor is not None]
        held |= {storage.data_ptr(): storage.nbytes() for storage in storages}
        frontier += [parent for parent, _ in node.next_functions if parent is not None]
    return held


def step(model, logits):
    """(gradients, bytes kept from forward to backward). What two calls keep at one place are parameters and their FP8
    copies, which are there anyway."""
    model.zero_grad()
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (2, 20))
    losses = [logits(model, ids).float().square().mean() for _ in range(2)]
    first, second = map(held_by, losses)
    losses[1].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, sum(size for place, size in second.items() if place not in first)


@pytest.mark.parametrize("make", MODELS)
def test_a_step_in_each_variant(make, request, compiled, logits, without_codegen):
    """One MoE layer. In one test, since compiling takes seconds."""
    model = request.getfixturevalue(make)(torch.bfloat16, num_hidden_layers=1, first_k_dense_replace=0)
    gradients, held = {}, {}
    for name, options in VARIANTS.items():
        chosen = compiled(model, "fp8", **options)
        gradients[name], held[name] = step(chosen, logits)
        (joint,) = (b.joint for unit, b in compilation_of(chosen).backends.items() if unit.kind.name == "moe_layer")
        operators = Counter(re.findall(r"= dsv3c\.(\w+)", joint.text))
        assert operators["unpermute_backward"] == (name == "plain")
        if name != "plain":
            assert operators["swiglu_quantize_save"] == operators["swiglu_quantize_backward"] > 0
            assert operators["permute"] == operators["unpermute"] == 2
            # and what is added to either: the shared expert, the residual; its gradient, the gate's
            assert len(re.findall(r"dsv3c\.unpermute\.default\(%\d+, %\d+, None, %\d+, %\d+\)", joint.text)) == 2
            assert operators["rms_norm_backward"] == 4
            assert operators["permute_requantize_t"] == 2
            assert operators["quantize_tile_both"] > 0
        again = set(re.findall(r"= (\S+)\.default\(.*computed again", joint.text))
        assert ("dsv3c.rms_norm_quantize" in again) == (name in ("default", "low", "by region"))
        assert ("dsv3c.add_rms_norm_quantize" in again) == (name in ("default", "low"))
        assert ("dsv3c.gemm" in again) == (name in ("low", "by region"))

    assert held["low"] < held["default"] < held["none"] < held["plain"]
    assert held["low"] < held["by region"] < held["none"]
    for name, gradient in gradients["none"].items():
        assert torch.equal(gradients["default"][name], gradient), name
        assert torch.equal(gradients["low"][name], gradient), name
        assert torch.equal(gradients["by region"][name], gradient), name
        if gradient.any():
            assert distance(gradient, gradients["plain"][name])[0] <= quantized_layer_rms(gradient=True), name


@pytest.mark.parametrize("make", MODELS)
def test_placed_keys_change_no_bit(make, request, compiled, without_codegen):
    """Heads of V3's sizes."""
    heads = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    model = request.getfixturevalue(make)(torch.bfloat16, num_hidden_layers=1, **heads)
    ids, results = torch.randint(0, 256, (2, 20)), []
    for skip in ((), ("PlaceKeys",)):
        chosen = compiled(model, "fp8", skip=skip)
        out = chosen(ids) if make == "make_model" else chosen(ids, use_cache=False).logits
        out.float().square().mean().backward()
        results.append([out, *(p.grad for p in chosen.parameters() if p.grad is not None)])
        model.zero_grad()
        (joint,) = (b.joint for unit, b in compilation_of(chosen).backends.items() if unit.kind.name == "dense_layer")
        assert ("dsv3c.gemm_keys.default" in joint.text) == (not skip)
    assert all(torch.equal(f, e) for f, e in zip(*results, strict=True))


@pytest.mark.parametrize("make", MODELS)
def test_weight_gradients_can_wait(make, request, compiled, logits, without_codegen):
    """Of a layer's backward nothing but the weights' own gradients needs their products: all of these can be moved
    behind the gradient that the layer before waits for, as pipeline schedules do."""
    model = compiled(request.getfixturevalue(make)(torch.bfloat16, num_hidden_layers=2), "fp8")
    step(model, logits)
    layers = {u: b for u, b in compilation_of(model).backends.items() if u.kind.name.endswith("layer")}
    assert len(layers) == 2
    for unit, backend in layers.items():
        _, backward = backend.halves
        later = set()
        for node in backward.graph.nodes:
            if "wgrad" in str(node.target) or later & set(node.all_input_nodes):
                later.add(node)
        (out,) = backward.graph.find_nodes(op="output")
        gradients = [node for node in out.args[0] if node is not None]
        weights = [unit.template.get_parameter(name).shape for name in quantizable(unit.template)]
        found = [tuple(node.meta["val"].shape) for node in gradients if node in later]
        assert sorted(found) == sorted(map(tuple, weights))
        assert len(gradients) > len(found)


def test_an_unknown_memory_is_refused(make_model, compiled):
    with pytest.raises(Dsv3cError, match="memory: expected one of default, low, none, found 'high'"):
        compiled(make_model(), memory="high")
