"""Rows to their experts and back. What each means: `kernels/reference/permute.py`."""

import torch

from dsv3c.kernels.reference import permute
from dsv3c.kernels.reference.casts import padded_rows
from dsv3c.operators.define import (
    check_floor,
    check_rank,
    check_tiles,
    count_groups,
    define,
    empty_tiles,
    expect,
)


def _check_inverse(inverse_TK, rows) -> None:
    check_rank("inverse", inverse_TK, 2)
    expect("dtype of inverse", inverse_TK.dtype, torch.int32)
    T, K = inverse_TK.shape
    expect("numbers in inverse", T * K, rows)


def _check_permutation(permutation_R, rows) -> None:
    expect("dtype of permutation", permutation_R.dtype, torch.int32)
    expect("shape of permutation", tuple(permutation_R.shape), (rows,))


def _check_weights(topk_weights_TK, inverse_TK) -> None:
    expect("dtype of topk_weights", topk_weights_TK.dtype, torch.float32)
    expect("shape of topk_weights", tuple(topk_weights_TK.shape), tuple(inverse_TK.shape))


def _permute(x_fp8_TH, x_scale_inv, permutation_R, inverse_TK):
    check_tiles("x", x_fp8_TH, x_scale_inv)
    T, H = x_fp8_TH.shape
    expect("rows of inverse", inverse_TK.shape[0], T)
    _check_inverse(inverse_TK, permutation_R.shape[0])
    _check_permutation(permutation_R, permutation_R.shape[0])
    return empty_tiles(x_fp8_TH, permutation_R.shape[0], H)


def _permute_requantize_t(x_fp8_TH, x_scale_inv, permutation_R, inverse_TK, offs, amax_floor, pow2):
    check_floor(amax_floor)
    R, H = _permute(x_fp8_TH, x_scale_inv, permutation_R, inverse_TK)[0].shape
    return empty_tiles(x_fp8_TH, H, padded_rows(R, count_groups(offs)))


def _unpermute(y_RH, inverse_TK, topk_weights_TK, added_TH, residual_TH):
    check_rank("y", y_RH, 2)
    R, H = y_RH.shape
    _check_inverse(inverse_TK, R)
    if topk_weights_TK is not None:
        _check_weights(topk_weights_TK, inverse_TK)
    shape = (inverse_TK.shape[0], H)
    for name, x in (("added", added_TH), ("residual", residual_TH)):
        if x is not None:
            expect(f"dtype and shape of {name}", (x.dtype, tuple(x.shape)), (y_RH.dtype, shape))
    return y_RH.new_empty(shape)


def _unpermute_backward(dout_TH, y_RH, inverse_TK, topk_weights_TK):
    check_rank("y", y_RH, 2)
    R, H = y_RH.shape
    _check_inverse(inverse_TK, R)
    _check_weights(topk_weights_TK, inverse_TK)
    expect("dtype and shape of dout", (dout_TH.dtype, tuple(dout_TH.shape)), (y_RH.dtype, (inverse_TK.shape[0], H)))
    return y_RH.new_empty(y_RH.shape), topk_weights_TK.new_empty(topk_weights_TK.shape)


define(
    "permute(Tensor x_fp8, Tensor x_scale_inv, Tensor permutation, Tensor inverse) -> (Tensor, Tensor)",
    _permute,
    permute.permute_ref,
    "permute",
)
define(
    "permute_requantize_t(Tensor x_fp8, Tensor x_scale_inv, Tensor permutation, Tensor inverse, Tensor offs, "
    "float amax_floor, bool pow2) -> (Tensor, Tensor)",
    _permute_requantize_t,
    permute.permute_requantize_t_ref,
    "requantize",
)
define(
    "unpermute(Tensor y, Tensor inverse, Tensor? topk_weights, Tensor? added, Tensor? residual) -> Tensor",
    _unpermute,
    permute.unpermute_ref,
    "permute",
)
define(
    "unpermute_backward(Tensor dout, Tensor y, Tensor inverse, Tensor topk_weights) -> (Tensor, Tensor)",
    _unpermute_backward,
    permute.unpermute_backward_ref,
    "permute",
)
