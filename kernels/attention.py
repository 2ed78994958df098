"""Multi-head attention with different head sizes for keys and values, as MLA expands to.

No kernel of our own: `scaled_dot_product_attention` picks the fastest library kernel for the device (cuDNN on Hopper,
which takes V3's 192/128 heads). What this file adds is one opaque forward and backward operator over it, so that a
graph captured anywhere says "attention". On cuDNN the backward reuses forward's log-sum-exp; elsewhere it is written
out.

Letters: B sequences, H heads, T queries, S keys, d size of a query and key head, v of a value head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

aten = torch.ops.aten


def attention(
    q_BHTd: Tensor, k_BHSd: Tensor, v_BHSv: Tensor, mask, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale + mask) v, and the log-sum-exp of each row where the kernel has it (zeros otherwise).

    Returns [B, H, T, v] in q's dtype, laid out as [B, T, H, v], and float32 [B, H, T]. `mask` is bool, True = attend,
    broadcastable to [B, H, T, S], or None.
    """
    if _cudnn(q_BHTd, k_BHSd, v_BHSv, mask, scale, is_causal):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q_BHTd, k_BHSd, v_BHSv, _bias(mask, q_BHTd.dtype), True, 0.0, is_causal, False, scale=scale
        )
        lse = lse.reshape(q_BHTd.shape[:3])
    else:
        out = F.scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSv, mask, 0.0, is_causal, scale=scale)
        lse = q_BHTd.new_zeros(q_BHTd.shape[:3], dtype=torch.float32)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each laid out as [B, T, H, ·]."""
    if _cudnn(q, k, v, mask, scale, is_causal):
        # No dropout, so the random state is unused; dense, so there are no cumulative lengths.
        unused = torch.empty((), dtype=torch.int64, device=q.device)
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.unsqueeze(-1), unused, unused, _bias(mask, q.dtype), None, None, q.shape[2],
            k.shape[2], 0.0, is_causal, scale=scale,
        )  # fmt: skip
    else:
        gradients = _explicit_backward(dout, q, k, v, mask, scale, is_causal)
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in gradients)


def _explicit_backward(dout, q, k, v, mask, scale, is_causal) -> tuple[Tensor, Tensor, Tensor]:
    """The textbook formulas, in float32 or float64. (An operator's kernel may not call autograd.)"""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q32, k32, v32, dout32 = (x.to(dtype) for x in (q, k, v, dout))
    scores_BHTS = q32 @ k32.transpose(2, 3) * scale
    if is_causal:
        mask = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf)
    p_BHTS = scores_BHTS.softmax(-1).nan_to_num(0.0)  # a row that attends to nothing gives nothing
    dp_BHTS = dout32 @ v32.transpose(2, 3)
    ds_BHTS = p_BHTS * (dp_BHTS - (dp_BHTS * p_BHTS).sum(-1, keepdim=True)) * scale
    dq, dk, dv = ds_BHTS @ k32, ds_BHTS.transpose(2, 3) @ q32, p_BHTS.transpose(2, 3) @ dout32
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask as cuDNN takes it: added to the scores."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask, scale: float, is_causal: bool) -> bool:
    if not q.is_cuda:
        return False
    choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, is_causal, scale=scale)
    return choice == SDPBackend.CUDNN_ATTENTION.value
