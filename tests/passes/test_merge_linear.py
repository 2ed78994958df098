"""MergeLinear: one product for the weights of one input, in whole blocks, and nothing else."""

import pytest
import torch
from torch import nn

from dsv3c.fp8_weights import Float8Linear
from dsv3c.numerics import rounded_sum_bound
from dsv3c.passes.contract import operator_name, run, text
from dsv3c.passes.merge_linear import MergeLinear

K = 96


class Linears(nn.Module):
    """Linears of so many rows that read one input."""

    def __init__(self, *rows, bias=False):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(K, n, bias=bias) for n in rows)

    def forward(self, x):
        return tuple(linear(x) for linear in self.linears)


def capture(module, *inputs):
    """The graph that Dynamo hands to a backend, as a function of tensors, and its inputs, in an order of Dynamo's."""
    captured = []
    torch._dynamo.reset()
    torch.compile(module, backend=lambda *call: captured.append(call) or call[0].forward, fullgraph=True)(*inputs)
    return captured[0]


def merged(module, *inputs):
    gm, arguments = capture(module, *inputs)
    (record,) = run(gm, [MergeLinear()])
    assert run(gm, [MergeLinear()])[0].sites == 0
    return record, gm, arguments


def are_within(module, x, outs) -> list[bool]:
    """Whether each linear's result is within its bound of float64's."""
    found = []
    for linear, out in zip(module.linears, outs, strict=True):
        weight = linear.weight.double()
        reference, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        bound = rounded_sum_bound(reference, magnitude, K, torch.float32)
        found.append(bool(((out - reference).abs() <= bound).all()))
    return found


@pytest.fixture
def x():
    return torch.randn(2, 5, K)


@pytest.mark.parametrize("rows", [(128, 256), (256, 72), (72, 256), (128, 128), (128, 256, 40)])
def test_rewrites_to_the_expected_program(rows, x):
    module = Linears(*rows)
    record, gm, arguments = merged(module, x)
    assert record.sites == 1
    calls = [operator_name(node) for node in gm.graph.nodes if node.op == "call_function"]
    assert calls == ["cat", "linear", "split", *["getitem"] * len(rows)]
    assert are_within(module, x, gm(*arguments)) == [True] * len(rows)
    (stack,) = gm.graph.find_nodes(op="call_function", target=torch.cat)
    stack.args = (stack.args[0][::-1],)  # the mutant
    gm.recompile()
    if len(set(rows)) == 1:  # else the parts have other sizes
        assert are_within(module, x, gm(*arguments)) == [False] * len(rows)
    assert all("(linear)" in line for line in text(gm).splitlines() if "getitem" in line)


def test_only_the_last_of_a_stack_may_end_within_a_block(x):
    record, gm, _ = merged(Linears(128, 72, 256, 40), x)
    assert record.sites == 1
    assert "no multiple of 128" in record.skipped[0].reason
    stack = next(node for node in gm.graph.nodes if node.target is torch.cat)
    assert [weight.meta["example_value"].shape[0] for weight in stack.args[0]] == [128, 256, 72]
    assert text(gm).count("= linear(") == 2


class Other(Linears):
    def forward(self, x):
        first, second = self.linears
        return first(x), second(x + 1)


class Functional(Linears):
    def forward(self, x):
        return tuple(x @ linear.weight.T for linear in self.linears)


class KeptInFp8(Linears):
    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(Float8Linear(K, n) for n in (128, 256))


@pytest.mark.parametrize(
    "module",
    [
        KeptInFp8(),
        Linears(128),
        Linears(72, 40),
        Linears(128, 128, bias=True),
        Other(128, 128),
        Functional(128, 128),
    ],
)
def test_leaves_alone(module, x):
    gm, _ = capture(module, x)
    before = text(gm)
    (record,) = run(gm, [MergeLinear()])
    assert (record.sites, text(gm)) == (0, before)
