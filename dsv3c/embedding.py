"""The embedding of a compiled model: torch's, with a gradient of our own (`kernels/embedding.py`)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import dsv3c.operators  # noqa: F401  (defines torch.ops.dsv3c)

SUMMED_IN_FLOAT32 = (torch.bfloat16, torch.float16, torch.float32)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight_VH: Tensor) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.vocab_size = len(weight_VH)
        return F.embedding(input_ids, weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (input_ids,) = ctx.saved_tensors
        dy_RH = dy.reshape(-1, dy.shape[-1])
        return None, torch.ops.dsv3c.embedding_backward(dy_RH, input_ids.flatten(), ctx.vocab_size)


def embedding_forward(embedding: nn.Embedding) -> Callable[[Tensor], Tensor]:
    """A forward for `embedding`, of the weight that it has at the time of the call."""

    def forward(input_ids: Tensor) -> Tensor:
        weight = embedding.weight
        ours = torch.is_grad_enabled() and weight.requires_grad and type(weight) is nn.Parameter
        if ours and weight.dtype in SUMMED_IN_FLOAT32 and input_ids.dtype == torch.int64:
            return _Embedding.apply(input_ids, weight)
        return F.embedding(input_ids, weight)

    return forward


def is_plain(module: nn.Module | None) -> bool:
    """Whether nothing but rows is asked of it: no limit of their norm, no padding, no sparse or scaled gradient."""
    return type(module) is nn.Embedding and (
        module.padding_idx is None and module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    )
