"""RMSNorm, fused with what stands around it. What each means: `kernels/reference/norm.py`."""

import torch

from dsv3c.kernels.reference import norm
from dsv3c.numerics import TILE
from dsv3c.operators.define import OperatorError, check_floor, check_rank, define, empty_tiles, expect

MOST_COLUMNS = 16384  # of `rms_norm_backward`, whose rows must fit into shared memory twice


def check_norm(x_RK, weight_K) -> None:
    check_rank("x", x_RK, 2)
    expect("dtype of x", x_RK.dtype, torch.bfloat16)
    expect("dtype of weight", weight_K.dtype, torch.bfloat16)
    expect("shape of weight", tuple(weight_K.shape), (x_RK.shape[1],))
    if x_RK.shape[1] % TILE:
        raise OperatorError(f"columns of x: expected a multiple of {TILE}, found {x_RK.shape[1]}; try rms_norm")


def _rms_norm_quantize(x_RK, weight_K, eps, amax_floor, pow2):
    check_norm(x_RK, weight_K)
    check_floor(amax_floor)
    return *empty_tiles(x_RK, *x_RK.shape), x_RK.new_empty(x_RK.shape[0], dtype=torch.float32)


def _add_rms_norm_quantize(x_RK, residual_RK, weight_K, eps, amax_floor, pow2, normed):
    expect("dtype of residual", residual_RK.dtype, x_RK.dtype)
    expect("shape of residual", tuple(residual_RK.shape), tuple(x_RK.shape))
    quantized = _rms_norm_quantize(x_RK, weight_K, eps, amax_floor, pow2)
    R, K = x_RK.shape
    return x_RK.new_empty(R, K), x_RK.new_empty(R if normed else 0, K), *quantized


def _rms_norm_backward(dy_RK, x_RK, weight_K, rstd_R, dsum_RK):
    check_norm(x_RK, weight_K)
    if x_RK.shape[1] > MOST_COLUMNS:
        raise OperatorError(f"columns of x: expected at most {MOST_COLUMNS}, found {x_RK.shape[1]}; try rms_norm")
    for name, gradient in (("dy", dy_RK), ("dsum", dsum_RK)):
        if gradient is not None:
            expect(f"dtype of {name}", gradient.dtype, x_RK.dtype)
            expect(f"shape of {name}", tuple(gradient.shape), tuple(x_RK.shape))
    expect("dtype of rstd", rstd_R.dtype, torch.float32)
    expect("shape of rstd", tuple(rstd_R.shape), tuple(x_RK.shape[:1]))
    return x_RK.new_empty(x_RK.shape), x_RK.new_empty(x_RK.shape[1], dtype=torch.float32)


_NORM = "Tensor weight, float eps, float amax_floor, bool pow2"

define(f"rms_norm_quantize(Tensor x, {_NORM}) -> (Tensor, Tensor, Tensor)",
       _rms_norm_quantize, norm.rms_norm_quantize_ref, "norm")  # fmt: skip
define(f"add_rms_norm_quantize(Tensor x, Tensor residual, {_NORM}, bool normed) -> (Tensor, Tensor, Tensor, Tensor, "
       "Tensor)", _add_rms_norm_quantize, norm.add_rms_norm_quantize_ref, "norm")  # fmt: skip
define("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? dsum) -> (Tensor, Tensor)",
       _rms_norm_backward, norm.rms_norm_backward_ref, "norm_backward")  # fmt: skip
