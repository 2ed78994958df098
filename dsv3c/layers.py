"""The layers of DeepSeek-V3, eager, and what they are made of. Shape suffixes, numerics and sources: model.py."""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3c.cache import Pages
from dsv3c.config import ModelConfig
from dsv3c.grouped_linear import grouped_linear

LATENT_NORM_EPS = 1e-6


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Where the model computes in float32; float64 stays, so that `model.double()` is an oracle."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Without its weight, rms_norm computes in float32 and casts down; the weight is applied after that.
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)


def rotary(config: ModelConfig, position_ids_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, r] of `dtype`, YaRN's attention factor included.

    The frequencies are computed anew each time (a handful of values): a buffer would be rounded by `model.bfloat16()`
    and lost by `to_empty()`.
    """
    dim, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    pair_r = torch.arange(dim // 2, device=position_ids_BT.device, dtype=dtype)
    inv_freq_r = 1.0 / base ** (pair_r * 2 / dim)
    if yarn is not None:

        def pair_of(turns: float) -> float:
            # The pair that makes so many turns within the original length.
            return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(pair_of(yarn.beta_fast)), 0)
        high = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
        ramp_r = ((pair_r - low) / (high - low or 1)).clamp(0, 1)
        inv_freq_r = inv_freq_r / yarn.factor * ramp_r + inv_freq_r * (1 - ramp_r)
    angle_BTr = position_ids_BT[..., None].to(dtype) * inv_freq_r
    factor = yarn.attention_factor() if yarn else 1.0
    return angle_BTr.cos() * factor, angle_BTr.sin() * factor


class Rotary(nn.Module):
    """`rotary` for the tokens of x [B, T, D], in at least float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x_BTD: Tensor, position_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(self.config, position_ids_BT, at_least_float32(x_BTD.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates interleaved pairs (x0, x1), (x2, x3), … [..., 2r]; the result holds all first halves, then all second."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention. Keys and values are expanded from the latent, which is all that is cached."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        self.q_split = (config.qk_nope_head_dim, rope)
        self.kv_split = (config.qk_nope_head_dim, config.v_head_dim)
        self.latent_split = (rank, rope)
        self.softmax_scale = config.softmax_scale
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, heads * sum(self.q_split), bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * sum(self.q_split), bias=False)
        self.has_q_lora = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, rank + rope, bias=False)
        self.kv_a_layernorm = RMSNorm(rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(rank, heads * sum(self.kv_split), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        cos_BTr: Tensor,
        sin_BTr: Tensor,
        mask: Tensor | None = None,
        past: Tensor | Pages | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See DecoderLayer.forward."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD))) if self.has_q_lora else self.q_proj(x_BTD)
        q_BTHd = q.unflatten(-1, (-1, sum(self.q_split)))
        q_nope, q_rope = q_BTHd.split(self.q_split, dim=-1)
        q_BTHd = torch.cat((q_nope, rotate(q_rope, cos_BTr[:, :, None], sin_BTr[:, :, None])), dim=-1)

        compressed, k_rope = self.kv_a_proj_with_mqa(x_BTD).split(self.latent_split, dim=-1)
        latent_BTL = torch.cat((self.kv_a_layernorm(compressed), rotate(k_rope, cos_BTr, sin_BTr)), dim=-1)
        if isinstance(past, Pages):
            latent_BSL, mask = past.append(latent_BTL)
        else:
            latent_BSL = latent_BTL if past is None else torch.cat((past, latent_BTL), dim=1)
        compressed, k_rope = latent_BSL.split(self.latent_split, dim=-1)
        k_nope, v_BSHd = self.kv_b_proj(compressed).unflatten(-1, (-1, sum(self.kv_split))).split(self.kv_split, dim=-1)
        k_BSHd = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, k_nope.shape[2], -1)), dim=-1)

        out_BHTd = F.scaled_dot_product_attention(
            q_BTHd.transpose(1, 2),
            k_BSHd.transpose(1, 2),
            v_BSHd.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None and past is None,
            scale=self.softmax_scale,
        )
        return self.o_proj(out_BHTd.transpose(1, 2).flatten(2)), latent_BTL


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """The gate. Its correction bias takes part in the choice only, and stays float32 whatever the model is cast to."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        biased = config.topk_method == "noaux_tc"
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if biased else None
        self.register_buffer("e_score_correction_bias", bias)
        # Greedy gates choose among all experts: one group.
        self.n_group = 1 if config.topk_method == "greedy" else config.n_group
        self.topk_group, self.top_k = config.topk_group, config.num_experts_per_tok
        self.norm_topk_prob, self.routed_scaling_factor = config.norm_topk_prob, config.routed_scaling_factor

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.e_score_correction_bias = before.to(after.device)
        return self

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [N, E], topk_weights [N, K], topk_idx [N, K] int64); logits and weights in float32."""
        dtype, bias_E = at_least_float32(x_ND.dtype), self.e_score_correction_bias
        logits_NE = F.linear(x_ND.to(dtype), self.weight.to(dtype))
        # V3's gate has sigmoid scores and a bias, V2's softmax scores and none.
        scores_NE = logits_NE.softmax(dim=-1) if bias_E is None else logits_NE.sigmoid()
        choice_NE = scores_NE if bias_E is None else scores_NE + bias_E
        if self.n_group > 1:
            choice_NGe = choice_NE.unflatten(-1, (self.n_group, -1))
            # A group is worth its two best experts to V3's gate, its best one to V2's.
            group_NG = choice_NGe.amax(dim=-1) if bias_E is None else choice_NGe.topk(2, dim=-1).values.sum(dim=-1)
            group_idx = group_NG.topk(self.topk_group, dim=-1, sorted=False).indices
            dropped_NG = torch.ones_like(group_NG, dtype=torch.bool).scatter(1, group_idx, False)
            choice_NE = choice_NGe.masked_fill(dropped_NG[..., None], -math.inf).flatten(1)
        topk_idx = choice_NE.topk(self.top_k, dim=-1, sorted=False).indices
        topk_weights = scores_NE.gather(1, topk_idx)
        if self.norm_topk_prob:
            topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits_NE, topk_weights * self.routed_scaling_factor, topk_idx


class Experts(nn.Module):
    """The routed experts, SwiGLU each, as two stacked weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, dim, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, dim))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, width))

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """gate_up_proj and down_proj to compute with; a subclass that stores them quantised overrides this."""
        return self.gate_up_proj, self.down_proj

    def forward(self, x_ND: Tensor, topk_idx_NK: Tensor, topk_weights_NK: Tensor) -> Tensor:
        """Rows are sorted by expert, so that each expert's are contiguous, and gathered back: no atomics on floats."""
        top_k = topk_idx_NK.shape[1]
        gate_up_E2ID, down_EDI = self.weights(x_ND.dtype)
        expert_R = topk_idx_NK.flatten()
        order_R = expert_R.argsort(stable=True)
        num_tokens_E = expert_R.new_zeros(len(gate_up_E2ID)).scatter_add(0, expert_R, torch.ones_like(expert_R))
        offs_E = num_tokens_E.cumsum(0, dtype=torch.int32)

        gate_RI, up_RI = grouped_linear(x_ND[order_R // top_k], gate_up_E2ID, offs_E).chunk(2, dim=-1)
        out_RD = grouped_linear(F.silu(gate_RI) * up_RI, down_EDI, offs_E)

        place_R = torch.empty_like(order_R).scatter(0, order_R, torch.arange(len(order_R), device=order_R.device))
        out_NKD = out_RD[place_R].unflatten(0, (-1, top_k))
        return (out_NKD * topk_weights_NK[..., None]).sum(dim=1).to(x_ND.dtype)


class MoE(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared) if shared else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(out [B, T, D], and of the router logits [N, E] and topk_idx [N, K])."""
        x_ND = x_BTD.flatten(0, 1)
        logits_NE, topk_weights, topk_idx = self.gate(x_ND)
        out_BTD = self.experts(x_ND, topk_idx, topk_weights).view_as(x_BTD)
        if self.shared_experts is not None:
            out_BTD = out_BTD + self.shared_experts(x_BTD)
        return out_BTD, logits_NE, topk_idx


class DecoderLayer(nn.Module):
    """What the compiler compiles: a function of tensors alone."""

    def __init__(self, config: ModelConfig, *, moe: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MoE(config) if moe else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        cos_BTr: Tensor,
        sin_BTr: Tensor,
        mask: Tensor | None = None,
        past: Tensor | Pages | None = None,
    ) -> tuple[Tensor, ...]:
        """(x [B, T, D], latent [B, T, L] to be cached), and of a MoE layer the router's logits [N, E] and topk_idx
        [N, K].

        past: [B, S - T, L], latents of the tokens before. mask: bool [B, 1, T, S], True = attend; None is causal
        without a past, and everything with one. A past in pages is written to, and stands for its mask too.
        """
        attended_BTD, latent_BTL = self.self_attn(self.input_layernorm(x_BTD), cos_BTr, sin_BTr, mask, past)
        x_BTD = x_BTD + attended_BTD
        out = self.mlp(self.post_attention_layernorm(x_BTD))
        out_BTD, *routing = out if isinstance(out, tuple) else (out,)
        return x_BTD + out_BTD, latent_BTL, *routing


class MTPLayer(DecoderLayer):
    """Multi-token prediction: a decoder layer that also sees the embedding of the next token, and predicts the one
    after it. Embedding and head are the main model's."""

    def __init__(self, config: ModelConfig, *, moe: bool) -> None:
        super().__init__(config, moe=moe)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(  # type: ignore[override]
        self,
        x_BTD: Tensor,
        next_BTD: Tensor,
        cos_BTr: Tensor,
        sin_BTr: Tensor,
        mask: Tensor | None = None,
        pages: Pages | None = None,
    ) -> tuple[Tensor, ...]:
        """x: the main model's output, after its final norm; next: embeddings of the tokens one later. Returns what the
        head takes, and then what a layer does. The embedding comes first in eh_proj (the report writes it second)."""
        x_BTD = self.eh_proj(torch.cat((self.enorm(next_BTD), self.hnorm(x_BTD)), dim=-1))
        x_BTD, *others = super().forward(x_BTD, cos_BTr, sin_BTr, mask, pages)
        return self.shared_head["norm"](x_BTD), *others
