"""Multi-head attention with different head sizes for keys and values, as MLA expands to.

No kernel of our own: `scaled_dot_product_attention` picks the fastest library kernel for the device (cuDNN on Hopper,
which takes V3's 192/128 heads). What this file adds is one opaque forward and backward operator over it, so that a
graph captured anywhere says "attention". On cuDNN the backward reuses forward's log-sum-exp; elsewhere it is written
out.

cuDNN adds up dq in the order in which its blocks arrive, and torch (2.13) has no switch for its ordered form. Where
bits must repeat, backward is FlashAttention 2 in its deterministic form, behind the same forward: it takes cuDNN's
log-sum-exp, and values padded to the size of keys.

Letters: B sequences, H heads, T queries, S keys, d size of a query and key head, v of a value head.
"""

from collections.abc import Iterator
from contextlib import contextmanager

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
    or added to the scores, in q's dtype; broadcastable to [B, H, T, S]; or None.
    """
    if _cudnn(q_BHTd, k_BHSd, v_BHSv, mask, scale, is_causal):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q_BHTd, k_BHSd, v_BHSv, _bias(mask, q_BHTd.dtype), True, 0.0, is_causal, False, scale=scale
        )
        lse = lse.reshape(q_BHTd.shape[:3])
    else:
        out = F.scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSv, mask, 0.0, is_causal, scale=scale)
        lse = q_BHTd.new_zeros(q_BHTd.shape[:3], dtype=torch.float32)
    return _heads_inside(out), lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask, scale: float, is_causal: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, each laid out as [B, T, H, ·]. `deterministic`: the same bits in each call; with a mask
    at the price of float32 scores [B, H, T, S]."""
    cudnn = _cudnn(q, k, v, mask, scale, is_causal)
    if cudnn and deterministic and _flash(q, k, v, mask, is_causal):
        gradients = _flash_backward(dout, q, k, v, out, lse, scale, is_causal)
    elif cudnn and not deterministic:
        # No dropout, so the random state is unused; dense, so there are no cumulative lengths.
        unused = torch.empty((), dtype=torch.int64, device=q.device)
        dout, out = _heads_inside(dout), _in_order_of(q, out)
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.unsqueeze(-1), unused, unused, _bias(mask, q.dtype), None, None, q.shape[2],
            k.shape[2], 0.0, is_causal, scale=scale,
        )  # fmt: skip
    else:
        gradients = _explicit_backward(dout, q, k, v, mask, scale, is_causal)
    return tuple(map(_heads_inside, gradients))


def _heads_inside(x: Tensor) -> Tensor:
    """x [B, H, T, ·], laid out as [B, T, H, ·]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _in_order_of(q: Tensor, out: Tensor) -> Tensor:
    """`out`, its dimensions in memory as q's are, which is how torch lays out what cuDNN returns.

    torch (as its source, MHA.cpp, says) looks up cuDNN's plan for a gradient by the strides of q, k and v, and not by
    those of `out` and its gradient, which the plan holds too. The first call with such q, k and v decides. Were ours
    laid out otherwise than those of an eager layer in the same process, the later one would get wrong gradients of q
    and k.
    """
    order = sorted(range(4), key=q.stride)[::-1]
    return out.permute(order).contiguous().permute([order.index(i) for i in range(4)])


def _flash(q: Tensor, k: Tensor, v: Tensor, mask, is_causal: bool) -> bool:
    """Whether FlashAttention 2 takes these. Its causal mask is aligned with the last key, torch's with the first."""
    fits = q.shape[3] % 8 == 0 and v.shape[3] <= q.shape[3] <= 256
    return mask is None and fits and (q.shape[2] == k.shape[2] or not is_causal)


def _flash_backward(dout, q, k, v, out, lse, scale, is_causal) -> tuple[Tensor, Tensor, Tensor]:
    padding = (0, q.shape[3] - v.shape[3])
    dout, v_padded, out = (F.pad(x, padding) for x in (dout, v, out))
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # the state of dropout
    with deterministic_algorithms():
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v_padded, out, lse, None, None, q.shape[2], k.shape[2], 0.0, is_causal, unused, unused,
            scale=scale,
        )  # fmt: skip
    return dq, dk, dv[..., : v.shape[3]]


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Inside, `torch.use_deterministic_algorithms` is on, for the whole process, which sets Inductor's flag as well;
    memory is not filled."""
    from torch._inductor import config as inductor_config

    inductor = inductor_config.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills
        inductor_config.deterministic = inductor


def _explicit_backward(dout, q, k, v, mask, scale, is_causal) -> tuple[Tensor, Tensor, Tensor]:
    """The textbook formulas, in float32 or float64. (An operator's kernel may not call autograd.)"""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q32, k32, v32, dout32 = (x.to(dtype) for x in (q, k, v, dout))
    scores_BHTS = q32 @ k32.transpose(2, 3) * scale
    if is_causal:
        mask = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores_BHTS = scores_BHTS + _bias(mask, dtype)
    p_BHTS = scores_BHTS.softmax(-1).nan_to_num(0.0)  # a row that attends to nothing gives nothing
    dp_BHTS = dout32 @ v32.transpose(2, 3)
    ds_BHTS = p_BHTS * (dp_BHTS - (dp_BHTS * p_BHTS).sum(-1, keepdim=True)) * scale
    dq, dk, dv = ds_BHTS @ k32, ds_BHTS.transpose(2, 3) @ q32, p_BHTS.transpose(2, 3) @ dout32
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as cuDNN takes it: added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask, scale: float, is_causal: bool) -> bool:
    if not q.is_cuda:
        return False
    choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, is_causal, scale=scale)
    return choice == SDPBackend.CUDNN_ATTENTION.value
