"""The embedding's gradient. What it means: `kernels/reference/embedding.py`."""

import torch

from dsv3c.kernels.reference import embedding
from dsv3c.operators.define import check_rank, check_wide, define, expect


def _embedding_backward(dy_RH, input_ids_R, vocab_size):
    check_rank("dy", dy_RH, 2)
    check_wide("dy", dy_RH.dtype)
    expect("dtype of input_ids", input_ids_R.dtype, torch.int64)
    expect("shape of input_ids", tuple(input_ids_R.shape), (dy_RH.shape[0],))
    return dy_RH.new_empty((vocab_size, dy_RH.shape[1]))


define(
    "embedding_backward(Tensor dy, Tensor input_ids, SymInt vocab_size) -> Tensor",
    _embedding_backward,
    embedding.embedding_backward_ref,
    "embedding",
)
