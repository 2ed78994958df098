"""Attention with its rotation and keys raised: the same gradients and cached calls, for both families."""

import copy
from itertools import permutations

import pytest
import torch

from dsv3c.cache import LatentCache
from dsv3c.compiler import compilation_of
from dsv3c.kernels.attention import _in_order_of
from dsv3c.numerics import MODEL_DISTANCE_BF16, distance
from dsv3c.passes import FoldLinear, JoinKeys, RaiseAttention, RaiseGroupedLinear, RaiseRotary, RotateInPlace

pytestmark = pytest.mark.usefixtures("without_codegen")

PASSES = (RaiseAttention(), JoinKeys(), RaiseRotary(), RaiseGroupedLinear(), FoldLinear(), RotateInPlace())
FAMILIES = pytest.mark.parametrize("family", ["ours", "transformers"])


def sites(result) -> dict[str, set[int]]:
    """By pass: how often it rewrote a layer."""
    found: dict[str, set[int]] = {}
    for unit, backend in compilation_of(result).backends.items():
        if "layer" in unit.name:
            for record in (*backend.captured_records, *backend.joint.records):
                found.setdefault(record.name, set()).add(record.sites)
    return found


@pytest.fixture
def model(family, request):
    make = request.getfixturevalue("make_model" if family == "ours" else "make_their_model")
    return make(torch.bfloat16, num_hidden_layers=1, qk_rope_head_dim=64)  # no router: one expert more is no rounding


@FAMILIES
def test_gradients(family, model, compiled, logits):
    exact, result = copy.deepcopy(model).double(), compiled(model, passes=PASSES)
    tokens, mask = torch.randint(0, 256, (2, 17)), torch.ones(2, 17, dtype=torch.long)
    mask[0, :5] = 0  # positions differ between sequences

    def gradients(model, **kwargs):
        model.zero_grad()
        out = logits(model, tokens, attention_mask=mask, **kwargs)[:, 5:]
        out.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    truth, found = gradients(exact), gradients(result)
    assert sites(result) | {"FoldLinear": 0} == {
        "RaiseAttention": {1}, "JoinKeys": {int(family != "ours")}, "RaiseRotary": {1}, "RaiseGroupedLinear": {0},
        "RotateInPlace": {2}, "FoldLinear": 0,
    }  # fmt: skip
    for name, eager in gradients(model).items():
        assert distance(found[name], truth[name])[0] <= MODEL_DISTANCE_BF16 * distance(eager, truth[name])[0], name


@FAMILIES
def test_cached_calls(family, model, compiled, logits):
    """A prompt, some tokens at once, one token, one more: from a cache of what was rotated before."""
    exact, result = copy.deepcopy(model).double(), compiled(model, passes=PASSES)
    tokens = torch.randint(0, 256, (2, 12))

    def outputs(model):
        dtype = next(model.parameters()).dtype
        ours = {"cache": LatentCache(model.config, 2, 12, dtype=dtype)} if family == "ours" else None
        cache = ours or {"past_key_values": pytest.importorskip("transformers").DynamicCache()}
        with torch.no_grad():
            return [logits(model, tokens[:, a:b], **cache) for a, b in ((0, 7), (7, 10), (10, 11), (11, 12))]

    for found, eager, truth in zip(outputs(result), outputs(model), outputs(exact), strict=True):
        assert distance(found, truth)[0] <= MODEL_DISTANCE_BF16 * distance(eager, truth)[0]


@FAMILIES
def test_casts_of_heads_gradients(family, model, compiled, logits):
    result = compiled(model, "fp8")
    logits(result, torch.randint(0, 256, (2, 17))).square().mean().backward()
    found = sites(result)
    assert (found["CastHeads"], found["RotateInPlace"]) == ({2}, {1})


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_what_cudnn_returned_is_laid_out_as_its_queries(order):
    """As torch does it, for whose plans that counts; no value changes."""
    sizes, back = (2, 3, 5), [order.index(i) for i in range(3)]
    q, like = (torch.empty(*(sizes[i] for i in order), size).permute(*back, 3) for size in (24, 16))
    out = torch.randn(2, 5, 3, 16).transpose(1, 2)
    found = _in_order_of(q, out)
    assert found.stride() == like.stride()
    assert torch.equal(found, out)
