"""RaiseGroupedLinear on transformers' fallback, and on what it must leave alone."""

import pytest
import torch

from dsv3c.passes.contract import run, text
from dsv3c.passes.raise_grouped_linear import RaiseGroupedLinear

pytest.importorskip("transformers.integrations.moe", reason="their operator: pip install 'dsv3c[hf]'")

R, E, K, N = 10, 3, 4, 6


def capture(function, *inputs):
    """The graph that Dynamo hands to a backend, and its inputs, in an order of Dynamo's."""
    captured = []
    torch._dynamo.reset()
    torch.compile(function, backend=lambda *call: captured.append(call) or call[0].forward, fullgraph=True)(*inputs)
    return captured[0]


def experts(x, w, offs):
    return torch.ops.transformers.grouped_mm_fallback(x, w.transpose(-2, -1), offs=offs)


@pytest.fixture
def operands():
    return torch.randn(R, K), torch.randn(E, N, K), torch.tensor([4, 4, R], dtype=torch.int32)


def test_the_same_products(operands):
    gm, inputs = capture(experts, *operands)
    (record,) = run(gm, [RaiseGroupedLinear()])
    assert record.sites == 1
    assert "dsv3c.grouped_linear" in text(gm)
    assert "grouped_mm_fallback" not in text(gm)
    gm.recompile()
    assert torch.equal(gm(*inputs)[0], experts(*operands))
    (record,) = run(gm, [RaiseGroupedLinear()])
    assert record.sites == 0


def test_leaves_other_products_alone(operands):
    gm, _ = capture(lambda x, w, offs: x @ w[0].T + offs[0], *operands)
    before = text(gm)
    (record,) = run(gm, [RaiseGroupedLinear()])
    assert (record.sites, text(gm)) == (0, before)
