"""Bias update, balance loss and MTP loss against their formulas, written as loops in float64; cross-entropy without
logits against torch's with them."""

import math

import pytest
import torch
import torch.nn.functional as F

from dsv3c.errors import Dsv3cError
from dsv3c.losses import IGNORED, cross_entropy, mtp_loss, sequence_balance_loss, update_bias
from dsv3c.numerics import cross_entropy_bound, distance, positive_sum_bound, reordered_bound


def test_update_bias():
    """Counts 0, 4, 8, 4 have mean 4: up, stay, down, stay."""
    bias = torch.tensor([0.5, -0.5, 0.0, 1.0])
    step = torch.tensor(0.001)
    updated = update_bias(bias, torch.tensor([0, 4, 8, 4]))
    assert updated.dtype == torch.float32
    assert torch.equal(updated, torch.stack([bias[0] + step, bias[1], bias[2] - step, bias[3]]))
    assert torch.equal(update_bias(bias, torch.tensor([7, 7, 7, 7])), bias)
    assert torch.equal(
        update_bias(bias, torch.tensor([0, 0, 0, 9]), speed=0.25) - bias, torch.tensor([1, 1, 1, -1]) / 4
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sequence_balance_loss(dtype):
    torch.manual_seed(0)
    B, T, E, K, alpha = 3, 11, 8, 2, 0.01
    scores = torch.rand(B, T, E, dtype=dtype)
    idx = torch.stack([torch.randperm(E)[:K] for _ in range(B * T)]).view(B, T, K)
    expected = 0.0
    for b in range(B):
        for e in range(E):
            f = E / (K * T) * sum(e in idx[b, t].tolist() for t in range(T))
            p = sum(scores[b, t, e].item() / scores[b, t].double().sum().item() for t in range(T)) / T
            expected += alpha * f * p / B
    loss = sequence_balance_loss(scores, idx, alpha=alpha)
    assert abs(loss.item() - expected) <= positive_sum_bound(B + E + T + E, dtype, expected)


def test_sequence_balance_loss_of_balanced_routing_is_alpha():
    scores = torch.full((2, 8, 4), 0.3, dtype=torch.float64)
    idx = torch.arange(16).view(1, 8, 2).expand(2, -1, -1) % 4
    loss = sequence_balance_loss(scores, idx, alpha=0.5)
    assert abs(loss.item() - 0.5) <= positive_sum_bound(2 + 4 + 8 + 4, torch.float64, 0.5)


def test_sequence_balance_loss_gradient_lowers_overloaded_experts():
    scores = torch.full((1, 8, 4), 0.5, requires_grad=True)
    sequence_balance_loss(scores, torch.zeros(1, 8, 1, dtype=torch.int64)).backward()
    assert (scores.grad[..., 0] > 0).all()
    assert (scores.grad[..., 1:] < 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mtp_loss(dtype):
    """mtp_logits[:, t] is scored on token t + 2; ignored labels do not count."""
    torch.manual_seed(0)
    B, T, V = 2, 7, 13
    logits = torch.randn(B, T - 1, V, dtype=dtype) * 3
    labels = torch.randint(V, (B, T))
    labels[0, 4] = -100
    losses = []
    for b in range(B):
        for t in range(T - 2):
            if (label := labels[b, t + 2].item()) != -100:
                row = logits[b, t].tolist()
                losses.append(math.log(sum(math.exp(value) for value in row)) - row[label])
    expected = 0.3 * sum(losses) / len(losses)
    bound = 0.3 * cross_entropy_bound(logits) + positive_sum_bound(len(losses), dtype, expected)
    assert abs(mtp_loss(logits, labels).item() - expected) <= bound


def test_mtp_loss_is_computed_in_float32():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 50).bfloat16(), torch.randint(50, (2, 7))
    assert torch.equal(mtp_loss(logits, labels), mtp_loss(logits.float(), labels))
    assert mtp_loss(logits, labels).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk", [4, 100])
def test_cross_entropy_without_logits(dtype, chunk):
    B, T, D, V = 2, 7, 32, 50
    hidden, weight = torch.randn(B, T, D, dtype=dtype), torch.randn(V, D, dtype=dtype) / 8
    labels = torch.randint(0, V, (B, T))
    labels[0, 3:5] = IGNORED

    def step(loss_of, *inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        loss = loss_of(*inputs)
        return loss.detach(), *torch.autograd.grad(0.25 * loss, inputs)

    found = step(lambda x, w: cross_entropy(x, w, labels, chunk=chunk), hidden, weight)
    expected = step(
        lambda x, w: F.cross_entropy((x @ w.t()).flatten(0, 1), labels.flatten(), ignore_index=IGNORED),
        hidden.double(),
        weight.double(),
    )
    for result, reference, kind in zip(found, expected, (torch.float32, dtype, dtype), strict=True):
        assert result.dtype == kind
        assert distance(result, reference)[1] <= reordered_bound(1, V, dtype)
    with torch.no_grad():
        assert distance(cross_entropy(hidden, weight, labels), expected[0])[1] <= reordered_bound(1, V, dtype)


def test_cross_entropy_backward_twice():
    """The first backward scales in place what forward made; a kept graph makes it again."""
    hidden, weight = torch.randn(6, 32).bfloat16().requires_grad_(), torch.randn(50, 32).bfloat16().requires_grad_()
    labels = torch.randint(0, 50, (6,))
    loss = cross_entropy(hidden, weight, labels)
    once = torch.autograd.grad(0.3 * loss, (hidden, weight), retain_graph=True)
    for factor in (0.3, 1.0, 0.3):
        again = torch.autograd.grad(factor * loss, (hidden, weight), retain_graph=True)
        assert torch.equal(again[1], once[1]) == (factor == 0.3)
    with pytest.raises(Dsv3cError, match="create_graph"):
        torch.autograd.grad(loss.square(), hidden, create_graph=True)
    loss = cross_entropy(hidden, weight, labels)
    loss.mul(0.3).backward()
    assert torch.equal(hidden.grad, once[0])
    assert torch.equal(weight.grad, once[1])


def test_cross_entropy_of_nothing_is_zero():
    hidden, weight = torch.ones(3, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(5, 8, dtype=torch.bfloat16)
    loss = cross_entropy(hidden, weight, torch.full((3,), IGNORED))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
