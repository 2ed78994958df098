"""DeepSeek-V3, eager: the specification that everything else in dsv3c is compared with. Its layers are in layers.py.

Shape suffixes: B sequences, T new tokens, S all tokens (cached and new), D hidden, V vocabulary, H heads, d head dim,
r rotary pairs (half of qk_rope_head_dim), L latent (kv_lora_rank + qk_rope_head_dim), N = B * T tokens, E experts,
K experts per token, R = N * K routed rows, I expert width.

Parameter names are the checkpoint's, except the experts', which are stacked: `mlp.experts.gate_up_proj` [E, 2I, D]
(gate rows first) and `mlp.experts.down_proj` [E, D, I]. Numerics follow transformers' DeepseekV3: router, rotary angles
and norms in float32 (in float64 if the model is), norms cast down before the weight, two latent norms at eps 1e-6
whatever the config says. No distributed code, no FP8, nothing data-dependent: the whole model traces as one graph.
Sources: DeepSeek-V3 report (arXiv 2412.19437) §2; transformers models/deepseek_v3; deepseek-ai/DeepSeek-V3 inference/.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from dsv3c.cache import LatentCache, PagedCache, positions
from dsv3c.config import ModelConfig
from dsv3c.errors import ConfigError, Dsv3cError
from dsv3c.layers import DecoderLayer, MTPLayer, RMSNorm, Rotary


class Decoder(nn.Module):
    """Embedding, layers (the MTP layer last, which the main model does not run) and final norm."""

    def __init__(self, config: ModelConfig, *, mtp: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        kinds = [DecoderLayer] * config.num_hidden_layers + [MTPLayer] * mtp
        self.layers = nn.ModuleList(kind(config, moe=moe) for kind, moe in zip(kinds, config.moe_layers, strict=False))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Rotary(config)


class DeepseekV3(nn.Module):
    """The causal language model; with `mtp` also its multi-token prediction layer, if the config has one."""

    def __init__(self, config: ModelConfig, *, mtp: bool = False) -> None:
        super().__init__()
        if mtp and not config.num_nextn_predict_layers:
            raise ConfigError("num_nextn_predict_layers: expected 1 for mtp=True, found 0")
        self.config, self.mtp = config, mtp
        self.model = Decoder(config, mtp=mtp)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self) -> None:
        """Makes head and embedding one Parameter if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.tie_weights()  # to_empty() replaces each module's Parameter by one of its own
        return self

    def num_parameters(self) -> int:
        """Values a checkpoint holds, each once: the Parameters and the routers' correction biases."""
        return sum(tensor.numel() for tensor in (*self.parameters(), *self._correction_biases()))

    def _correction_biases(self) -> list[Tensor]:
        return [buffer for name, buffer in self.named_buffers() if name.endswith("e_score_correction_bias")]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal with the config's initializer_range; norms (the only vectors) one, correction biases zero."""
        for parameter in self.parameters():
            parameter.normal_(std=self.config.initializer_range) if parameter.ndim > 1 else parameter.fill_(1.0)
        for bias in self._correction_biases():
            bias.zero_()

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LatentCache | PagedCache | None = None,
        logits_to_keep: int = 0,
        return_mtp: bool = False,
        return_routing: bool = False,
    ) -> Tensor | tuple[Any, ...]:
        """Logits [B, T, V] in the model's dtype. With return_mtp also mtp_logits [B, T - 1, V]; with return_routing,
        for training, also a list of (router logits [N, E] float32, topk_idx [N, K]), one a MoE layer, MTP's last.

        input_ids: int64 [B, T]. attention_mask: [B, S], nonzero = a real token, S counts the cached ones; position_ids:
        [B, T], by default each real token's index in its sequence. The cache is updated in place. logits_to_keep: only
        the last so many positions, 0 = all. mtp_logits[:, t] predict token t + 2. Raises Dsv3cError.
        """
        cached = cache.length if cache is not None else 0
        self._check((len(input_ids), cached + input_ids.shape[1]), attention_mask, cache, return_mtp)
        embedded_BTD = self.model.embed_tokens(input_ids)
        where = self._where(embedded_BTD, attention_mask, position_ids, cache)
        x_BTD, routing = self._layers(embedded_BTD, where, attention_mask, cache)
        if cache is not None:
            cache.advance(input_ids.shape[1], attention_mask)
        results: list[Any] = [self.lm_head(x_BTD[:, -logits_to_keep:])]
        if return_mtp:
            cos_BTr, sin_BTr, mask = where
            mask = mask[:, :, :-1, :-1] if mask is not None else None
            x_BTD, _, *routed = self.model.layers[-1](
                x_BTD[:, :-1], embedded_BTD[:, 1:], cos_BTr[:, :-1], sin_BTr[:, :-1], mask
            )
            routing += [tuple(routed)] if routed else []
            results.append(self.lm_head(x_BTD[:, -logits_to_keep:]))
        if return_routing:
            if len(routing) < sum(self.config.moe_layers[: self.config.num_hidden_layers + return_mtp]):
                raise Dsv3cError("return_routing: expected gradients to be enabled, since it is compiled for training")
            results.append(routing)
        return tuple(results) if len(results) > 1 else results[0]

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None, cache: PagedCache) -> Tensor:
        """What the head takes, [B, T, D]. Latents are written, but count only after `cache.advance`."""
        embedded_BTD = self.model.embed_tokens(input_ids)
        where = self._where(embedded_BTD, attention_mask, None, cache)
        return self._layers(embedded_BTD, where, attention_mask, cache)[0]

    def draft(self, x_BTD: Tensor, next_ids: Tensor, attention_mask: Tensor | None, cache: PagedCache) -> Tensor:
        """What the head takes for the tokens after next, [B, T, D], from `hidden` and the next tokens [B, T]; with the
        same cache, which holds latents of the MTP layer too."""
        embedded_BTD = self.model.embed_tokens(next_ids)
        where = self._where(embedded_BTD, attention_mask, None, cache)
        index = self.config.num_hidden_layers
        x_BTD, latent_BTL, *_ = self.model.layers[index](x_BTD, embedded_BTD, *where, cache.past(index))
        cache.write(index, latent_BTL, attention_mask)
        return x_BTD

    def _where(
        self,
        x_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: LatentCache | PagedCache | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rotary angles and mask of new tokens."""
        (batch, num_new), cached = x_BTD.shape[:2], cache.length if cache is not None else 0
        paged = cache if isinstance(cache, PagedCache) and cached else None
        if position_ids is not None:
            position_ids = position_ids.expand(batch, -1)
        elif paged is not None:
            position_ids = positions(paged.lengths_B, num_new)
        elif attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, cached:]
        else:
            position_ids = torch.arange(cached, cached + num_new, device=x_BTD.device).expand(batch, -1)
        mask = None if paged is not None else attend(attention_mask, position_ids, cached)
        return *self.model.rotary_emb(x_BTD, position_ids), mask

    def _layers(
        self,
        x_BTD: Tensor,
        where: tuple[Tensor, Tensor, Tensor | None],
        attention_mask: Tensor | None,
        cache: LatentCache | PagedCache | None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """All layers but the MTP one, and the final norm; and their routing."""
        routing = []
        for index, layer in zip(range(self.config.num_hidden_layers), self.model.layers, strict=False):
            x_BTD, latent_BTL, *routed = layer(x_BTD, *where, cache.past(index) if cache is not None else None)
            routing += [tuple(routed)] if routed else []
            if cache is not None:
                cache.write(index, latent_BTL, attention_mask)
        return self.model.norm(x_BTD), routing

    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **settings: Any) -> Tensor:
        """`dsv3c.generate(self, …)`."""
        from dsv3c.generation import generate

        return generate(self, input_ids, max_new_tokens=max_new_tokens, **settings)

    def _check(
        self, shape: tuple[int, int], mask: Tensor | None, cache: LatentCache | PagedCache | None, return_mtp: bool
    ) -> None:
        if mask is not None and isinstance(cache, PagedCache) and cache.length:
            raise Dsv3cError(
                "attention_mask: expected none, since a PagedCache holds no padding; try it with the prompt"
            )
        if mask is not None and mask.shape != shape:
            raise Dsv3cError(
                f"attention_mask: expected {list(shape)}, cached tokens included, found {list(mask.shape)}"
            )
        if cache is not None and (cache.batch_size != shape[0] or cache.max_tokens < shape[1]):
            found = [cache.batch_size, cache.max_tokens]
            raise Dsv3cError(f"cache: expected room for [sequences, tokens] {list(shape)}, found {found}")
        if return_mtp and (not self.mtp or cache is not None):
            raise Dsv3cError("return_mtp: expected a model built with mtp=True, and no cache")


def attend(attention_mask: Tensor | None, position_ids_BT: Tensor, cached: int) -> Tensor | None:
    """bool [B, 1, T, S], True = attend: causal, real keys only; None where a layer needs no mask.

    A padded query still sees itself, since a softmax over no key at all is NaN on some devices.
    """
    batch, num_new = position_ids_BT.shape
    if attention_mask is None and (not cached or num_new == 1):
        return None
    key_S = torch.arange(cached + num_new, device=position_ids_BT.device)
    query_T1 = key_S[cached:, None]
    if attention_mask is None:
        return (key_S <= query_T1).expand(batch, 1, -1, -1).contiguous()
    return (key_S <= query_T1) & (attention_mask.bool()[:, None, None] | (key_S == query_T1))
