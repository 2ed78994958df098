"""SwiGLU fused with the casts around it. What each means: `kernels/reference/swiglu.py`."""

import torch

from dsv3c.kernels.reference import swiglu
from dsv3c.kernels.reference.casts import padded_rows
from dsv3c.numerics import TILE
from dsv3c.operators.define import (
    OperatorError,
    check_floor,
    check_rank,
    check_tiles,
    count_groups,
    define,
    empty_tiles,
    expect,
)


def _check(name, h_RN, weight_R) -> None:
    R, N = h_RN.shape
    if N % (2 * TILE):
        raise OperatorError(f"columns of {name}: expected a multiple of {2 * TILE}, found {N}; try silu and a product")
    if weight_R is not None:
        expect("dtype of weight", weight_R.dtype, torch.float32)
        expect("shape of weight", tuple(weight_R.shape), (R,))


def _swiglu_quantize(h_RN, weight_R, amax_floor, pow2):
    check_rank("h", h_RN, 2)
    expect("dtype of h", h_RN.dtype, torch.bfloat16)
    _check("h", h_RN, weight_R)
    check_floor(amax_floor)
    R, N = h_RN.shape
    return empty_tiles(h_RN, R, N // 2)


def _swiglu_quantize_save(h_RN, weight_R, amax_floor, pow2):
    return *_swiglu_quantize(h_RN, weight_R, amax_floor, pow2), *empty_tiles(h_RN, *h_RN.shape)


def _swiglu_quantize_backward(h_fp8_RN, h_scale_inv, da_RI, weight_R, offs, amax_floor, gradient_amax_floor, pow2):
    check_tiles("h", h_fp8_RN, h_scale_inv)
    _check("h", h_fp8_RN, weight_R)
    R, N = h_fp8_RN.shape
    expect("dtype of da", da_RI.dtype, torch.bfloat16)
    expect("shape of da", tuple(da_RI.shape), (R, N // 2))
    check_floor(amax_floor)
    check_floor(gradient_amax_floor)
    P = padded_rows(R, None if offs is None else count_groups(offs))
    return (
        *empty_tiles(h_fp8_RN, R, N),
        *empty_tiles(h_fp8_RN, N, P),
        *empty_tiles(h_fp8_RN, N // 2, P),
        h_fp8_RN.new_empty(0 if weight_R is None else R, dtype=torch.float32),
    )


define(
    "swiglu_quantize(Tensor h, Tensor? weight, float amax_floor, bool pow2) -> (Tensor, Tensor)",
    _swiglu_quantize,
    swiglu.swiglu_quantize_ref,
    "swiglu",
)
define(
    "swiglu_quantize_save(Tensor h, Tensor? weight, float amax_floor, bool pow2) -> (Tensor, Tensor, Tensor, Tensor)",
    _swiglu_quantize_save,
    swiglu.swiglu_quantize_save_ref,
    "swiglu",
)
define(
    "swiglu_quantize_backward(Tensor h_fp8, Tensor h_scale_inv, Tensor da, Tensor? weight, Tensor? offs, "
    "float amax_floor, float gradient_amax_floor, bool pow2) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _swiglu_quantize_backward,
    swiglu.swiglu_quantize_backward_ref,
    "swiglu_backward",
)
