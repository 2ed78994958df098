"""Bias update, balance loss and MTP loss against their formulas, written as loops in float64."""

import math

import pytest
import torch

from dsv3c.losses import mtp_loss, sequence_balance_loss, update_bias
from dsv3c.numerics import cross_entropy_bound, positive_sum_bound


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
