"""The head and its loss. V words; labels int64 [R], IGNORED where a row does not count."""

import torch
from torch import Tensor

IGNORED = -100  # as in torch's cross_entropy


def cross_entropy_ref(logits_RV: Tensor, labels_R: Tensor, scale: Tensor) -> Tensor:
    """The loss of each row, log Σ exp(logits) − logit of its label, zero where the label is IGNORED, NaN for one that
    is no word. The logits become the gradient of scale · Σ loss, in place.

    logits: BF16; scale: float32, one number. In float32, float64 of float64 logits; the gradient is rounded once.
    """
    logits = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    counts = labels_R != IGNORED
    known = (labels_R >= 0) & (labels_R < logits.shape[1])
    label = torch.where(known, labels_R, 0)[:, None]
    loss_R = logits.logsumexp(-1) - logits.gather(1, label)[:, 0]
    gradient = logits.softmax(-1).scatter_add(1, label, -known[:, None].to(logits.dtype))
    logits_RV.copy_(gradient * torch.where(counts, scale, 0)[:, None])
    return torch.where(counts, torch.where(known, loss_R, torch.nan), 0)


def linear_cross_entropy_ref(
    x_RK: Tensor, weight_VK: Tensor, labels_R: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx [R, K], dweight [V, K]): the mean of `cross_entropy` of the logits x weightᵀ over the rows that count,
    and its gradients; of so many rows at a time. Logits and their gradient have the dtype of x, as dx has; loss and
    dweight are summed up in float32 (float64 of float64), dweight is then rounded to weight's. No row that counts:
    zeros."""
    total = torch.promote_types(x_RK.dtype, torch.float32)
    scale = 1 / (labels_R != IGNORED).sum().clamp(min=1).to(total)
    loss, dx_RK, dweight_VK = scale.new_zeros(()), torch.empty_like(x_RK), torch.zeros_like(weight_VK, dtype=total)
    for x, labels, dx in zip(x_RK.split(chunk), labels_R.split(chunk), dx_RK.split(chunk), strict=True):
        logits = x @ weight_VK.t()
        loss += cross_entropy_ref(logits, labels, scale).sum() * scale
        dx.copy_(logits @ weight_VK)
        dweight_VK += logits.t().to(total) @ x.to(total)
    return loss, dx_RK, dweight_VK.to(weight_VK.dtype)


def scale_ref(x: Tensor, scale: Tensor) -> None:
    """x becomes x · scale, in place: in float32, float64 of float64, rounded once. scale: one number."""
    x.copy_(x.to(torch.promote_types(x.dtype, torch.float32)) * scale)
