"""The embedding's gradient. R tokens, V tokens of the vocabulary, H features."""

import torch
from torch import Tensor


def embedding_backward_ref(dy_RH: Tensor, input_ids_R: Tensor, vocab_size: int) -> Tensor:
    """dweight [V, H] of dy's dtype: row v is the sum of the dy of all tokens that are v, in their order, in float32 and
    rounded once; zeros if there are none. Tokens outside the vocabulary, which forward refuses, count nowhere."""
    dweight_VH = torch.zeros(vocab_size, dy_RH.shape[1], device=dy_RH.device)
    inside_R = (input_ids_R >= 0) & (input_ids_R < vocab_size)
    return dweight_VH.index_add_(0, input_ids_R[inside_R], dy_RH[inside_R].float()).to(dy_RH.dtype)
