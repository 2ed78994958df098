"""RMSNorm, fused with the residual addition in front and the cast behind."""

import torch
from torch import Tensor

from dsv3c.kernels.reference.casts import quantize_tile_ref


def rms_norm(x_RK: Tensor, weight_K: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y [R, K], rstd [R]): x/sqrt(mean x² + eps) in float32, rounded to the dtype of x, times the weight in that
    dtype, as transformers' DeepseekV3RMSNorm rounds. rstd, one over the root, stays float32 (float64 of float64)."""
    x = x_RK.to(torch.promote_types(x_RK.dtype, torch.float32))
    rstd_R = (x.square().mean(-1) + eps).rsqrt()
    return weight_K * (x * rstd_R[:, None]).to(x_RK.dtype), rstd_R


def rms_norm_quantize_ref(
    x_RK: Tensor, weight_K: Tensor, eps: float, amax_floor: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y_fp8 [R, K], y_scale_inv, rstd [R]): `quantize_tile` of the norm of x, and what backward needs.

    x, weight: BF16; rstd: float32.
    """
    y_RK, rstd_R = rms_norm(x_RK, weight_K, eps)
    return *quantize_tile_ref(y_RK, amax_floor, pow2), rstd_R


def add_rms_norm_quantize_ref(
    x_RK: Tensor, residual_RK: Tensor, weight_K: Tensor, eps: float, amax_floor: float, pow2: bool, normed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum, y, y_fp8 [R, K], y_scale_inv, rstd [R]): the norm of sum = x + residual, which is rounded to BF16 first. y
    in BF16 is for what does not take FP8, the router; [0, K] unless `normed`."""
    sum_RK = x_RK + residual_RK
    y_RK, rstd_R = rms_norm(sum_RK, weight_K, eps)
    return sum_RK, y_RK if normed else y_RK[:0], *quantize_tile_ref(y_RK, amax_floor, pow2), rstd_R


def rms_norm_backward_ref(
    dy_RK: Tensor, x_RK: Tensor, weight_K: Tensor, rstd_R: Tensor, dsum_RK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dx [R, K], dweight [K]): gradients of `rms_norm`; dx with dsum [R, K] added, the gradient that reaches x beside
    the norm. Computed in float32; dx rounded once, to the dtype of x; dweight stays float32."""
    compute = torch.promote_types(x_RK.dtype, torch.float32)
    normed_RK = x_RK.to(compute) * rstd_R[:, None]
    dy_RK = dy_RK.to(compute)
    dnormed_RK = dy_RK * weight_K.to(compute)
    mean_R = (dnormed_RK * normed_RK).mean(-1)
    dx_RK = rstd_R[:, None] * (dnormed_RK - normed_RK * mean_R[:, None])
    if dsum_RK is not None:
        dx_RK = dx_RK + dsum_RK.to(compute)
    return dx_RK.to(x_RK.dtype), (dy_RK * normed_RK).sum(0)
