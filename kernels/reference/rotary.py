"""What multi-head latent attention does around its products, fused: rotary embedding, the latent's norm, the keys.

H heads of D = nope + 2r features, the last 2r of them rotary; V features of a value; cos and sin [R, r]. A rotation
turns interleaved pairs (x0, x1), (x2, x3), … by their angles; its result holds all first halves, then all second ones,
as dsv3c.layers' and transformers' (`rope_interleave`) do. It is computed in float32 and rounded once. The inverse takes
halves to interleaved pairs: the gradient.
"""

import torch
from torch import Tensor

from dsv3c.kernels.reference.casts import quantize_tile_ref
from dsv3c.kernels.reference.norm import rms_norm


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """x [.., 2r], rotated; cos and sin [.., r] broadcast to it. In float32, or float64 of float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if inverse:
        first, second = x.chunk(2, dim=-1)
        return torch.stack((first * cos + second * sin, second * cos - first * sin), dim=-1).flatten(-2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def rotate_heads_ref(x_RHD: Tensor, cos_Rr: Tensor, sin_Rr: Tensor, inverse: bool) -> None:
    """Rotates the last 2r features of every head of x, in place."""
    rope = x_RHD[..., -2 * cos_Rr.shape[1] :]
    rope.copy_(rotate(rope, cos_Rr[:, None], sin_Rr[:, None], inverse))


def latent_quantize_ref(
    x_RL: Tensor, weight_K: Tensor, cos_Rr: Tensor, sin_Rr: Tensor, eps: float, amax_floor: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(latent [R, K + 2r], latent_fp8 [R, K], latent_scale_inv, rstd [R]) of kv_a's output x: K features normed, and
    the 2r behind them, which are the heads' common key, rotated. The latent is what the cache holds; the FP8 pair, of
    the normed part, is what kv_b takes."""
    latent_RL, rstd_R = _latent(x_RL, weight_K, cos_Rr, sin_Rr, eps)
    return latent_RL, *quantize_tile_ref(latent_RL[:, : len(weight_K)], amax_floor, pow2), rstd_R


def latent_append_ref(
    pages_NPL: Tensor, x_BL: Tensor, weight_K: Tensor, cos_Br: Tensor, sin_Br: Tensor, eps: float, table_BM: Tensor,
    lengths_B: Tensor,
) -> Tensor:  # fmt: skip
    """The latent [B, L] of a new token of each sequence, as above; and writes it behind the sequence's last one."""
    latent_BL, _ = _latent(x_BL, weight_K, cos_Br, sin_Br, eps)
    size, position_B = pages_NPL.shape[1], lengths_B.long()
    page_B = table_BM.gather(1, (position_B // size)[:, None])[:, 0].long()
    pages_NPL[page_B, position_B % size] = latent_BL
    return latent_BL


def _latent(x_RL, weight_K, cos_Rr, sin_Rr, eps) -> tuple[Tensor, Tensor]:
    K = len(weight_K)
    normed_RK, rstd_R = rms_norm(x_RL[:, :K], weight_K, eps)
    return torch.cat((normed_RK, rotate(x_RL[:, K:], cos_Rr, sin_Rr).to(x_RL.dtype)), dim=-1), rstd_R
