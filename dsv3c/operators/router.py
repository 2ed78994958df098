"""The gate behind its product, and the sort by expert. What each means: `kernels/reference/router.py`."""

import torch

from dsv3c.kernels.reference import router
from dsv3c.operators.define import OperatorError, check_rank, define, expect


def _check_logits(logits_TE) -> None:
    check_rank("logits", logits_TE, 2)
    expect("dtype of logits", logits_TE.dtype, torch.float32)


def _check_between(name, least, found, most) -> None:
    if not least <= found <= most:
        raise OperatorError(f"{name}: expected {least} to {most}, found {found}; try a ModelConfig's")


def _gate(logits_TE, bias_E, n_group, topk_group, top_k, norm_topk_prob, routed_scaling_factor):
    _check_logits(logits_TE)
    T, E = logits_TE.shape
    if bias_E is not None:
        expect("dtype and shape of bias", (bias_E.dtype, tuple(bias_E.shape)), (torch.float32, (E,)))
    _check_between("n_group", 1, n_group, E)
    expect("E modulo n_group", E % n_group, 0)
    _check_between("experts a group", 2 if n_group > 1 and bias_E is not None else 1, E // n_group, E)
    _check_between("topk_group", 1, topk_group, n_group)
    _check_between("top_k", 1, top_k, E)
    return logits_TE.new_empty((T, top_k)), logits_TE.new_empty((T, top_k), dtype=torch.int32)


def _gate_backward(dtopk_weights_TK, logits_TE, topk_idx_TK, is_softmax, norm_topk_prob, routed_scaling_factor):
    _check_logits(logits_TE)
    expect("dtype of dtopk_weights", dtopk_weights_TK.dtype, torch.float32)
    check_rank("topk_idx", topk_idx_TK, 2)
    expect("dtype of topk_idx", topk_idx_TK.dtype, torch.int32)
    expect("shape of dtopk_weights", tuple(dtopk_weights_TK.shape), tuple(topk_idx_TK.shape))
    expect("rows of topk_idx", topk_idx_TK.shape[0], logits_TE.shape[0])
    return logits_TE.new_empty(logits_TE.shape)


def _sort_by_expert(topk_idx_TK, num_experts):
    check_rank("topk_idx", topk_idx_TK, 2)
    expect("dtype of topk_idx", topk_idx_TK.dtype, torch.int32)
    expect("whether there are experts", num_experts > 0, True)
    T, K = topk_idx_TK.shape
    return tuple(topk_idx_TK.new_empty(shape) for shape in ((num_experts,), (num_experts,), (T * K,), (T, K)))


_FORMULA = "bool norm_topk_prob, float routed_scaling_factor"

define(
    f"gate(Tensor logits, Tensor? bias, int n_group, int topk_group, int top_k, {_FORMULA}) -> (Tensor, Tensor)",
    _gate,
    router.gate_ref,
    "router",
)
define(
    f"gate_backward(Tensor dtopk_weights, Tensor logits, Tensor topk_idx, bool is_softmax, {_FORMULA}) -> Tensor",
    _gate_backward,
    router.gate_backward_ref,
    "router",
)
define(
    "sort_by_expert(Tensor topk_idx, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)",
    _sort_by_expert,
    router.sort_by_expert_ref,
    "router",
)
