"""The shared expert stands in front of the router; nothing but the order changes. (Both models: test_moe_alone.py.)"""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import dsv3c.operators  # noqa: F401
from dsv3c.passes import HoistSharedExpert
from dsv3c.passes.contract import run, text

ops = torch.ops.dsv3c
FLOOR = 1e-4
GATE = 1, 1, 2, True, 2.5  # groups, groups chosen, experts chosen, normalised, factor
INPUTS = (
    torch.randn(5, 128),
    torch.randn(128, 4),
    torch.zeros(4),
    *(t for _ in range(2) for t in (torch.randn(256, 128).to(torch.float8_e4m3fn), torch.ones(2, 1))),
)


def shared(x, w, w_scale, down, down_scale):
    y = ops.gemm(*ops.quantize_tile(x, FLOOR, False), w, w_scale, torch.bfloat16)
    return ops.gemm(*ops.swiglu_quantize(y, None, FLOOR, False), down, down_scale, torch.bfloat16)


def before(x, g, bias, *weights):
    scores = ops.gate(x @ g, bias, *GATE)
    return *scores, shared(x.abs(), *weights)


def after(x, g, bias, *weights):
    y = shared(x.abs(), *weights)
    return *ops.gate(x @ g, bias, *GATE), y


def operators(gm) -> list[str]:
    calls = [line.partition(" = ")[2].partition("(")[0] for line in text(gm).splitlines()]
    return [call for call in calls if call.startswith(("dsv3c", "aten"))]


def traced(function):
    return make_fx(function, tracing_mode="fake")(*INPUTS)


def test_the_expected_order_and_the_same_bits():
    gm = traced(before)
    expected = gm(*INPUTS)
    (record,) = run(gm, [HoistSharedExpert()])
    assert record.sites == 1
    assert not record.added
    assert not record.removed
    assert operators(gm) == operators(traced(after))
    assert all(torch.equal(a, b) for a, b in zip(gm(*INPUTS), expected, strict=True))
    assert run(gm, [HoistSharedExpert()])[0].sites == 0


def another_product_behind(x, g, bias, *weights):
    return *before(x, g, bias, *weights), shared(x + 1, *weights)


def test_all_products_at_once():
    gm = traced(another_product_behind)
    assert run(gm, [HoistSharedExpert()])[0].sites == 1
    found = operators(gm)
    (gate,) = (i for i, name in enumerate(found) if name.startswith("dsv3c.gate"))
    assert all(i < gate for i, name in enumerate(found) if name.startswith("dsv3c.gemm"))
    assert run(gm, [HoistSharedExpert()])[0].sites == 0


def needs_the_gate(x, g, bias, *weights):
    scores = ops.gate(x @ g, bias, *GATE)
    return *scores, shared(x * scores[0][:, :1], *weights)


def is_there_already(x, g, bias, *weights):
    return shared(x, *weights), ops.gate(x @ g, bias, *GATE)


def no_router(x, g, bias, *weights):
    return x @ g, shared(x, *weights)


@pytest.mark.parametrize("function", [needs_the_gate, is_there_already, no_router])
def test_leaves_alone(function):
    assert run(traced(function), [HoistSharedExpert()])[0].sites == 0
