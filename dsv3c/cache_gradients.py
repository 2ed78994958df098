"""Gradients through a cache: what a layer of transformers' put there, later tokens attend to, and their loss trains the
layer by it. Few ask for that, so units return entries without a gradient; where it is asked for they are computed
again, by the layer's own attention."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from dsv3c.errors import Dsv3cError


class NewEntries:
    """Stands in for a transformers Cache in one call of a layer: joins past and new, and keeps the new."""

    def __init__(self, past_latent: Tensor | None = None, past_rope: Tensor | None = None) -> None:
        self.past_latent, self.past_rope = past_latent, past_rope

    def update(self, latent: Tensor, rope: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        self.latent, self.rope = latent, rope
        if self.past_latent is None or self.past_rope is None:
            return latent, rope
        return torch.cat((self.past_latent, latent), 2), torch.cat((self.past_rope, rope), 2)


def differentiable(
    layer: Any, out: Tensor, latent: Tensor, rope: Tensor, x: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """latent [B, 1, T, L] and rope [B, 1, T, r], which `layer` made of x [B, T, D] beside `out`, with their gradients;
    until the backward of `out`, which frees x as it frees all that is saved."""
    inputs, node = [x, cos, sin], cast(Node, out.grad_fn)
    node.register_hook(lambda *_: inputs.clear())
    parameters = (*layer.input_layernorm.parameters(), *layer.self_attn.parameters())
    return _Entries.apply(layer, inputs, latent, rope, x, *parameters)


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer, inputs, latent, rope, x, *parameters) -> tuple[Tensor, Tensor]:
        ctx.layer, ctx.inputs = layer, inputs
        ctx.save_for_backward(*parameters)
        return latent.detach(), rope.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_latent: Tensor, d_rope: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.inputs:
            raise Dsv3cError(
                "the backward through a cache: expected it with or before that of the call that filled it, found "
                "it after; try one backward of both losses"
            )
        (x, cos, sin), parameters = ctx.inputs, ctx.saved_tensors
        entries = NewEntries()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            normed = ctx.layer.input_layernorm(x)
            ctx.layer.self_attn(
                hidden_states=normed, position_embeddings=(cos, sin), attention_mask=None, past_key_values=entries
            )
        wanted = [t if need else None for t, need in zip((x, *parameters), ctx.needs_input_grad[4:], strict=True)]
        found = iter(
            torch.autograd.grad(
                (entries.latent, entries.rope), [t for t in wanted if t is not None], (d_latent, d_rope),
                allow_unused=True,
            )
        )  # fmt: skip
        return None, None, None, None, *[t if t is None else next(found) for t in wanted]
