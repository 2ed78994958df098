"""FP8 products with block scales, dense and grouped; one in BF16. What each means: `kernels/reference/gemms.py`."""

import torch
from torch import Tensor

from dsv3c.kernels.reference import gemms
from dsv3c.numerics import TILE
from dsv3c.operators.define import check_blocks, check_rank, check_tiles, check_wide, count_groups, define, expect


def _wgrad_shape(groups: tuple, dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv) -> tuple:
    check_tiles("dyt", dyt_fp8_NP, dyt_scale_inv)
    check_tiles("xt", xt_fp8_KP, xt_scale_inv)
    expect("columns of xt", xt_fp8_KP.shape[1], dyt_fp8_NP.shape[1])
    return *groups, dyt_fp8_NP.shape[0], xt_fp8_KP.shape[0]


def _check_gradient(dw: Tensor, shape: tuple) -> None:
    expect("dtype of dw", dw.dtype, torch.float32)
    expect("shape of dw", tuple(dw.shape), shape)
    expect("whether dw is contiguous", dw.is_contiguous(), True)


def _gemm(x_fp8_RK, x_scale_inv, w_fp8_NK, w_scale_inv, dtype, dimensions=2):
    check_tiles("x", x_fp8_RK, x_scale_inv)
    check_rank("w", w_fp8_NK, dimensions)
    check_blocks("w", w_fp8_NK, w_scale_inv)
    check_wide("the result", dtype)
    R, K = x_fp8_RK.shape
    *_, N, contracted = w_fp8_NK.shape
    expect("columns of w", contracted, K)
    return x_fp8_RK.new_empty((R, N), dtype=dtype)


def _gemm_keys(x_fp8_RK, x_scale_inv, w_fp8_NK, w_scale_inv, rope_BTr):
    R, N = _gemm(x_fp8_RK, x_scale_inv, w_fp8_NK, w_scale_inv, torch.bfloat16).shape
    check_rank("rope", rope_BTr, 3)
    B, T, r = rope_BTr.shape
    expect("dtype of rope", rope_BTr.dtype, torch.bfloat16)
    expect("rows of rope", B * T, R)
    expect("columns of rope modulo 8", r % 8, 0)
    expect(f"rows of w modulo {2 * TILE}", N % (2 * TILE), 0)
    return rope_BTr.new_empty((R, N // (2 * TILE), 2 * TILE + r))


def _gemm_dgrad(dy_fp8_RN, dy_scale_inv, w_fp8_NK, w_scale_inv, dtype, dimensions=2):
    check_tiles("dy", dy_fp8_RN, dy_scale_inv)
    check_rank("w", w_fp8_NK, dimensions)
    check_blocks("w", w_fp8_NK, w_scale_inv)
    check_wide("the result", dtype)
    R, N = dy_fp8_RN.shape
    *_, contracted, K = w_fp8_NK.shape
    expect("rows of w", contracted, N)
    return dy_fp8_RN.new_empty((R, K), dtype=dtype)


def _gemm_wgrad(dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv, dtype):
    check_wide("the result", dtype)
    return dyt_fp8_NP.new_empty(_wgrad_shape((), dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv), dtype=dtype)


def _grouped_gemm(x_fp8_RK, x_scale_inv, w_fp8_ENK, w_scale_inv, offs, dtype):
    out = _gemm(x_fp8_RK, x_scale_inv, w_fp8_ENK, w_scale_inv, dtype, dimensions=3)
    expect("number of groups", count_groups(offs), w_fp8_ENK.shape[0])
    return out


def _grouped_gemm_dgrad(dy_fp8_RN, dy_scale_inv, w_fp8_ENK, w_scale_inv, offs, dtype):
    out = _gemm_dgrad(dy_fp8_RN, dy_scale_inv, w_fp8_ENK, w_scale_inv, dtype, dimensions=3)
    expect("number of groups", count_groups(offs), w_fp8_ENK.shape[0])
    return out


def _grouped_gemm_wgrad(dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv, offs, dtype):
    check_wide("the result", dtype)
    groups = (count_groups(offs),)
    return dyt_fp8_NP.new_empty(_wgrad_shape(groups, dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv), dtype=dtype)


def _gemm_wgrad_accumulate(dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv, dw_NK):
    _check_gradient(dw_NK, _wgrad_shape((), dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv))


def _grouped_gemm_wgrad_accumulate(dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv, offs, dw_ENK):
    groups = (count_groups(offs),)
    _check_gradient(dw_ENK, _wgrad_shape(groups, dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv))


def _wide_mm(a_MK, b_KN, dtype):
    for name, x in (("a", a_MK), ("b", b_KN)):
        check_rank(name, x, 2)
        expect(f"dtype of {name}", x.dtype, torch.bfloat16)
    expect("whether dtype is bfloat16 or float32", dtype in (torch.bfloat16, torch.float32), True)
    (M, K), (contracted, N) = a_MK.shape, b_KN.shape
    expect("rows of b", contracted, K)
    return a_MK.new_empty((M, N), dtype=dtype)


# FLOPs, from shapes: a multiplication and an addition per product.


def _gemm_flops(x_shape, x_scale_inv, w_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * w_shape[-2] * w_shape[-1]


def _wide_mm_flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def _gemm_wgrad_flops(dyt_shape, dyt_scale_inv, xt_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * dyt_shape[0] * xt_shape[0] * dyt_shape[1]


def _grouped_gemm_wgrad_flops(dyt_shape, dyt_scale_inv, xt_shape, xt_scale_inv, offs_shape, *args, **kwargs) -> int:
    rows = dyt_shape[1] - TILE * offs_shape[0]  # the real ones, rounded up to 128: see `padded_rows`
    return 2 * dyt_shape[0] * xt_shape[0] * rows


_X_W = "Tensor x_fp8, Tensor x_scale_inv, Tensor w_fp8, Tensor w_scale_inv"
_DY_W = _X_W.replace("x_", "dy_")
_WGRAD = "Tensor dyt_fp8, Tensor dyt_scale_inv, Tensor xt_fp8, Tensor xt_scale_inv"
_OUT = "ScalarType dtype) -> Tensor"

define(f"gemm({_X_W}, {_OUT}", _gemm, gemms.gemm_ref, "gemm", _gemm_flops)
define(f"gemm_keys({_X_W}, Tensor rope) -> Tensor", _gemm_keys, gemms.gemm_keys_ref, "keys", _gemm_flops)
define(f"gemm_dgrad({_DY_W}, {_OUT}", _gemm_dgrad, gemms.gemm_dgrad_ref, "gemm", _gemm_flops)
define(f"gemm_wgrad({_WGRAD}, {_OUT}", _gemm_wgrad, gemms.gemm_wgrad_ref, "wgrad", _gemm_wgrad_flops)
define(f"grouped_gemm({_X_W}, Tensor offs, {_OUT}", _grouped_gemm, gemms.grouped_gemm_ref, "grouped_gemm", _gemm_flops)
define(
    f"grouped_gemm_dgrad({_DY_W}, Tensor offs, {_OUT}",
    _grouped_gemm_dgrad,
    gemms.grouped_gemm_dgrad_ref,
    "grouped_gemm",
    _gemm_flops,
)
define(
    f"grouped_gemm_wgrad({_WGRAD}, Tensor offs, {_OUT}",
    _grouped_gemm_wgrad,
    gemms.grouped_gemm_wgrad_ref,
    "wgrad",
    _grouped_gemm_wgrad_flops,
)
define(
    "wide_mm(Tensor a, Tensor b, ScalarType dtype) -> Tensor",
    _wide_mm,
    gemms.wide_mm_ref,
    "wide_mm",
    _wide_mm_flops,
)
_INTO = "Tensor(a!) dw) -> ()"
define(
    f"gemm_wgrad_accumulate({_WGRAD}, {_INTO}",
    _gemm_wgrad_accumulate,
    gemms.gemm_wgrad_accumulate_ref,
    "wgrad",
    _gemm_wgrad_flops,
)
define(
    f"grouped_gemm_wgrad_accumulate({_WGRAD}, Tensor offs, {_INTO}",
    _grouped_gemm_wgrad_accumulate,
    gemms.grouped_gemm_wgrad_accumulate_ref,
    "wgrad",
    _grouped_gemm_wgrad_flops,
)
