"""What DeepSeek-V3 is trained with: the next token's loss without its logits, bias update, balance loss, MTP loss.
Plain functions.

Shape suffixes: B sequences, T tokens, V vocabulary, E experts, K experts per token.
Sources: DeepSeek-V3 report (arXiv 2412.19437) §2.1.2, §2.2 and §4.2 (the weights).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import dsv3c.operators  # noqa: F401
from dsv3c.errors import Dsv3cError

IGNORED = -100


def cross_entropy(hidden: Tensor, head_weight: Tensor, labels: Tensor, *, chunk: int = 4096) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, head_weight), labels)`, the mean over the labels that are not -100, without
    keeping the logits: `chunk` tokens of them are there at a time. A scalar, at least float32.

    hidden: [.., D], what the model's final norm returns; labels: int64 [..], already shifted. In BF16 the gradients are
    computed with the loss, three products for one, and kept instead of the logits (4096 tokens of V3: 59 MB and the
    weight's 1.9 GB); other dtypes, and calls without gradients, take torch's way. Backward scales them in place, so
    that one more through a kept graph computes them again. Raises Dsv3cError where gradients of gradients are wanted.
    """
    hidden_RD, labels_R = hidden.flatten(0, -2), labels.flatten()
    if torch.is_grad_enabled() and hidden.dtype == head_weight.dtype == torch.bfloat16:
        return _LinearCrossEntropy.apply(hidden_RD, head_weight, labels_R, chunk)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    sums = [
        F.cross_entropy(F.linear(x, head_weight).to(dtype), label, ignore_index=IGNORED, reduction="sum")
        for x, label in zip(hidden_RD.split(chunk), labels_R.split(chunk), strict=True)
    ]
    return torch.stack(sums).sum() / (labels_R != IGNORED).sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, weight_VD, labels_R, chunk):
        loss, *ctx.gradients = torch.ops.dsv3c.linear_cross_entropy(x_RD, weight_VD, labels_R, chunk)
        ctx.save_for_backward(x_RD, weight_VD, labels_R)
        ctx.chunk = chunk
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():
            raise Dsv3cError("cross_entropy: expected create_graph=False, its gradient has none; try F.cross_entropy")
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # used up: the graph was kept for one more backward
            _, *gradients = torch.ops.dsv3c.linear_cross_entropy(*ctx.saved_tensors, ctx.chunk)
        gradients = [g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)]
        for gradient in filter(torch.is_tensor, gradients):
            torch.ops.dsv3c.scale_(gradient, dloss)
        return *gradients, None, None


def update_bias(bias_E: Tensor, num_tokens_per_expert_E: Tensor, *, speed: float = 0.001) -> Tensor:
    """The router's correction bias after a step: `speed` less for overloaded experts, `speed` more for the others.

    Counts are over the whole batch (summed over ranks and micro-batches); an expert at the mean stays. Returns float32
    [E], to be copied into `router.e_score_correction_bias`. §2.1.2, "auxiliary-loss-free load balancing".
    """
    load_E = num_tokens_per_expert_E.double()
    return bias_E + speed * torch.sign(load_E.mean() - load_E).to(bias_E.dtype)


def sequence_balance_loss(scores_BTE: Tensor, topk_idx_BTK: Tensor, *, alpha: float = 1e-4) -> Tensor:
    """The complementary sequence-wise balance loss, α Σ_e f_e P_e, averaged over the batch; a scalar.

    f_e: the share of a sequence's T·K choices that went to expert e, times E; P_e: its mean score, scores normalised
    over all experts. scores: sigmoid of the router's logits, [B, T, E], float32. Only P carries a gradient. Balanced
    routing gives α. Equations 17 to 20.
    """
    _, tokens, experts = scores_BTE.shape
    chosen_BR = topk_idx_BTK.flatten(1)
    f_BE = scores_BTE.new_zeros(len(chosen_BR), experts)
    f_BE = f_BE.scatter_add(1, chosen_BR, torch.ones_like(chosen_BR, dtype=f_BE.dtype)) * experts / chosen_BR.shape[1]
    p_BE = (scores_BTE / scores_BTE.sum(dim=-1, keepdim=True)).sum(dim=1) / tokens
    return alpha * (f_BE * p_BE).sum(dim=-1).mean()


def mtp_loss(mtp_logits: Tensor, labels_BT: Tensor, *, weight: float = 0.3) -> Tensor:
    """`weight` times the mean cross entropy of the token after the next one; a scalar, at least float32.

    mtp_logits: [B, T - 1, V] as the model returns them; labels: the input_ids [B, T], -100 where a token is not to be
    predicted. V3 used weight 0.3 for its first 10T tokens, then 0.1. Equations 24 and 25.
    """
    logits = mtp_logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return weight * F.cross_entropy(logits, labels_BT[:, 2:].flatten(), ignore_index=IGNORED)
