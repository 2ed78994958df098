"""FuseNormBackward on each form that a norm's gradient comes in, and only on a norm's."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dsv3c.operators  # noqa: F401
from dsv3c import numerics
from dsv3c.numerics import rounded_between
from dsv3c.passes import FuseNormBackward

B, T, K, EPS = 2, 6, 256, 1e-6


def composite(x, weight):
    """Ours, as it is taken apart on a CPU."""
    return weight * F.rms_norm(x, weight.shape, eps=EPS)


def fused(x, weight):
    """Ours, as it is on a GPU."""
    return weight * torch.ops.aten._fused_rms_norm(x, weight.shape, None, EPS)[0]


def theirs(x, weight):
    """transformers'."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


class Normed(nn.Module):
    def __init__(self, norm, join):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(K, dtype=torch.bfloat16) + 0.5)
        self.norm, self.join = norm, join

    def forward(self, x):
        return self.join(x, self.norm(x, self.weight))


def alone(x, y):
    return y.clone()


def beside(x, y):
    return x + y


@pytest.fixture
def x():
    return torch.randn(B, T, K, dtype=torch.bfloat16) * torch.logspace(-3, 1, T, dtype=torch.bfloat16)[:, None]


def gradients_between(x, weight, dy, dsum):
    """The least and the largest gradient of x, and the weight's with its largest error, in BF16."""
    x, weight, dy, dsum = (t.double().view(-1, t.shape[-1]) for t in (x, weight, dy, dsum))
    rstd = (x.square().mean(-1) + EPS).rsqrt()
    normed, dnormed = x * rstd[:, None], dy * weight
    mean = (dnormed * normed).mean(-1, keepdim=True)
    dx = rstd[:, None] * (dnormed - normed * mean)
    error = numerics.norm_gradient_bound(dnormed, normed, rstd, (dx + dsum).abs() + dx.abs())
    error += 3 * numerics.rstd_bound() * rstd[:, None] * (dnormed.abs() + (normed * mean).abs())
    terms = dy * normed
    weight_error = numerics.sum_bound(terms, len(x) + 3, 0) + 2 * numerics.rstd_bound() * terms.abs().sum(0)
    return rounded_between(dx + dsum, error), rounded_between(terms.sum(0), weight_error)


def are_within(module, x, out, *gradients) -> list[bool]:
    """Whether the gradients of x and of the weight are between their bounds."""
    dy = torch.linspace(-1, 1, out.numel()).view_as(out).bfloat16()
    bounds = gradients_between(x, module.weight.detach(), dy, dy if module.join is beside else torch.zeros_like(dy))
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)
    return [
        bool(((low <= gradient.view_as(low)) & (gradient.view_as(low) <= high)).all())
        for gradient, (low, high) in zip(gradients, bounds, strict=True)
    ]


@pytest.mark.parametrize("norm", [composite, fused, theirs])
@pytest.mark.parametrize("join", [alone, beside])
def test_the_gradients_of_the_norm_and_of_what_is_beside_it(norm, join, x, rewritten, step):
    module, found = Normed(norm, join), Counter()
    results = step(rewritten(module, [FuseNormBackward()], found), x)
    assert found == Counter(rms_norm_backward=1)
    assert are_within(module, x, *results) == [True, True]


@pytest.mark.parametrize(
    ("wrong", "within"),
    [((1,), [False, False]), ((2,), [False, True]), ((3,), [False, False]), ((4, True), [False, True])],
    ids=["x", "weight", "rstd", "without the sum"],
)
def test_a_mutant_breaks_the_bounds(wrong, within, x, rewritten, step, mutant):
    module = Normed(composite, beside)
    results = step(rewritten(module, [FuseNormBackward(), mutant("rms_norm_backward", *wrong)]), x)
    assert are_within(module, x, *results) == within


def also_its_root(x, weight):
    x32 = x.float()
    rstd = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * (x32 * rstd).to(x.dtype) + rstd.to(x.dtype)


def without_the_mean(x, weight):
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).sum(-1, keepdim=True) + EPS)).to(x.dtype)


@pytest.mark.parametrize("norm", [also_its_root, without_the_mean])
def test_leaves_other_gradients_alone(norm, x, rewritten, step):
    module, found = Normed(norm, beside), Counter()
    results = step(rewritten(module, [FuseNormBackward()], found), x)
    assert not found
    for result, reference in zip(results, step(rewritten(module, []), x), strict=True):
        assert torch.equal(result, reference)


@pytest.mark.parametrize("columns", [72, 16512, K])
def test_leaves_odd_sizes_and_frozen_weights_alone(columns, x, rewritten, step):
    module, found = Normed(composite, beside), Counter()
    if columns == K:
        module.weight.requires_grad_(False)
    else:
        module.weight = nn.Parameter(module.weight.detach().repeat(columns // K + 1)[:columns])
    step(rewritten(module, [FuseNormBackward()], found), x.repeat(1, 1, columns // K + 1)[..., :columns])
    assert not found
