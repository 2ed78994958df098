"""RaiseAttention: one operator for the call, and calls that it must leave alone."""

import pytest
import torch
from torch.nn import functional as F

from dsv3c.passes.contract import operator_name, run, text
from dsv3c.passes.raise_attention import RaiseAttention

SCALE = 0.3


def capture(function, *inputs):
    """The graph that Dynamo hands to a backend, and its inputs, in an order of Dynamo's."""
    captured = []
    torch._dynamo.reset()
    torch.compile(function, backend=lambda *call: captured.append(call) or call[0].forward, fullgraph=True)(*inputs)
    return captured[0]


def heads(count=2):
    return torch.randn(1, count, 5, 8)


@pytest.mark.parametrize("masked", [False, True])
def test_one_operator_with_the_same_bits(masked):
    mask = torch.ones(5, 5, dtype=torch.bool).triu(-1).tril() if masked else None

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, not masked, scale=SCALE) + 1

    inputs = heads(), heads(), heads()
    gm, arguments = capture(attention, *inputs)
    (record,) = run(gm, [RaiseAttention()])
    calls = [operator_name(node) for node in gm.graph.nodes if node.op == "call_function"]
    assert record.sites == 1
    assert calls == ["dsv3c.attention.default", "getitem", "add"]
    gm.recompile()
    assert torch.equal(gm(*arguments)[0], attention(*inputs))
    assert run(gm, [RaiseAttention()])[0].sites == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, scale=SCALE),
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], scale=SCALE, enable_gqa=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    ],
    ids=["dropout", "grouped queries", "no scale"],
)
def test_leaves_other_attention_alone(call):
    gm, _ = capture(call, heads(), heads(), heads())
    before = text(gm)
    (record,) = run(gm, [RaiseAttention()])
    assert (record.sites, text(gm)) == (0, before)
    assert "dropout, grouped queries or no scale" in record.skipped[0].reason
