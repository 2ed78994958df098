"""The gate behind its product, and the sort of token copies by expert.

T tokens, E experts, K experts a token, R = T·K token copies: copy t·K + k is token t's for its k-th expert.
"""

import math

import torch
from torch import Tensor


def gate_ref(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    n_group: int,
    topk_group: int,
    top_k: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """topk_weights float32 [T, K] and topk_idx int32 [T, K], each token's experts from the best to the worst.

    With a bias V3's gate: sigmoid scores; the bias takes part in the choice only; a group is worth the sum of its two
    best. Without one V2's: softmax scores, a group is worth its best. Of equal experts, and of equal groups, the lowest
    index wins, and NaN counts as more than any number, so that every idx is an expert whatever the logits are.
    torch.topk, which models call, leaves the order of equal values open: only there may its choice differ.

    Source: DeepSeek-V3 report (arXiv 2412.19437) §2.1.2; transformers models/deepseek_v3, models/deepseek_v2.
    """
    scores_TE = logits_TE.softmax(dim=-1) if bias_E is None else logits_TE.sigmoid()
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if n_group > 1:
        choice_TGe = choice_TE.unflatten(-1, (n_group, -1))
        group_TG = choice_TGe.amax(dim=-1) if bias_E is None else choice_TGe.topk(2, dim=-1).values.sum(dim=-1)
        dropped_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, _best(group_TG, topk_group), False)
        choice_TE = choice_TGe.masked_fill(dropped_TG[..., None], -math.inf).flatten(1)
    topk_idx = _best(choice_TE, top_k)
    topk_weights = scores_TE.gather(1, topk_idx)
    if norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
    return topk_weights * routed_scaling_factor, topk_idx.int()


def _best(values: Tensor, count: int) -> Tensor:
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def gate_backward_ref(
    dtopk_weights_TK: Tensor,
    logits_TE: Tensor,
    topk_idx_TK: Tensor,
    is_softmax: bool,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> Tensor:
    """dlogits [T, E] of `gate`'s weights. The choice has no gradient, nor has the bias.

    w_k = c·s_k/S with S = Σ_j s_j + 1e-20, so ds_k = c·(dw_k − Σ_j dw_j·s_j / S) / S; unnormalised, ds_k = c·dw_k. Then
    dx_e = ds_e·s_e·(1 − s_e) for sigmoid, s_e·(ds_e − Σ_j ds_j·s_j) for softmax.
    """
    idx_TK = topk_idx_TK.long()
    scores_TE = logits_TE.softmax(dim=-1) if is_softmax else logits_TE.sigmoid()
    scores_TK = scores_TE.gather(1, idx_TK)
    dscores_TK = dtopk_weights_TK * routed_scaling_factor
    if norm_topk_prob:
        total_T1 = scores_TK.sum(dim=-1, keepdim=True) + 1e-20
        dscores_TK = (dscores_TK - (dscores_TK * scores_TK).sum(dim=-1, keepdim=True) / total_T1) / total_T1
    dscores_TE = torch.zeros_like(scores_TE).scatter(1, idx_TK, dscores_TK)
    if is_softmax:
        return scores_TE * (dscores_TE - (dscores_TK * scores_TK).sum(dim=-1, keepdim=True))
    return dscores_TE * scores_TE * (1 - scores_TE)


def sort_by_expert_ref(topk_idx_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stable sort of token copies by expert, all int32: num_tokens_per_expert [E]; offs [E], where each expert's
    rows end; permutation [R], the copy that goes to each row; inverse [T, K], the row that each copy goes to.

    Every idx must be an expert: a copy of no expert would have no row.
    """
    expert_R = topk_idx_TK.flatten().long()
    num_tokens_E = expert_R.new_zeros(num_experts).scatter_add(0, expert_R, torch.ones_like(expert_R))
    permutation_R = expert_R.argsort(stable=True)
    inverse_R = torch.empty_like(permutation_R).scatter(0, permutation_R, torch.arange(len(expert_R)).to(expert_R))
    inverse_TK = inverse_R.view(topk_idx_TK.shape)
    return tuple(x.int() for x in (num_tokens_E, num_tokens_E.cumsum(0), permutation_R, inverse_TK))
