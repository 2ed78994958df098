"""Our model against transformers' DeepseekV3 and DeepseekV2: float64 evaluations agree, float32 ones are as close.

transformers computes norms, router and angles in float32 whatever the model's dtype is. `float64()` makes it a float64
oracle: it turns every float32 that its code names into float64.
"""

import zlib
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dsv3c.cache import LatentCache
from dsv3c.config import ModelConfig, Yarn
from dsv3c.generation import generate
from dsv3c.model import DeepseekV3
from dsv3c.numerics import (
    MODEL_DISTANCE,
    MODEL_DISTANCE_BF16,
    distance,
    float64_agreement,
    median_token_distance,
)

transformers = pytest.importorskip("transformers", reason="the oracle: pip install 'dsv3c[hf]'")

YARN = Yarn(factor=40.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0)
BASE = ModelConfig(
    vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=4, n_shared_experts=1, n_routed_experts=16, num_experts_per_tok=4, routed_scaling_factor=2.5,
    kv_lora_rank=32, q_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=24, first_k_dense_replace=1,
    norm_topk_prob=True, max_position_embeddings=1280, n_group=4, topk_group=2, rope_scaling=YARN,
)  # fmt: skip
V2 = replace(
    BASE, model_type="deepseek_v2", scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, n_group=1,
    topk_group=1, n_shared_experts=2, rope_scaling=replace(YARN, mscale=0.707, mscale_all_dim=0.707),
)  # fmt: skip

VARIANTS = {
    "v3": BASE,
    "q_lora_null": replace(BASE, q_lora_rank=None),
    "one_group": replace(BASE, n_group=1, topk_group=1, n_routed_experts=12),
    "no_shared_experts": replace(BASE, n_shared_experts=0),
    "two_shared_experts": replace(BASE, n_shared_experts=2),
    "all_moe": replace(BASE, first_k_dense_replace=0),
    "all_dense": replace(BASE, first_k_dense_replace=3),
    "one_expert_per_token": replace(BASE, num_experts_per_tok=1),
    "weights_not_normalised": replace(BASE, norm_topk_prob=False),
    "odd_sizes": replace(
        BASE, vocab_size=101, hidden_size=70, intermediate_size=131, moe_intermediate_size=29, q_lora_rank=37,
        kv_lora_rank=27, qk_nope_head_dim=13, qk_rope_head_dim=6, v_head_dim=11, num_attention_heads=3,
    ),
    "no_rope_scaling": replace(BASE, rope_scaling=None, rope_theta=50000.0),
    "mscales_differ": replace(BASE, rope_scaling=replace(YARN, mscale=0.7, mscale_all_dim=1.3)),
    "mscales_absent": replace(BASE, rope_scaling=replace(YARN, mscale=None, mscale_all_dim=None)),
    "betas_equal": replace(BASE, rope_scaling=replace(YARN, beta_fast=1.0)),
    "ramp_of_no_width": replace(BASE, rope_scaling=replace(YARN, beta_fast=1.0, original_max_position_embeddings=6)),
    "tied_head": replace(BASE, tie_word_embeddings=True),
    "eps_1e-5": replace(BASE, rms_norm_eps=1e-5),
    "moonlight": replace(
        BASE, q_lora_rank=None, n_shared_experts=2, n_group=1, topk_group=1, num_experts_per_tok=6, rope_scaling=None,
        routed_scaling_factor=2.446, rope_theta=50000.0, rms_norm_eps=1e-5,
    ),
    "kimi_k2": replace(
        BASE, model_type="kimi_k2", n_group=1, topk_group=1, n_routed_experts=24, num_experts_per_tok=8,
        num_attention_heads=2, routed_scaling_factor=2.827, rope_theta=50000.0,
        rope_scaling=replace(YARN, factor=32.0, beta_fast=1.0),
    ),
    "v2_lite": replace(V2, q_lora_rank=None),
    "v2": replace(V2, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0),
}  # fmt: skip
BATCH, TOKENS = 2, 24


class _Float64(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{key: widen(value) for key, value in (kwargs or {}).items()})


@contextmanager
def float64():
    """float64 as the default dtype, and wherever float32 is asked for by name."""
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def seed(*words: str) -> None:
    torch.manual_seed(zlib.crc32(" ".join(words).encode()))


@torch.no_grad()
def our_model(config: ModelConfig, **kwargs) -> DeepseekV3:
    """Activations of size 1 everywhere, norms and biases that show if they are left out."""
    model = DeepseekV3(config, **kwargs)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.normal_(1.0, 0.2)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    for bias in model.buffers():
        bias.normal_(0.0, 0.1)
    return model.eval()


def their_model(model: DeepseekV3, dtype: torch.dtype):
    """transformers' model with the weights of ours."""
    config, version = model.config, "V2" if model.config.model_type == "deepseek_v2" else "V3"
    their_config = getattr(transformers, f"Deepseek{version}Config").from_dict(config.to_dict())
    their_config._attn_implementation, their_config._experts_implementation = "sdpa", "eager"
    theirs = getattr(transformers, f"Deepseek{version}ForCausalLM")(their_config)
    layers = tuple(f"model.layers.{index}." for index in range(config.num_hidden_layers))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("model.layers.") or k.startswith(layers)}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("shared_experts" in name for name in missing), missing  # of width 0, in transformers
    return theirs.to(dtype).eval()


def assert_as_close(ours32, ours64, theirs32, theirs64, rows=slice(None)) -> None:
    assert ours64.dtype == theirs64.dtype == torch.float64
    ours = distance(ours32[rows], theirs64[rows])
    theirs = distance(theirs32[rows], theirs64[rows])
    apart = distance(ours64[rows], theirs64[rows])
    for mine, other, both in zip(ours, theirs, apart, strict=True):
        assert both <= float64_agreement(other), (apart, theirs)
        assert mine <= MODEL_DISTANCE * other, (ours, theirs)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers without shared experts
@torch.no_grad()
def test_logits(name):
    """One pass; the same in cached pieces; the same with padding on the left. Then the greedy continuation."""
    seed("logits", name)
    config = VARIANTS[name]
    model = our_model(config)
    input_ids = torch.randint(config.vocab_size, (BATCH, TOKENS))
    padding = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    padding[0, :9] = 0
    real = padding.bool()
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    theirs = their_model(model, torch.float32)
    with float64():
        theirs64 = their_model(model, torch.float64)
        reference = theirs64(input_ids).logits
        padded_reference = theirs64(input_ids, attention_mask=padding, position_ids=positions).logits

    whole, padded = model(input_ids), model(input_ids, attention_mask=padding)
    cached = in_pieces(model, input_ids, (13, 6, 1, 1, 3))
    assert padded.isfinite().all()
    settings = ({"attention_mask": padding}, {"repetition_penalty": 1.3})  # transformers 5.17 penalises padding too
    tokens = [generate(model, input_ids, max_new_tokens=6, **setting) for setting in settings]
    model.double()
    assert_as_close(whole, model(input_ids), theirs(input_ids).logits, reference)
    assert_as_close(cached, in_pieces(model, input_ids, (24,)), their_pieces(theirs, input_ids, (13, 6, 5)), reference)
    theirs_padded = theirs(input_ids, attention_mask=padding, position_ids=positions).logits
    assert_as_close(padded, model(input_ids, attention_mask=padding), theirs_padded, padded_reference, real)
    theirs.generation_config.eos_token_id = None
    for found, setting in zip(tokens, settings, strict=True):
        assert torch.equal(found, theirs.generate(input_ids, max_new_tokens=6, do_sample=False, **setting))


def in_pieces(model, input_ids, lengths) -> torch.Tensor:
    cache = LatentCache(model.config, len(input_ids), sum(lengths), dtype=model.lm_head.weight.dtype)
    return torch.cat([model(piece, cache=cache) for piece in input_ids.split(lengths, dim=1)], dim=1)


def their_pieces(theirs, input_ids, lengths) -> torch.Tensor:
    cache = transformers.DynamicCache(config=theirs.config)
    pieces = [theirs(piece, past_key_values=cache, use_cache=True).logits for piece in input_ids.split(lengths, dim=1)]
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def test_far_positions():
    """Angles of 10^5 radians, where float32 is coarse: both models lose the same."""
    seed("far positions")
    model = our_model(BASE)
    input_ids = torch.randint(BASE.vocab_size, (BATCH, TOKENS))
    positions = torch.arange(TOKENS).expand(BATCH, -1) * 4001
    theirs32 = their_model(model, torch.float32)(input_ids, position_ids=positions).logits
    with float64():
        theirs64 = their_model(model, torch.float64)(input_ids, position_ids=positions).logits
    ours32 = model(input_ids, position_ids=positions)
    assert_as_close(ours32, model.double()(input_ids, position_ids=positions), theirs32, theirs64)


@torch.no_grad()
@pytest.mark.parametrize("name", ["v3", "moonlight", "kimi_k2"])
def test_bfloat16(name):
    seed("bfloat16", name)
    config = VARIANTS[name]
    model = our_model(config)
    input_ids = torch.randint(config.vocab_size, (8, TOKENS))
    theirs = their_model(model, torch.float32)
    keep = {k: v.clone() for k, v in theirs.named_buffers()}
    with float64():
        reference = their_model(model, torch.float64)(input_ids).logits
    theirs.bfloat16()
    for buffer, value in keep.items():
        # Frequencies and correction biases: from_pretrained(dtype=torch.bfloat16) keeps them float32.
        theirs.get_buffer(buffer).data = value
    mine = median_token_distance(model.bfloat16()(input_ids), reference)
    assert mine <= MODEL_DISTANCE_BF16 * median_token_distance(theirs(input_ids).logits, reference)


@torch.no_grad()
def test_mtp():
    """Our MTP layer against one put together from transformers' decoder layer, as its MTP module does it."""
    seed("mtp")
    model = our_model(replace(BASE, num_nextn_predict_layers=1), mtp=True)
    input_ids = torch.randint(BASE.vocab_size, (BATCH, TOKENS))
    their32 = their_mtp(model, input_ids, torch.float32)
    with float64():
        their64 = their_mtp(model, input_ids, torch.float64)
    _, ours32 = model(input_ids, return_mtp=True)
    _, ours64 = model.double()(input_ids, return_mtp=True)
    assert_as_close(ours32, ours64, their32, their64)


def their_mtp(model, input_ids, dtype) -> torch.Tensor:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    theirs = their_model(model, dtype)
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    state = {k.removeprefix(prefix): v.to(dtype) for k, v in model.state_dict().items() if k.startswith(prefix)}
    layer = modeling.DeepseekV3DecoderLayer(theirs.config, layer_idx=model.config.num_hidden_layers).to(dtype)
    layer.load_state_dict({k: v for k, v in state.items() if k in layer.state_dict()})

    def norm(name, x):
        module = modeling.DeepseekV3RMSNorm(x.shape[-1], eps=model.config.rms_norm_eps)
        module.weight.data = state[f"{name}.weight"]
        return module(x)

    hidden = theirs.model(input_ids).last_hidden_state[:, :-1]
    embedded = theirs.model.embed_tokens(input_ids[:, 1:])
    joined = torch.cat((norm("enorm", embedded), norm("hnorm", hidden)), dim=-1) @ state["eh_proj.weight"].T
    positions = torch.arange(1, TOKENS)[None]
    out = layer(joined, position_embeddings=theirs.model.rotary_emb(joined, position_ids=positions))
    return theirs.lm_head(norm("shared_head.norm", out))


def test_gradients():
    """float64 gradients of every weight agree with transformers'."""
    seed("gradients")
    model = our_model(BASE)
    input_ids = torch.randint(BASE.vocab_size, (BATCH, TOKENS))
    target = torch.randn(BATCH, TOKENS, BASE.vocab_size, dtype=torch.float64)
    theirs32 = their_model(model, torch.float32)
    (theirs32(input_ids).logits.double() * target).sum().backward()
    with float64():
        theirs = their_model(model, torch.float64)
        (theirs(input_ids).logits * target).sum().backward()
    (model(input_ids).double() * target).sum().backward()
    ours32 = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.double()
    (model(input_ids) * target).sum().backward()
    ours = dict(model.named_parameters())
    for (name, parameter), (_, parameter32) in zip(theirs.named_parameters(), theirs32.named_parameters(), strict=True):
        assert_as_close(ours32[name], ours[name].grad, parameter32.grad, parameter.grad)


def test_configs_are_understood():
    """What transformers 5 writes for a config of ours reads as the same config."""
    for config in VARIANTS.values():
        version = "V2" if config.model_type == "deepseek_v2" else "V3"
        written = getattr(transformers, f"Deepseek{version}Config").from_dict(config.to_dict()).to_dict()
        assert "rope_parameters" in written
        written["model_type"] = config.model_type
        assert replace(ModelConfig.from_dict(written), eos_token_id=None, bos_token_id=None) == config
