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
    K = len(weight_K)
    normed_RK, rstd_R = rms_norm(x_RL[:, :K], weight_K, eps)
    rope = rotate(x_RL[:, K:], cos_Rr, sin_Rr).to(x_RL.dtype)
    return torch.cat((normed_RK, rope), dim=-1), *quantize_tile_ref(normed_RK, amax_floor, pow2), rstd_R
