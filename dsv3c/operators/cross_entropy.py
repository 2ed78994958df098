"""The head and its loss, without the logits. What each means: `kernels/reference/cross_entropy.py`."""

import torch

from dsv3c.kernels.reference import cross_entropy
from dsv3c.operators.define import OperatorError, check_rank, define, expect


def _check_labels(R, labels_R) -> None:
    expect("dtype of labels", labels_R.dtype, torch.int64)
    expect("shape of labels", tuple(labels_R.shape), (R,))


def _cross_entropy_(logits_RV, labels_R, scale):
    check_rank("logits", logits_RV, 2)
    expect("dtype of logits", logits_RV.dtype, torch.bfloat16)
    expect("strides of logits", logits_RV.stride(), (logits_RV.shape[1], 1))
    _check_labels(logits_RV.shape[0], labels_R)
    expect("dtype of scale", scale.dtype, torch.float32)
    expect("numbers in scale", scale.numel(), 1)
    return logits_RV.new_empty(logits_RV.shape[0], dtype=torch.float32)


def _linear_cross_entropy(x_RK, weight_VK, labels_R, chunk):
    check_rank("x", x_RK, 2)
    check_rank("weight", weight_VK, 2)
    expect("dtype of x", x_RK.dtype, torch.bfloat16)
    expect("dtype of weight", weight_VK.dtype, torch.bfloat16)
    expect("columns of weight", weight_VK.shape[1], x_RK.shape[1])
    _check_labels(x_RK.shape[0], labels_R)
    if chunk < 1:
        raise OperatorError(f"chunk: expected at least 1 row, found {chunk}; try 4096")
    loss = x_RK.new_empty((), dtype=torch.float32)
    return loss, x_RK.new_empty(x_RK.shape), weight_VK.new_empty(weight_VK.shape)


def _scale_(x, scale) -> None:
    expect("contiguous x", x.is_contiguous(), True)
    expect("dtype of scale", scale.dtype, torch.float32)
    expect("numbers in scale", scale.numel(), 1)


define("scale_(Tensor(a!) x, Tensor scale) -> ()", _scale_, cross_entropy.scale_ref, "cross_entropy")
define(
    "cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor scale) -> Tensor",
    _cross_entropy_,
    cross_entropy.cross_entropy_ref,
    "cross_entropy",
)
define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, int chunk) -> (Tensor, Tensor, Tensor)",
    _linear_cross_entropy,
    cross_entropy.linear_cross_entropy_ref,
    "cross_entropy",
    lambda x_shape, weight_shape, *args, **kwargs: 6 * x_shape[0] * weight_shape[0] * weight_shape[1],
)
