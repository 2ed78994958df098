"""`dsv3c::attention` (kernels/attention.py computes) and the gradients of what is raised from the captured graph with
it: operators of later levels have none."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import dsv3c.operators  # noqa: F401  (defines dsv3c::rotate_heads)
from dsv3c.kernels import attention as kernel

_LIBRARY = torch.library.Library("dsv3c", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, float scale, "
    "bool is_causal, bool deterministic=False) -> (Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("attention", kernel.attention, _device)
    _LIBRARY.impl("attention_backward", kernel.attention_backward, _device)


def _heads_inside(x: Tensor, B, H, T, size) -> Tensor:
    """An empty [B, H, T, size] laid out as [B, T, H, size]."""
    return x.new_empty((B, T, H, size)).transpose(1, 2)


def _under_autocast(device: str) -> Callable:
    """As torch casts what it calls this for."""

    def attention(q, k, v, mask, scale, is_causal):
        def cast(x: Tensor | None) -> Tensor | None:
            narrows = x is not None and x.is_floating_point() and x.dtype != torch.float64
            return x.to(torch.get_autocast_dtype(device)) if narrows else x

        q, k, v, mask = map(cast, (q, k, v, mask))
        with torch.autocast(device, enabled=False):
            return torch.ops.dsv3c.attention(q, k, v, mask, scale, is_causal)

    return attention


_LIBRARY.impl("attention", _under_autocast("cpu"), "AutocastCPU")
_LIBRARY.impl("attention", _under_autocast("cuda"), "AutocastCUDA")


@torch.library.register_fake("dsv3c::attention")
def _(q, k, v, mask, scale, is_causal):
    B, H, T, _ = q.shape
    return _heads_inside(q, B, H, T, v.shape[-1]), q.new_empty((B, H, T), dtype=torch.float32)


@torch.library.register_fake("dsv3c::attention_backward")
def _(dout, q, k, v, out, lse, mask, scale, is_causal, deterministic=False):
    return tuple(_heads_inside(x, *x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, mask, scale, is_causal = inputs
    ctx.save_for_backward(q, k, v, *output, *(() if mask is None else (mask,)))
    ctx.scale, ctx.is_causal = scale, is_causal
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, dlse):
    q, k, v, out, lse, *mask = ctx.saved_tensors
    dq, dk, dv = torch.ops.dsv3c.attention_backward(
        dout, q, k, v, out, lse, mask[0] if mask else None, ctx.scale, ctx.is_causal
    )
    return dq, dk, dv, None, None, None


torch.library.register_autograd("dsv3c::attention", _backward, setup_context=_setup_context)


def _rotate_setup_context(ctx, inputs, output) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx, dout):
    """A rotation's transpose is its inverse, but for the factor in cos and sin, which stays."""
    return torch.ops.dsv3c.rotate_heads(dout, *ctx.saved_tensors, not ctx.inverse), None, None, None


torch.library.register_autograd("dsv3c::rotate_heads", _rotate_backward, setup_context=_rotate_setup_context)


@register_flop_formula(torch.ops.dsv3c.attention)
def _(q_shape, k_shape, v_shape, mask, scale, is_causal, *args, out_shape=None, **kwargs) -> int:
    B, H, T, d = q_shape
    S, v = k_shape[2], v_shape[3]
    return 2 * B * H * T * S * (d + v) // (2 if is_causal else 1)


@register_flop_formula(torch.ops.dsv3c.attention_backward)
def _(
    dout_shape, q_shape, k_shape, v_shape, o_shape, lse_shape, mask, scale, is_causal, *args, out_shape=None, **kwargs
) -> int:
    B, H, T, d = q_shape
    S, v = k_shape[2], v_shape[3]
    return 2 * B * H * T * S * (3 * d + 2 * v) // (2 if is_causal else 1)
