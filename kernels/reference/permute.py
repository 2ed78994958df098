"""Rows to their experts and back. T tokens, K experts a token, R = T·K rows in the experts' order, H features; G =
⌈H/128⌉. `permutation` int32 [R] and `inverse` int32 [T, K] are those of `sort_by_expert`."""

import torch
from torch import Tensor

from dsv3c.kernels.reference.casts import requantize_t_ref


def permute_ref(
    x_fp8_TH: Tensor, x_scale_inv_TG: Tensor, permutation_R: Tensor, inverse_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """x_fp8 [R, H] and scale_inv [R, G], strides (1, R): row inverse[t, k] is token t's."""
    token_R = permutation_R.long() // inverse_TK.shape[1]
    scale_inv_GR = x_scale_inv_TG.t().contiguous()[:, token_R]
    return x_fp8_TH.view(torch.uint8)[token_R].view(x_fp8_TH.dtype), scale_inv_GR.t()


def permute_requantize_t_ref(
    x_fp8_TH: Tensor,
    x_scale_inv_TG: Tensor,
    permutation_R: Tensor,
    inverse_TK: Tensor,
    offs: Tensor,
    amax_floor: float,
    pow2: bool,
) -> tuple[Tensor, Tensor]:
    """`requantize_t` of `permute`, the bits of both: each expert's rows, cast again for its weight gradient."""
    return requantize_t_ref(*permute_ref(x_fp8_TH, x_scale_inv_TG, permutation_R, inverse_TK), offs, amax_floor, pow2)


def unpermute_ref(
    y_RH: Tensor,
    inverse_TK: Tensor,
    topk_weights_TK: Tensor | None,
    added_TH: Tensor | None,
    residual_TH: Tensor | None,
) -> Tensor:
    """out [T, H] of y's dtype: Σ_k topk_weights[t, k]·y[inverse[t, k]] + added + residual, summed in that order in
    float32 and rounded once. Without weights, the gradient of `permute`: the sum of the copies' gradients."""
    y_TKH = y_RH[inverse_TK.long()].float()
    if topk_weights_TK is not None:
        y_TKH = y_TKH * topk_weights_TK[..., None]
    out_TH = y_TKH[:, 0]
    for k in range(1, y_TKH.shape[1]):
        out_TH = out_TH + y_TKH[:, k]
    for term_TH in (added_TH, residual_TH):
        out_TH = out_TH if term_TH is None else out_TH + term_TH
    return out_TH.to(y_RH.dtype)


def unpermute_backward_ref(
    dout_TH: Tensor, y_RH: Tensor, inverse_TK: Tensor, topk_weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """dy [R, H] of y's dtype, dy[inverse[t, k]] = topk_weights[t, k]·dout[t], and dtopk_weights float32 [T, K],
    <y[inverse[t, k]], dout[t]>; both computed in float32."""
    dy_TKH = (topk_weights_TK[..., None] * dout_TH.float()[:, None]).to(y_RH.dtype)
    dtopk_weights_TK = (y_RH[inverse_TK.long()].float() * dout_TH.float()[:, None]).sum(dim=-1)
    dy_RH = torch.empty_like(y_RH, memory_format=torch.contiguous_format)
    dy_RH[inverse_TK.flatten().long()] = dy_TKH.flatten(0, 1)
    return dy_RH, dtopk_weights_TK
