"""FoldLinear: rows of a matrix where AOTAutograd would write a batched product, and nothing else."""

import pytest
import torch
from torch.nn import functional as F

from dsv3c.numerics import rounded_sum_bound
from dsv3c.passes.contract import operator_name, run, text
from dsv3c.passes.fold_linear import FoldLinear

K, N = 24, 10


def capture(function, *inputs):
    """The graph that Dynamo hands to a backend, and its inputs, in an order of Dynamo's."""
    captured = []
    torch._dynamo.reset()
    torch.compile(function, backend=lambda *call: captured.append(call) or call[0].forward, fullgraph=True)(*inputs)
    return captured[0]


def linear(x, w):
    return F.linear(x, w) * 2


def test_rewrites_to_the_expected_program():
    x, w = torch.randn(3, 5, K).transpose(0, 1), torch.randn(N, K)
    gm, arguments = capture(linear, x, w)
    (record,) = run(gm, [FoldLinear()])
    assert record.sites == 1
    calls = [operator_name(node) for node in gm.graph.nodes if node.op.startswith("call")]
    assert calls == ["size", "size", "reshape", "linear", "view", "mul"]
    gm.recompile()
    (out,), (reference, magnitude) = gm(*arguments), (x.double() @ w.double().T, x.double().abs() @ w.double().abs().T)
    assert out.shape == (5, 3, N)
    assert bool(((out / 2 - reference).abs() <= rounded_sum_bound(reference, magnitude, K, torch.float32)).all())
    assert run(gm, [FoldLinear()])[0].sites == 0


@pytest.mark.parametrize(
    "x",
    [torch.randn(3, 5, K), torch.randn(K, 5).T, torch.randn(3, 5, 1, K)],
    ids=["contiguous", "a matrix", "four dimensions, contiguous"],
)
def test_leaves_alone(x):
    gm, _ = capture(linear, x, torch.randn(N, K))
    before = text(gm)
    (record,) = run(gm, [FoldLinear()])
    assert (record.sites, text(gm)) == (0, before)
