"""The training step of compiled layers: which operators it is made of, what it saves, and that both choices keep the
numbers."""

import re
from collections import Counter

import pytest
import torch

from dsv3c.backend import lower
from dsv3c.compiler import compilation_of
from dsv3c.errors import Dsv3cError
from dsv3c.numerics import distance, quantized_layer_rms

pytestmark = pytest.mark.usefixtures("without_codegen")

MODELS = ["make_model", "make_their_model"]
FUSED = ("FuseNormBackward", "FuseSwiGLUBackward", "WeighActivations", "TransposeSaved", "QuantizeBoth")


def gradients(model, logits):
    model.zero_grad()
    torch.manual_seed(0)
    logits(model, torch.randint(0, 256, (2, 20))).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def moe_layer(model):
    compilation = compilation_of(model)
    (unit,) = (unit for unit in compilation.units.units.values() if unit.kind.name == "moe_layer")
    return lower(unit, compilation.pipeline, compilation.weights)


@pytest.mark.parametrize("make", MODELS)
def test_an_moe_layers_step_is_made_of_fused_operators(make, request, compiled, logits):
    model = request.getfixturevalue(make)(torch.bfloat16, num_hidden_layers=1, first_k_dense_replace=0)
    fused = compiled(model, "fp8")
    found = gradients(fused, logits)
    operators = Counter(re.findall(r"= dsv3c\.(\w+)", moe_layer(fused).joint))
    expected = {
        "rms_norm_backward": 4, "swiglu_quantize_save": 1, "swiglu_quantize_backward": 1, "permute": 2, "unpermute": 2,
        "unpermute_backward": 0, "quantize_tile_both": 8,
    }  # fmt: skip
    assert {name: operators[name] for name in expected} == expected
    assert not re.search(r"\[160, 256\].*bfloat16.*quantize_tile", moe_layer(fused).joint)
    reference = gradients(compiled(model, "fp8", skip=FUSED), logits)
    assert found.keys() == reference.keys()
    for name, plain in reference.items():
        if plain.any():
            assert distance(found[name], plain)[0] <= quantized_layer_rms(gradient=True), name


def saved_bytes(lowered):
    """What forward hands to backward beyond its inputs, each storage once."""
    forward, backward = lowered.halves
    inputs = {node.name for node in forward.graph.nodes if node.op == "placeholder"}
    saved = [node.meta["val"] for node in backward.graph.nodes if node.op == "placeholder" and node.name not in inputs]
    storages = {v.untyped_storage()._cdata: v for v in saved if isinstance(v, torch.Tensor)}
    return sum(v.numel() * v.element_size() for v in storages.values())


@pytest.mark.parametrize("make", MODELS)
def test_less_memory_is_less_saved_and_the_same_bits(make, request, compiled, logits):
    model = request.getfixturevalue(make)(torch.bfloat16, num_hidden_layers=1, first_k_dense_replace=0)
    bytes_of, found = {}, {}
    for memory in ("none", "default", "low"):
        chosen = compiled(model, "fp8", memory=memory)
        found[memory] = gradients(chosen, logits)
        lowered = moe_layer(chosen)
        bytes_of[memory] = saved_bytes(lowered)
        again = "dsv3c.gemm" in lowered.backward.replace("gemm_", "")
        assert again == (memory == "low")
    assert bytes_of["low"] < bytes_of["default"] < bytes_of["none"]
    for memory in ("default", "low"):
        for name, gradient in found["none"].items():
            assert torch.equal(found[memory][name], gradient), (memory, name)


def test_an_unknown_memory_is_refused(make_model, compiled):
    with pytest.raises(Dsv3cError, match="memory: expected one of default, low, none, found 'high'"):
        compiled(make_model(), memory="high")
