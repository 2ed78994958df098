"""QuantizeLinear, QuantizeGroupedLinear: a linear's three products in FP8, each of the right operands, and no other."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import dsv3c.operators  # noqa: F401
from dsv3c.grouped_linear import grouped_linear
from dsv3c.numerics import Recipe, quantized_gemm_rms, unit_roundoff
from dsv3c.passes import QuantizeGroupedLinear, QuantizeLinear, quantize_linear
from dsv3c.passes.contract import run, text
from dsv3c.passes.quantize_linear import WeightInput
from dsv3c.passes.rewrite import aten, insert

ops, RECIPE = torch.ops.dsv3c, Recipe()
FLOOR, GRADIENT_FLOOR, POW2 = RECIPE.amax_floor, RECIPE.gradient_amax_floor, RECIPE.pow2
R, N, K = 60, 256, 384


class Linear(nn.Module):
    """Of one weight, or of two that MergeLinear stacked; with `offs` the experts'. Copies of the weights, for forward
    and for the input's gradient, are inputs as well; the latter of twice the weight, lest one stand for the other."""

    def __init__(self, *weights, offs=None):
        super().__init__()
        self.weights = nn.ParameterList(weights)
        for use, factor in (("fprop", 1), ("dgrad", 2)):
            fp8, scale_inv = ops.quantize_block(factor * self.whole().detach(), FLOOR, POW2)
            self.register_buffer(use, fp8)
            self.register_buffer(f"{use}_scale_inv", scale_inv)
        self.register_buffer("offs", offs)

    def whole(self):
        return torch.cat(tuple(self.weights)) if len(self.weights) > 1 else self.weights[0]

    def copies(self):
        return (self.fprop, self.fprop_scale_inv), (self.dgrad, self.dgrad_scale_inv)

    def quantized(self):
        """The pass, told where the copies are: behind the weights."""
        n, offs = len(self.weights), self.offs
        inputs = WeightInput(tuple(range(n)), (n, n + 1), (n + 2, n + 3))
        return (QuantizeLinear if offs is None else QuantizeGroupedLinear)(RECIPE, (inputs,))

    def forward(self, x):
        return F.linear(x, self.whole()) if self.offs is None else grouped_linear(x, self.whole(), self.offs)


OFFS = torch.tensor([17, 17, 60], dtype=torch.int32)  # an expert without rows
MODULES = {
    "one": lambda: Linear(torch.randn(N, K)),
    "stacked": lambda: Linear(torch.randn(N - 128, K), torch.randn(128, K)),
    "bfloat16": lambda: Linear(torch.randn(N, K, dtype=torch.bfloat16)),
    "experts": lambda: Linear(torch.randn(3, N, K), offs=OFFS),
    "experts, bfloat16": lambda: Linear(torch.randn(3, N, K, dtype=torch.bfloat16), offs=OFFS),
}


@pytest.fixture(params=MODULES)
def module(request):
    return MODULES[request.param]()


@pytest.fixture
def operands(module):
    """x, each tile its own magnitude, and dy, small as a mean over many tokens makes it."""
    dtype = module.weights[0].dtype
    x = torch.randn(R, K) * torch.exp2(torch.randint(-4, 4, (R, K // 128))).repeat_interleave(128, 1)
    return x.to(dtype).requires_grad_(), (torch.randn(R, N) * 1e-9).to(dtype)


@pytest.fixture
def results(module, operands, rewritten):
    """results(step, calls): y, dx and the gradients of the weights, behind the pass `step`."""

    def make(step, calls=None):
        (x, dy), y = operands, rewritten(module, [step], calls)(operands[0])
        return y.detach(), *torch.autograd.grad(y, (x, *module.weights), dy)

    return make


def expected(module, x, dy):
    """The program that the pass should leave, written out."""
    fprop, dgrad = module.copies()
    offs = () if module.offs is None else (module.offs,)
    gemm, gemm_dgrad, gemm_wgrad = quantize_linear._GROUPED if offs else quantize_linear._DENSE
    x_tiles, dy_tiles = ops.quantize_tile(x, FLOOR, POW2), ops.quantize_tile(dy, GRADIENT_FLOOR, POW2)
    xt_tiles = ops.requantize_t(*x_tiles, module.offs, FLOOR, POW2)
    dyt_tiles = ops.quantize_tile_t(dy, module.offs, GRADIENT_FLOOR, POW2)
    dw = gemm_wgrad(*dyt_tiles, *xt_tiles, *offs, x.dtype)
    rows = [len(w) for w in module.weights]
    return gemm(*x_tiles, *fprop, *offs, x.dtype), gemm_dgrad(*dy_tiles, *dgrad, *offs, x.dtype), *dw.split(rows)


def products(found, module, x, dy):
    """What each result is the product of, in float64, by group: name, result, left and right."""
    y, dx, *dw = found
    x, dy, w, dw = (t.detach().double() for t in (x, dy, module.whole(), torch.cat(dw)))
    ends = [R] if module.offs is None else module.offs.tolist()
    for start, end, w_NK, dw_NK in zip([0, *ends], ends, w.view(-1, N, K), dw.view(-1, N, K), strict=False):
        rows = slice(start, end)
        yield "y", y[rows], x[rows], w_NK.t()
        yield "dx", dx[rows], dy[rows], 2 * w_NK
        yield "dw", dw_NK, dy[rows].t(), x[rows]


def is_within(found, *operands):
    """Whether the RMS errors of y, dx and dw are what FP8 operands (of dw one is cast twice) and rounding allow."""
    errors, sizes = {}, {}
    for name, out, left, right in products(found, *operands):
        exact, norm = left @ right, (left.square() @ right.square()).sqrt()
        reached = norm > 0
        errors.setdefault(name, []).append((out.double() - exact)[reached] / norm[reached])
        sizes.setdefault(name, []).append((exact / norm)[reached])
    ratios = {}
    for name in errors:
        error, size = (torch.cat(values[name]).square().mean().sqrt() for values in (errors, sizes))
        casts = (2 if name == "dw" else 1) * quantized_gemm_rms() ** 2
        ratios[name] = float(error / (casts + (unit_roundoff(found[0].dtype) * size) ** 2).sqrt())
    return {name: ratio <= 1 for name, ratio in ratios.items()}


def test_rewrites_to_the_expected_program_bit_for_bit(module, operands, results):
    calls = Counter()
    found = results(module.quantized(), calls)
    prefix = "grouped_" if module.offs is not None else ""
    kernels = (f"{prefix}gemm", f"{prefix}gemm_dgrad", f"{prefix}gemm_wgrad")
    assert calls == Counter(quantize_tile=2, quantize_tile_t=1, requantize_t=1, **dict.fromkeys(kernels, 1))
    for result, reference in zip(found, expected(module, *operands), strict=True):
        assert torch.equal(result, reference)
    assert is_within(found, module, *operands) == {"y": True, "dx": True, "dw": True}


def shifted(self, node, x, floor):
    """Each tile with the scale of the one before."""
    fp8, scale_inv = quantized(self, node, x, floor)
    return fp8, insert(scale_inv.next, aten.roll.default, scale_inv, [1], [1])


quantized = quantize_linear._Rewrite.quantized
MUTANTS = {
    "one floor for all": ("floor", lambda self, node: self.recipe.amax_floor, {"dx"}),
    "scales of the tiles beside": ("quantized", shifted, {"y"}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_breaks_the_bound(mutant, module, operands, results, monkeypatch):
    name, wrong, broken = MUTANTS[mutant]
    monkeypatch.setattr(quantize_linear._Rewrite, name, wrong)
    within = is_within(results(module.quantized()), module, *operands)
    assert {what for what, right in within.items() if not right} >= broken


def test_an_input_gradient_of_the_copy_for_forward_breaks_it(module, operands, results):
    (inputs,) = module.quantized().weights
    swapped = replace(module.quantized(), weights=(replace(inputs, fprop=inputs.dgrad, dgrad=inputs.fprop),))
    within = is_within(results(swapped), module, *operands)
    assert within == {"y": False, "dx": False, "dw": True}


X, WEIGHT = torch.randn(R, K), torch.randn(N, K)
COPY = ops.quantize_block(WEIGHT, FLOOR, POW2)


def captured(function, *inputs):
    gm = make_fx(lambda *inputs: (function(*inputs),), tracing_mode="fake")(*inputs)
    gm.graph.eliminate_dead_code()
    return gm


def test_a_weight_kept_in_fp8_needs_no_other_copy():
    gm = captured(lambda x, *pair: x @ ops.dequantize_block(*pair, torch.float32).t(), X, *COPY)
    (record,) = run(gm, [QuantizeLinear()])
    assert record.sites == 1
    assert torch.equal(gm(X, *COPY)[0], ops.gemm(*ops.quantize_tile(X, FLOOR, POW2), *COPY, torch.float32))


@pytest.mark.parametrize(
    ("function", "inputs", "said"),
    [
        (lambda x, w, fp8, scale_inv: x @ w.t(), (), True),
        (lambda x, w, fp8, scale_inv: x.t() @ x, (1,), True),
        (lambda x, w, fp8, scale_inv: x @ (w * 2).t(), (1,), False),
        (lambda x, w, fp8, scale_inv: (x.view(6, 10, K) @ w.t().expand(6, K, N)).view(R, N), (1,), False),
    ],
    ids=["a weight without a copy", "another input", "what is computed from a weight", "a batch"],
)
def test_leaves_alone(function, inputs, said):
    gm = captured(function, X, WEIGHT, *COPY)
    before = text(gm)
    (record,) = run(gm, [QuantizeLinear(RECIPE, tuple(WeightInput((i,), (2, 3), (2, 3)) for i in inputs))])
    assert (record.sites, text(gm)) == (0, before)
    assert [site.reason for site in record.skipped] == ["its weight has no quantised copy"] * said
