"""How a family of models meets the compiler: which modules are compiled, and how one is called with tensors alone.

A compiled unit is a decoder layer, the rotary angles, the final norm or the head, as a function of its parameters and
of tensors: no Cache object, no layer index. A `Call` says how to get there from the module's own signature and back.
Two families: ours, and transformers' unmodified DeepseekV3.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dsv3c.cache import Pages
from dsv3c.cache_gradients import NewEntries, differentiable
from dsv3c.embedding import embedding_forward, is_plain
from dsv3c.errors import CompileError
from dsv3c.twin import give_forward, has_ours, unchanged

Outputs = Tensor | tuple[Tensor, ...]
RunUnit = Callable[..., Outputs]


class Call(Protocol):
    """The tensor-only call of one class of modules."""

    symbolic: tuple[tuple[int, ...], ...]  # for each argument, the dimensions whose sizes vary between calls

    def trace(self, call: Callable[..., Outputs], *tensors: Tensor | None) -> Outputs:
        """What is captured: `call` is the module's own forward, its parameters already in place."""

    def forward(self, module: nn.Module, run: RunUnit) -> Callable[..., Outputs]:
        """A forward with the module's own signature that computes with `run(*tensors)`."""


class OurLayer:
    """DecoderLayer.forward(x_BTD, cos_BTr, sin_BTr, mask_B1TS, past_BPL); of a past in pages its three tensors follow,
    latents, table and lengths."""

    symbolic = ((0, 1), (0, 1), (0, 1), (0, 2, 3), (0, 1), (0,), (0, 1), (0,))

    def trace(self, call, x_BTD, cos_BTr, sin_BTr, mask, past, *pages):
        return _wanted(call(x_BTD, cos_BTr, sin_BTr, mask, past if pages[0] is None else Pages(*pages)))

    def forward(self, layer, run):
        def forward(x_BTD, cos_BTr, sin_BTr, mask=None, past=None):
            if isinstance(past, Pages):
                return run(x_BTD, cos_BTr, sin_BTr, mask, None, *past)
            return run(x_BTD, cos_BTr, sin_BTr, mask, past, None, None, None)

        return forward


def _wanted(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The routing is for training."""
    return results if torch.is_grad_enabled() else results[:2]


class OurMTPLayer:
    """MTPLayer.forward(x_BTD, next_BTD, cos_BTr, sin_BTr, mask_B1TS, pages): as a layer, the next tokens last."""

    symbolic = (*OurLayer.symbolic, (0, 1))

    def trace(self, call, x_BTD, cos_BTr, sin_BTr, mask, past, latents, table, lengths, next_BTD):
        pages = None if latents is None else Pages(latents, table, lengths)
        return _wanted(call(x_BTD, next_BTD, cos_BTr, sin_BTr, mask, pages))

    def forward(self, layer, run):
        def forward(x_BTD, next_BTD, cos_BTr, sin_BTr, mask=None, pages=None):
            return run(x_BTD, cos_BTr, sin_BTr, mask, None, *(pages or (None, None, None)), next_BTD)

        return forward


class TransformersLayer:
    """DeepseekV3DecoderLayer, whose attention updates a Cache: captured with a stand-in that keeps the new entries.

    The tensors: x [B, T, D], cos and sin [1 or B, T, r], mask [B, 1, T, S], and the layer's cached latents
    [B, 1, P, kv_lora] and roped keys [B, 1, P, rope].
    """

    symbolic = ((0, 1), (0, 1), (0, 1), (0, 2, 3), (0, 2), (0, 2))

    def trace(self, call, x, cos, sin, mask, past_latent, past_rope):
        cache = NewEntries(past_latent, past_rope)
        x = call(x, attention_mask=mask, past_key_values=cache, position_embeddings=(cos, sin))
        return x, cache.latent.detach(), cache.rope.detach()

    def forward(self, layer, run):
        eager = type(layer).forward
        index = layer.self_attn.layer_idx

        def forward(
            hidden_states,
            attention_mask=None,
            position_ids=None,
            past_key_values=None,
            use_cache=False,
            position_embeddings=None,
            **kwargs,
        ):
            attention_mask = None if _is_causal(attention_mask) else attention_mask
            past = _past_of(past_key_values, index)
            if (
                past is None
                or any(value is not None and value is not False for value in kwargs.values())
                or any(x is not None and x.requires_grad for x in (attention_mask, *position_embeddings))
            ):
                # A cache that is not a plain growing one, arguments of other attention kernels, or a mask or angles
                # that are learned: transformers' own code.
                return eager(
                    layer, hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings,
                    **kwargs,
                )  # fmt: skip
            mask = attention_mask.contiguous() if attention_mask is not None else None
            out, latent, rope = run(hidden_states, *position_embeddings, mask, *past)
            if past_key_values is not None:
                if out.requires_grad:
                    latent, rope = differentiable(layer, out, latent, rope, hidden_states, *position_embeddings)
                past_key_values.update(latent, rope, index)
            return out

        return forward


_CAUSAL = torch.empty(0, 0, 0, 0, dtype=torch.bool)  # the mask that says: no mask


def _is_causal(mask: Tensor | None) -> bool:
    return mask is not None and mask.shape == _CAUSAL.shape  # not the object: hooks may have moved it


def adapt(model: nn.Module) -> None:
    """New forwards for what is around the compiled modules, unless somebody else has done that."""
    body = getattr(model, "model", None)
    embedding = getattr(body, "embed_tokens", None)
    if is_plain(embedding) and "forward" not in vars(embedding):
        give_forward(embedding, embedding_forward(embedding))
    if type(body).__name__ == "DeepseekV3Model" and "forward" not in vars(body):
        give_forward(body, _body_forward(body))


def _body_forward(body: nn.Module) -> Callable:
    """Called with tokens alone, DeepseekV3Model waits for the GPU: are the positions that it has just counted up those
    of several packed sequences? A mask of four dimensions it takes for a finished one, and hands it to the layers;
    positions that it is given it does not count, which takes it longer. The caller's own mask may be a finished one,
    and causal; attention is faster if it knows."""
    eager, written_out = type(body).forward, _WrittenOut()

    def forward(*args, **kwargs):
        given = [*args[1:], *map(kwargs.get, ("attention_mask", "position_ids", "past_key_values"))]
        compiled = body.config._attn_implementation == "sdpa" and all(map(has_ours, body.layers))
        inputs = (*args[:1], *map(kwargs.get, ("input_ids", "inputs_embeds")))
        tokens = next((x for x in inputs if x is not None), None) if compiled else None
        if tokens is None:
            return eager(body, *args, **kwargs)
        if all(value is None for value in given):
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            kwargs |= {"attention_mask": _CAUSAL, "position_ids": positions}
            args = args[:1]
        elif (
            (mask := kwargs.get("attention_mask")) is not None
            and kwargs.get("past_key_values") is None
            and written_out(mask, *tokens.shape[:2])
        ):
            kwargs["attention_mask"] = _CAUSAL
        return eager(body, *args, **kwargs)

    return forward


class _WrittenOut:
    """Whether a mask is bool [1 or B, 1, T, T] and causal. To ask is to wait for the GPU, so that each tensor is asked
    once, and none after one that is not. A change that torch does not count (through `.data`, or memory shared with
    numpy) goes unnoticed."""

    def __init__(self) -> None:
        self.asked = WeakTensorKeyDictionary()  # version and answer
        self.asks = True

    @torch._dynamo.disable
    def __call__(self, mask: Tensor, batch: int, tokens: int) -> bool:
        if mask.dtype != torch.bool or mask.shape not in ((1, 1, tokens, tokens), (batch, 1, tokens, tokens)):
            return False
        if type(mask) is not Tensor or mask.device.type not in ("cpu", "cuda") or mask.is_inference():
            return False  # nothing to read; no version
        version, answer = self.asked.get(mask, (None, False))
        if version == mask._version:
            return answer
        if not self.asks or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
        self.asks = answer = bool((mask == mask.new_ones(tokens, tokens).tril()).all())
        self.asked[mask] = mask._version, answer
        return answer


class RowWise:
    """The final norm, the head and a MoE alone, on x [B, T, D]; on x of other dimensions eager."""

    symbolic = ((0, 1),)

    def trace(self, call, x):
        return call(x)

    def forward(self, module, run):
        eager = type(module).forward

        def forward(x):
            return run(_no_view(x)) if x.dim() == 3 else eager(module, x)

        return forward


class Angles:
    """The rotary angles of x [B, T, D], whose dtype alone counts, at position_ids [B, T]."""

    symbolic = ((0, 1), (0, 1))

    def trace(self, call, x, position_ids):
        return call(x, position_ids)

    def forward(self, module, run):
        def forward(x, position_ids):
            return run(x, _no_view(position_ids))

        return forward


def _no_view(x: Tensor) -> Tensor:
    """x, or all of what it is a view of in the same shape, or a copy: of a view, such as the last tokens alone, Dynamo
    guards the sizes of what it is a view of. Gradients go where x's go, through hooks that are views too."""
    base = x._base
    if base is None:
        return x
    plain = x.dtype == base.dtype and not (torch.is_grad_enabled() and (x.requires_grad or base.requires_grad))
    if plain and (base.shape, base.stride()) == (x.shape, x.stride()):
        return base
    if base.numel() == x.numel() and x.is_contiguous():
        return torch.ops.aten._unsafe_view.default(x, x.shape)  # the same memory, and no view to autograd
    return x.clone(memory_format=torch.contiguous_format)


def _past_of(cache, index: int) -> tuple[Tensor | None, Tensor | None] | None:
    """The layer's entries in a DynamicCache, (None, None) if there are none; None for other kinds of cache."""
    if cache is None:
        return None, None
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    if index >= len(layers) or not layers[index].is_initialized:
        return (None, None) if type(cache).__name__ == "DynamicCache" else None
    entry = layers[index]
    if type(entry).__name__ != "DynamicLayer":
        return None
    return (entry.keys, entry.values) if entry.keys.numel() else (None, None)


LAYERS: dict[str, Call] = {
    "DecoderLayer": OurLayer(),
    "MTPLayer": OurMTPLayer(),
    "DeepseekV3DecoderLayer": TransformersLayer(),
}

# The other compiled modules: where both families have them, and by class what their units are called, and how. A MoE
# is one where it is all there is; in a layer it is the layer's.
ALONE = ("MoE", "DeepseekV3MoE")
PATHS = ("model.rotary_emb", "model.norm", "lm_head")
OTHERS: dict[str, tuple[str, Call]] = {
    "MoE": ("moe", RowWise()),
    "DeepseekV3MoE": ("moe", RowWise()),
    "Rotary": ("rotary", Angles()),
    "RMSNorm": ("final_norm", RowWise()),
    "Linear": ("head", RowWise()),
    "DeepseekV3RotaryEmbedding": ("rotary", Angles()),
    "DeepseekV3RMSNorm": ("final_norm", RowWise()),
}


def call_of(module: nn.Module) -> Call:
    name = type(module).__name__
    return LAYERS[name] if name in LAYERS else OTHERS[name][1]


def forward_of(module: nn.Module, run: RunUnit, eagerly: Callable[[], None]) -> Callable[..., Outputs]:
    """A forward for `module` that computes with `run`; or, which it says by calling `eagerly`, with the module's own
    where a part of it has changed since."""
    compiled, eager, is_unchanged = call_of(module).forward(module, run), type(module).forward, unchanged(module)

    def forward(*args, **kwargs):
        if is_unchanged():
            return compiled(*args, **kwargs)
        eagerly()
        if _is_causal(kwargs.get("attention_mask")):
            kwargs["attention_mask"] = None
        return eager(module, *args, **kwargs)

    return forward


def check(model: nn.Module) -> None:
    """Raises CompileError for a model that is of neither family, or is set up in a way that cannot be captured
    whole."""
    if not any(True for _ in layers(model)):
        raise CompileError(
            f"dsv3c.compile: expected a dsv3c.DeepseekV3, transformers' DeepseekV3ForCausalLM, or a MoE of one, found "
            f"{type(model).__module__}.{type(model).__name__}; try dsv3c.load(checkpoint)"
        )
    config = getattr(model, "config", None)
    experts = getattr(config, "_experts_implementation", None)
    if experts not in (None, "grouped_mm", "batched_mm"):
        raise CompileError(
            f"config.experts_implementation: expected one that is captured whole, found {experts!r}; "
            f"try model.set_experts_implementation('grouped_mm')"
        )
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "sdpa", "eager"):
        raise CompileError(
            f"config.attn_implementation: expected 'sdpa' or 'eager', found {attention!r}; "
            f"try model.set_attn_implementation('sdpa')"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise CompileError(
            f"config.attention_dropout: expected 0, found {config.attention_dropout}; try 0, as DeepSeek-V3 is trained"
        )


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The decoder layers, by path; or the model, if that is a MoE alone."""
    for path, module in model.named_modules():
        name = type(module).__name__
        if name in LAYERS or (not path and name in ALONE):
            yield path, module


def compiled_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that become units, by path: the layers, rotary angles, final norm and head, where they are those."""
    yield from layers(model)
    modules = dict(model.named_modules())
    yield from ((path, modules[path]) for path in PATHS if type(modules.get(path)).__name__ in OTHERS)
