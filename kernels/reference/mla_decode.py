"""Attention of a few new tokens over the latent cache, with the up-projections absorbed into queries and output."""

import torch
from torch import Tensor

RANK, LATENT = 512, 576  # values are the latent's first RANK columns, keys all of it (V3's kv_lora_rank, + rope)


def mla_decode_ref(
    q_BTHL: Tensor, cache_NPL: Tensor, block_table: Tensor, lengths: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, RANK] in q's dtype and lse [B, T, H], float32 (float64 if q is).

    Sequence b has lengths[b] keys, its T newest tokens' included: key s is row s % P of page block_table[b, s // P],
    and query t sees the keys up to lengths[b] - T + t. lse is the natural logarithm of Σ exp(q·k · softmax_scale). A
    query without keys gives zeros and -inf. Whatever lies behind a sequence's end, NaN included, has no influence.
    """
    T = q_BTHL.shape[1]
    dtype = torch.promote_types(q_BTHL.dtype, torch.float32)
    out = q_BTHL.new_zeros((*q_BTHL.shape[:3], RANK))
    lse = q_BTHL.new_full(q_BTHL.shape[:3], -torch.inf, dtype=dtype)
    pages = [-(-n // cache_NPL.shape[1]) for n in lengths.tolist()]
    for b, n in enumerate(lengths.tolist()):
        keys_SL = cache_NPL[block_table[b, : pages[b]].long()].flatten(0, 1)[:n].to(dtype)
        for t in range(T):
            seen_SL = keys_SL[: max(n - T + t + 1, 0)]
            if len(seen_SL):
                scores_HS = q_BTHL[b, t].to(dtype) @ seen_SL.T * softmax_scale
                lse[b, t] = scores_HS.logsumexp(-1)
                out[b, t] = (scores_HS.softmax(-1) @ seen_SL[:, :RANK]).to(out.dtype)
    return out, lse


def read_pages_ref(cache_NPL: Tensor, block_table: Tensor, lengths: Tensor, num_new: int) -> tuple[Tensor, Tensor]:
    """What `mla_decode_ref` attends over, spelt out: latents [B, S, L], zero behind a sequence's end, and bool
    [B, 1, T, S], which of them the T = num_new newest tokens see; S is what the pages of a sequence hold."""
    latent_BSL = cache_NPL[block_table.long()].flatten(1, 2)
    key_S, new_T = (torch.arange(size, device=lengths.device) for size in (latent_BSL.shape[1], num_new))
    seen_BTS = key_S <= (lengths[:, None] - num_new + new_T)[..., None]
    return torch.where((key_S < lengths[:, None])[..., None], latent_BSL, 0), seen_BTS[:, None]
