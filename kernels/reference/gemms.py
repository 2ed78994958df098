"""FP8 products with block scales."""

import torch
from torch import Tensor

from dsv3c.kernels.reference.casts import dequantize_block_ref, dequantize_tile
from dsv3c.numerics import TILE, round_up


def gemm_ref(
    x_fp8_RK: Tensor, x_scale_inv: Tensor, w_fp8_NK: Tensor, w_scale_inv: Tensor, dtype: torch.dtype
) -> Tensor:
    """x wᵀ, [R, N]. Sums dequantised products in any order; `numerics.accumulate_rms` allows for it."""
    x_RK, w_NK = dequantize_tile(x_fp8_RK, x_scale_inv, dtype), _dequantize_block_wide(w_fp8_NK, w_scale_inv, dtype)
    return (x_RK @ w_NK.mT).to(dtype)


def gemm_keys_ref(
    x_fp8_RK: Tensor, x_scale_inv: Tensor, w_fp8_NK: Tensor, w_scale_inv: Tensor, rope_BTr: Tensor
) -> Tensor:
    """Keys and values, [R, H, 128 + r + 128] in rope's dtype: by head the first half of x wᵀ, rope, and the other half.
    w has 256 rows for each head; R = B·T."""
    kv_RHD = gemm_ref(x_fp8_RK, x_scale_inv, w_fp8_NK, w_scale_inv, rope_BTr.dtype).unflatten(1, (-1, 2 * TILE))
    own, values = kv_RHD.split(TILE, dim=2)
    rope_RHr = rope_BTr.flatten(0, 1)[:, None].expand(-1, own.shape[1], -1)
    return torch.cat((own, rope_RHr, values), dim=2)


def gemm_dgrad_ref(
    dy_fp8_RN: Tensor, dy_scale_inv: Tensor, w_fp8_NK: Tensor, w_scale_inv: Tensor, dtype: torch.dtype
) -> Tensor:
    """dy w, [R, K]: the input's gradient. dy's tiles run along N."""
    dy_RN, w_NK = dequantize_tile(dy_fp8_RN, dy_scale_inv, dtype), _dequantize_block_wide(w_fp8_NK, w_scale_inv, dtype)
    return (dy_RN @ w_NK).to(dtype)


def gemm_wgrad_ref(
    dyt_fp8_NP: Tensor, dyt_scale_inv: Tensor, xt_fp8_KP: Tensor, xt_scale_inv: Tensor, dtype: torch.dtype
) -> Tensor:
    """dyᵀ x, [N, K]: the weight's gradient. Both operands' tiles run along the rows (tokens)."""
    dyt_NP, xt_KP = dequantize_tile(dyt_fp8_NP, dyt_scale_inv, dtype), dequantize_tile(xt_fp8_KP, xt_scale_inv, dtype)
    return (dyt_NP @ xt_KP.mT).to(dtype)


def wide_mm_ref(a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, [M, N], of BF16 matrices, added in float32 in any order and rounded to `dtype` once."""
    return (a_MK.float() @ b_KN.float()).to(dtype)


def _dequantize_block_wide(w_fp8_NK: Tensor, w_scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_block_ref(w_fp8_NK, w_scale_inv, torch.float64 if dtype == torch.float64 else torch.float32)


def _groups(offs: Tensor) -> list[slice]:
    ends = offs.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def grouped_gemm_ref(
    x_fp8_RK: Tensor, x_scale_inv: Tensor, w_fp8_ENK: Tensor, w_scale_inv: Tensor, offs: Tensor, dtype: torch.dtype
) -> Tensor:
    """`gemm` of each group's rows with its expert's weight, [R, N]; rows of no group are zero here, anything on a
    GPU."""
    y_RN = x_fp8_RK.new_zeros(len(x_fp8_RK), w_fp8_ENK.shape[1], dtype=dtype)
    for e, rows in enumerate(_groups(offs)):
        y_RN[rows] = gemm_ref(x_fp8_RK[rows], x_scale_inv[rows], w_fp8_ENK[e], w_scale_inv[e], dtype)
    return y_RN


def grouped_gemm_dgrad_ref(
    dy_fp8_RN: Tensor, dy_scale_inv: Tensor, w_fp8_ENK: Tensor, w_scale_inv: Tensor, offs: Tensor, dtype: torch.dtype
) -> Tensor:
    """`gemm_dgrad` of each group's rows with its expert's weight, [R, K]."""
    dx_RK = dy_fp8_RN.new_zeros(len(dy_fp8_RN), w_fp8_ENK.shape[2], dtype=dtype)
    for e, rows in enumerate(_groups(offs)):
        dx_RK[rows] = gemm_dgrad_ref(dy_fp8_RN[rows], dy_scale_inv[rows], w_fp8_ENK[e], w_scale_inv[e], dtype)
    return dx_RK


def grouped_gemm_wgrad_ref(
    dyt_fp8_NP: Tensor,
    dyt_scale_inv: Tensor,
    xt_fp8_KP: Tensor,
    xt_scale_inv: Tensor,
    offs: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`gemm_wgrad` over each group's rows, [E, N, K]; zero for an expert without rows."""
    dw_ENK = dyt_fp8_NP.new_zeros(len(offs), len(dyt_fp8_NP), len(xt_fp8_KP), dtype=dtype)
    first = 0
    for e, rows in enumerate(_groups(offs)):
        last = first + round_up(rows.stop - rows.start, TILE)
        tiles = slice(first // TILE, last // TILE)
        dyt, dyt_scale_inv_e = dyt_fp8_NP[:, first:last], dyt_scale_inv[:, tiles]
        dw_ENK[e] = gemm_wgrad_ref(dyt, dyt_scale_inv_e, xt_fp8_KP[:, first:last], xt_scale_inv[:, tiles], dtype)
        first = last
    return dw_ENK


def gemm_wgrad_accumulate_ref(
    dyt_fp8_NP: Tensor, dyt_scale_inv: Tensor, xt_fp8_KP: Tensor, xt_scale_inv: Tensor, dw_NK: Tensor
) -> None:
    """dw += `gemm_wgrad`, in place; dw is float32, and so is the sum."""
    dw_NK += gemm_wgrad_ref(dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv, dw_NK.dtype)


def grouped_gemm_wgrad_accumulate_ref(
    dyt_fp8_NP: Tensor,
    dyt_scale_inv: Tensor,
    xt_fp8_KP: Tensor,
    xt_scale_inv: Tensor,
    offs: Tensor,
    dw_ENK: Tensor,
) -> None:
    """dw += `grouped_gemm_wgrad`, in place; dw is float32, and so is the sum."""
    dw_ENK += grouped_gemm_wgrad_ref(dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv, offs, dw_ENK.dtype)
