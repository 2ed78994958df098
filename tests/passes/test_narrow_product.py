"""NarrowProduct: the router's three products from BF16 operands, within the bound of a float32 sum."""

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import dsv3c.operators  # noqa: F401
from dsv3c import numerics
from dsv3c.passes import NarrowProduct
from dsv3c.passes import narrow_product as module
from dsv3c.passes.contract import run, text

R, N, K = 40, 24, 72


def forward(x, w, g):
    return x.float() @ w.float().t()


def backward(x, w, g):
    return (g @ w.float()).bfloat16(), (g.t() @ x.float()).bfloat16()


def wide_dgrad(x, w, g):
    return g @ w.float()


@pytest.fixture
def operands():
    """Gradients of all sizes, down to where the lowest of the three parts is a subnormal number."""
    g = torch.randn(R, N) * torch.exp2(torch.randint(-60, 60, (R, 1)).float())
    g[3], g[:, 5] = 0, 2.0**-110
    return torch.randn(R, K).bfloat16(), torch.randn(N, K).bfloat16(), g


def traced(function, operands):
    gm = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*operands)
    gm.graph.eliminate_dead_code()
    return gm


def narrowed(function, operands):
    gm = traced(function, operands)
    (record,) = run(gm, [NarrowProduct()])
    assert run(gm, [NarrowProduct()])[0].sites == 0
    return record.sites, gm


def is_within(out, a, b, contraction) -> bool:
    a, b = a.double(), b.double()
    reference, norm = a @ b, (a.square() @ b.square()).sqrt()
    element, _ = numerics.wide_mm_bounds(reference, norm, out.dtype, contraction)
    return bool(((out.double() - reference).abs() <= element).all())


def check(outs, operands) -> list[bool]:
    x, w, g = operands
    exact = ((g, w, 3 * N), (g.t(), x, R))
    return [is_within(out, *terms) for out, terms in zip(outs, exact, strict=True)]


def test_logits(operands):
    sites, gm = narrowed(forward, operands)
    assert sites == 1
    assert "float32[40, 72]" not in text(gm)
    x, w, _ = operands
    assert is_within(gm(*operands), x, w.t(), K)


def test_gradients(operands):
    sites, gm = narrowed(backward, operands)
    assert sites == 2
    assert text(gm).count("= aten.sub") == 2  # split once, for both
    assert "aten.mm" not in text(gm)
    assert check(gm(*operands), operands) == [True, True]


def test_a_gradient_that_is_wanted_in_float32_stays_float32(operands):
    _, gm = narrowed(wide_dgrad, operands)
    _, w, g = operands
    out = gm(*operands)
    assert out.dtype == torch.float32
    assert is_within(out, g, w, 3 * N)


@pytest.mark.parametrize("order", [(0, 0, 0), (0, 1, 1), (0, 2, 2)])
def test_a_missing_part_breaks_the_bound(order, operands, monkeypatch):
    split = module._parts
    monkeypatch.setattr(module, "_parts", lambda at, g: [split(at, g)[part] for part in order])
    _, gm = narrowed(wide_dgrad, operands)
    _, w, g = operands
    assert not is_within(gm(*operands), g, w, 3 * N)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, g: g.t() @ g,
        lambda x, w, g: x @ w.t(),
        lambda x, w, g: x.double() @ w.double().t(),
        lambda x, w, g: x.float().half() @ w.t().half(),
        lambda x, w, g: w.float() @ (x.float() + 1).t(),
    ],
)
def test_leaves_alone(function, operands):
    gm = traced(function, operands)
    before = text(gm)
    (record,) = run(gm, [NarrowProduct()])
    assert (record.sites, text(gm)) == (0, before)
