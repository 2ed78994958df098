"""The head and its loss, in chunks: against torch's in float64."""

import pytest
import torch
from torch.nn import functional as F

import dsv3c.operators  # noqa: F401
from dsv3c import numerics
from dsv3c.kernels.reference import cross_entropy as reference
from dsv3c.numerics import rounded_between
from dsv3c.operators import OperatorError

ops = torch.ops.dsv3c
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 5), (7, 1000), (3, 8192), (5, 129280)])
def test_cross_entropy(shape, device):
    rows, words = shape
    logits = (torch.randn(shape, device=device) * 4).bfloat16()
    labels = torch.randint(words, (rows,), device=device)
    labels[rows // 2 :: 5] = reference.IGNORED
    labels[0] = words - 1
    scale = torch.full((1,), 0.37, device=device)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none", ignore_index=reference.IGNORED)
    (gradient,) = torch.autograd.grad((expected * scale.double()).sum(), exact)
    found = logits.clone()
    loss = ops.cross_entropy_(found, labels, scale)
    error = numerics.cross_entropy_bound(logits.float())
    assert bool(((loss - expected.detach()).abs() <= error).all())
    assert not loss[labels == reference.IGNORED].any()
    error = numerics.cross_entropy_gradient_bound(logits, exact.detach().softmax(-1), scale)
    low, high = rounded_between(gradient, error)
    assert bool(((low <= found) & (found <= high)).all())


@pytest.mark.gpu
@pytest.mark.parametrize("words", [1000, 129280, 140001])
def test_rows_that_a_program_takes_one_after_another(words):
    """Each as if it were alone, bit for bit."""
    logits = (torch.randn(300, words, device="cuda") * 4).bfloat16()
    labels, scale = torch.randint(words, (300,), device="cuda"), torch.full((1,), 0.37, device="cuda")
    found = logits.clone()
    loss = ops.cross_entropy_(found, labels, scale)
    for row in (0, 131, 132, 150, 299):
        alone = logits[row : row + 1].clone()
        assert torch.equal(ops.cross_entropy_(alone, labels[row : row + 1], scale), loss[row : row + 1])
        assert torch.equal(alone[0].view(torch.int16), found[row].view(torch.int16))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_linear(check, chunk, device):
    R, K, V = 21, 128, 1000
    x, weight = check.varied(R, K, torch.bfloat16, device), (torch.randn(V, K, device=device) * 0.02).bfloat16()
    labels = torch.randint(V, (R,), device=device)
    labels[::4] = reference.IGNORED
    loss, dx, dweight = ops.linear_cross_entropy(x, weight, labels, chunk)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].t(), labels, ignore_index=reference.IGNORED)
    gradients = torch.autograd.grad(expected, exact)
    logits = (x.double() @ weight.double().t()).abs().max()
    # Logits are rounded, which changes a loss by no more; and their gradients are, and then the results.
    u = numerics.unit_roundoff(torch.bfloat16)
    assert float((loss - expected.detach()).abs()) <= u * float(logits) * 2
    for f, e in zip((dx, dweight), gradients, strict=True):
        assert numerics.distance(f, e)[0] <= u * (2 + 2 * float(logits))
    assert dweight.dtype == torch.bfloat16
    whole = ops.linear_cross_entropy(x, weight, labels, R)
    assert numerics.distance(dweight, whole[2])[0] <= 2 * u  # both are rounded


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 0.37, -2.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("size", [0, 1, 4097, 5_000_001])  # the last: more than all programs take at a time
def test_scale_in_place(size, scale, device):
    """The product in float32, rounded once; of one, not a bit."""
    x = torch.randn(size + 8, device=device).bfloat16()[1:][:size]  # not aligned
    x[: size // 2 : 3] *= 2.0**-120
    x[1:2] = torch.inf
    before = x.clone()
    ops.scale_(x, torch.tensor(scale, device=device))
    expected = (before.double() * scale).float().bfloat16() if scale != 1 else before
    assert torch.equal(x.isnan(), expected.isnan())
    assert torch.equal(x[~x.isnan()], expected[~x.isnan()])


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_counts(device):
    x, weight = torch.ones(3, 8, device=device).bfloat16(), torch.ones(5, 8, device=device).bfloat16()
    labels = torch.full((3,), reference.IGNORED, device=device)
    for found in ops.linear_cross_entropy(x, weight, labels, 2):
        assert not found.any()
    for found in ops.linear_cross_entropy(x[:0], weight, labels[:0], 2):
        assert not found.any()
    assert bool(ops.cross_entropy_(x, labels + 200, torch.ones(1, device=device)).isnan().all())  # label 100 of 8


def test_what_is_refused():
    x, weight, labels = torch.ones(3, 8).bfloat16(), torch.ones(5, 8).bfloat16(), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(OperatorError, match="chunk: expected at least 1 row, found 0"):
        ops.linear_cross_entropy(x, weight, labels, 0)
    with pytest.raises(OperatorError, match="dtype of labels"):
        ops.linear_cross_entropy(x, weight, labels.int(), 4)
    with pytest.raises(OperatorError, match="contiguous x: expected True, found False"):
        ops.scale_(x.t(), torch.ones(1))
    with pytest.raises(OperatorError, match="dtype of scale"):
        ops.scale_(x, torch.ones(1).bfloat16())
    with pytest.raises(OperatorError, match="strides of logits"):
        ops.cross_entropy_(weight.t(), torch.zeros(8, dtype=torch.int64), torch.ones(1))
