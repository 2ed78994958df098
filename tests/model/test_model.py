"""The eager model by itself: sizes, names, dtypes, routing, masks, cache, tracing. See test_against_transformers.py."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3c.cache import LatentCache
from dsv3c.config import ModelConfig, preset
from dsv3c.errors import ConfigError, Dsv3cError
from dsv3c.layers import Attention, DecoderLayer, Experts, Router, rotary
from dsv3c.model import DeepseekV3, attend
from dsv3c.numerics import distance, experts_rms, reordered_bound, routing_weight_bound

TINY = preset("tiny").with_layers(2)
SMALL = replace(TINY, vocab_size=64, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, q_lora_rank=48)


def model_of(config: ModelConfig, **kwargs) -> DeepseekV3:
    torch.manual_seed(0)
    return DeepseekV3(replace(config, initializer_range=0.1), **kwargs).eval()


@pytest.mark.parametrize(
    ("name", "mtp", "parameters"),
    [
        ("v3-671b", False, 671_026_419_200),
        ("v3-671b", True, 671_026_419_200 + 11_610_068_224),
        ("v3-16b", False, 15_706_485_888),
        ("v3-2.6b", False, 2_557_184_448),
        ("v3-120m", False, 123_990_752),
        ("tiny", False, 6_962_480),
    ],
)
def test_number_of_parameters(name, mtp, parameters):
    with torch.device("meta"):
        assert DeepseekV3(preset(name), mtp=mtp).num_parameters() == parameters


def test_names_are_the_checkpoints():
    with torch.device("meta"):
        state = DeepseekV3(preset("v3-671b").with_layers(2), mtp=True).state_dict()
    assert {
        k.removeprefix("model."): tuple(v.shape) for k, v in state.items() if not k.startswith("model.layers.0.")
    } == {
        "embed_tokens.weight": (129280, 7168),
        **layer_names("layers.1."),
        **layer_names("layers.2."),
        "layers.2.enorm.weight": (7168,),
        "layers.2.hnorm.weight": (7168,),
        "layers.2.eh_proj.weight": (7168, 14336),
        "layers.2.shared_head.norm.weight": (7168,),
        "norm.weight": (7168,),
        "lm_head.weight": (129280, 7168),
    }
    assert state["model.layers.0.mlp.gate_proj.weight"].shape == (18432, 7168)


def layer_names(prefix: str) -> dict[str, tuple[int, ...]]:
    attention = {
        "q_a_proj.weight": (1536, 7168), "q_a_layernorm.weight": (1536,), "q_b_proj.weight": (24576, 1536),
        "kv_a_proj_with_mqa.weight": (576, 7168), "kv_a_layernorm.weight": (512,), "kv_b_proj.weight": (32768, 512),
        "o_proj.weight": (7168, 16384),
    }  # fmt: skip
    mlp = {
        "gate.weight": (256, 7168), "gate.e_score_correction_bias": (256,),
        "experts.gate_up_proj": (256, 4096, 7168), "experts.down_proj": (256, 7168, 2048),
        "shared_experts.gate_proj.weight": (2048, 7168), "shared_experts.up_proj.weight": (2048, 7168),
        "shared_experts.down_proj.weight": (7168, 2048),
    }  # fmt: skip
    norms = {"input_layernorm.weight": (7168,), "post_attention_layernorm.weight": (7168,)}
    parts = (("self_attn.", attention), ("mlp.", mlp), ("", norms))
    return {f"{prefix}{part}{name}": shape for part, names in parts for name, shape in names.items()}


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casts_leave_the_correction_bias_alone(cast):
    model = model_of(SMALL)
    router = model.model.layers[1].mlp.gate
    bias = router.e_score_correction_bias.uniform_().clone()
    getattr(model, cast)()
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, bias)
    assert router.weight.dtype != torch.float32
    assert [name for name, _ in model.named_buffers()] == ["model.layers.1.mlp.gate.e_score_correction_bias"]


def test_made_on_meta():
    """to_empty() and a state_dict give the same model, tied head included, in another dtype too."""
    config = replace(SMALL, tie_word_embeddings=True)
    original = model_of(config).bfloat16()
    with torch.device("meta"):
        model = DeepseekV3(config).bfloat16()
    model = model.to_empty(device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.load_state_dict(original.state_dict())
    input_ids = torch.randint(config.vocab_size, (2, 9))
    assert torch.equal(model(input_ids), original(input_ids))


def test_initialisation():
    model = DeepseekV3(replace(TINY, initializer_range=0.006))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            # Mean and standard deviation of n normal values: off by 6 of their own standard deviations at most.
            n, std = parameter.numel(), 0.006
            assert abs(parameter.mean()) <= 6 * std / math.sqrt(n), name
            assert abs(parameter.std() - std) <= 6 * std / math.sqrt(2 * n), name


def test_v3_constants():
    """The softmax scales, YaRN's ramp from pair 10 to 23 of 32, 576 cached values a token."""
    config = preset("v3-671b")
    plain = replace(config, rope_scaling=None)
    assert f"{config.softmax_scale:.7f} {plain.softmax_scale:.7f}" == "0.1352338 0.0721688"
    position = torch.ones(1, 1, dtype=torch.int64)
    angles = [
        torch.atan2(sin, cos)[0, 0] for cos, sin in (rotary(c, position, torch.float64)[::1] for c in (plain, config))
    ]
    stretch = (angles[0] / angles[1]).round(decimals=3)
    assert stretch[:11].eq(1).all()
    assert stretch[23:].eq(40).all()
    assert stretch[11:23].gt(1).all()
    assert stretch[11:23].lt(40).all()
    assert LatentCache(config, 1, 3, device="meta").past(0) is None
    assert LatentCache(config, 1, 3, device="meta").latents[60].shape == (1, 3, 576)


# Routing, against the definition written as a loop.


def route(config: ModelConfig, router: Router, x: torch.Tensor) -> tuple[set[int], dict[int, float]]:
    """The experts of one token, and their weights, by the report's words."""
    num_groups, kept_groups = (1, 1) if config.topk_method == "greedy" else (config.n_group, config.topk_group)
    logits = (router.weight.double() @ x.double()).tolist()
    if config.scoring_func == "softmax":
        scores, bias = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist(), [0.0] * len(logits)
    else:
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        bias = router.e_score_correction_bias.tolist()
    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(scores) // num_groups
    groups = [range(start, start + size) for start in range(0, len(scores), size)]
    best = 1 if config.scoring_func == "softmax" else 2
    worth = [sum(sorted((biased[e] for e in group), reverse=True)[:best]) for group in groups]
    kept = sorted(range(len(groups)), key=lambda g: -worth[g])[:kept_groups]
    allowed = [e for g in kept for e in groups[g]]
    chosen = sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return set(chosen), {e: scores[e] / total * config.routed_scaling_factor for e in chosen}


@pytest.mark.parametrize(
    "gate",
    [
        {},
        {"n_group": 1, "topk_group": 1},
        {"topk_group": 1},
        {"norm_topk_prob": False},
        {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
        {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
        {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    ],
)
def test_routing(gate):
    torch.manual_seed(0)
    config = replace(SMALL, **gate)
    router = Router(config).requires_grad_(False)
    torch.nn.init.normal_(router.weight, std=0.3)
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.normal_(-0.5, 0.5)  # negative ones too: a masked group must not win
    x_ND = torch.randn(50, config.hidden_size)
    logits, weights, idx = router.double()(x_ND.double())
    assert logits.shape == (50, 16)
    for x, token_weights, token_idx in zip(x_ND, weights.tolist(), idx.tolist(), strict=True):
        chosen, expected = route(config, router, x)
        assert set(token_idx) == chosen
        for e, weight in zip(token_idx, token_weights, strict=True):
            magnitude = float((router.weight.abs() @ x.double().abs()).max())
            bound = routing_weight_bound(len(x), magnitude, len(router.weight), torch.float64, expected[e])
            assert abs(weight - expected[e]) <= bound


def test_router_computes_in_float32():
    """bfloat16 inputs and weights are widened before the product, not after it."""
    torch.manual_seed(0)
    router = Router(TINY)
    torch.nn.init.normal_(router.weight)
    router.bfloat16()
    x_ND = torch.randn(8, TINY.hidden_size).bfloat16()
    logits, weights, _ = router(x_ND)
    assert logits.dtype == weights.dtype == torch.float32
    assert torch.equal(logits, F.linear(x_ND.float(), router.weight.float()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ["random", "one_expert_takes_all"])
def test_experts(dtype, routing):
    """Against a loop over tokens in float64."""
    torch.manual_seed(0)
    experts = Experts(TINY).to(dtype).requires_grad_(False)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    x_ND = torch.randn(20, TINY.hidden_size).to(dtype)
    idx = torch.stack([torch.randperm(16)[:4] for _ in x_ND]) if routing == "random" else torch.full((20, 1), 5)
    weights = torch.rand(idx.shape)
    out = experts(x_ND, idx, weights)
    assert out.dtype == dtype
    expected = torch.zeros(x_ND.shape, dtype=torch.float64)
    for n, k in torch.cartesian_prod(torch.arange(len(x_ND)), torch.arange(idx.shape[1])).tolist():
        gate, up = (experts.gate_up_proj[idx[n, k]].double() @ x_ND[n].double()).chunk(2)
        expected[n] += weights[n, k].double() * (experts.down_proj[idx[n, k]].double() @ (F.silu(gate) * up))
    assert distance(out, expected)[0] <= experts_rms(TINY.hidden_size, TINY.moe_intermediate_size, dtype)


# Masks and cache.


def assert_same(out: torch.Tensor, expected: torch.Tensor) -> None:
    bound = reordered_bound(SMALL.num_hidden_layers + 1, SMALL.intermediate_size, out.dtype)
    assert distance(out.detach(), expected.detach())[1] <= bound


@torch.no_grad()
def test_padding_and_cache_change_nothing():
    model = model_of(SMALL).double()
    torch.manual_seed(1)
    sequences = [torch.randint(SMALL.vocab_size, (1, n)) for n in (12, 7, 1)]
    input_ids = torch.cat([F.pad(s, (12 - s.shape[1], 0)) for s in sequences])
    mask = torch.cat([F.pad(torch.ones_like(s), (12 - s.shape[1], 0)) for s in sequences])
    cache = LatentCache(SMALL, 3, 12, dtype=torch.float64)
    pieces = [
        model(input_ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache)
        for start, stop in ((0, 6), (6, 10), (10, 11), (11, 12))
    ]
    for out in (model(input_ids, attention_mask=mask), torch.cat(pieces, dim=1)):
        assert out.isfinite().all()
        for row, sequence in zip(out, sequences, strict=True):
            assert_same(row[-sequence.shape[1] :], model(sequence)[0])


@torch.no_grad()
def test_padding_of_every_kind_is_finite():
    """A row of padding alone, and padding in the middle or at the end."""
    model = model_of(SMALL).bfloat16()
    input_ids = torch.randint(SMALL.vocab_size, (4, 6))
    mask = torch.tensor([[0] * 6, [1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    assert model(input_ids, attention_mask=mask).isfinite().all()
    # Some attention kernels give NaN for a row that attends to nothing: there must be none.
    for cached in (0, 2):
        attended = attend(mask, torch.zeros(4, 6 - cached, dtype=torch.int64), cached)
        assert attended.shape == (4, 1, 6 - cached, 6)
        assert attended.any(dim=-1).all()


def test_angles_are_float32_in_a_bfloat16_model():
    model, seen = model_of(SMALL).bfloat16(), []
    model.model.layers[1].register_forward_pre_hook(lambda layer, args: seen.extend(args[1:3]))
    model(torch.zeros(2, 300, dtype=torch.int64))
    positions = torch.arange(300).expand(2, -1)
    assert all(map(torch.equal, seen, rotary(SMALL, positions, torch.float32)))
    assert seen[0].dtype == torch.float32
    assert seen[0].shape == (2, 300, SMALL.qk_rope_head_dim // 2)


@torch.no_grad()
def test_positions_and_logits_to_keep():
    model = model_of(SMALL, mtp=True)
    input_ids = torch.randint(SMALL.vocab_size, (2, 8))
    mask = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 2, 3, 4]])
    implicit = model(input_ids, attention_mask=mask)
    assert torch.equal(implicit, model(input_ids, attention_mask=mask, position_ids=positions))
    assert not torch.equal(implicit, model(input_ids, attention_mask=mask, position_ids=positions * 2))
    one_row = model(input_ids, position_ids=torch.arange(8)[None])
    assert torch.equal(one_row, model(input_ids))
    logits, mtp_logits = model(input_ids, return_mtp=True)
    assert mtp_logits.shape == (2, 7, SMALL.vocab_size)
    kept, mtp_kept = model(input_ids, return_mtp=True, logits_to_keep=3)
    assert kept.shape == mtp_kept.shape == (2, 3, SMALL.vocab_size)
    assert_same(kept, logits[:, -3:])
    assert_same(mtp_kept, mtp_logits[:, -3:])


def test_routing_is_what_the_gates_returned():
    model, gates = model_of(SMALL, mtp=True), []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, args, out: gates.append(out))
    _, _, routing = model(torch.randint(SMALL.vocab_size, (2, 8)), return_mtp=True, return_routing=True)
    assert len(routing) == sum(SMALL.moe_layers)
    for (logits, topk_idx), (expected, _, chosen) in zip(routing, gates, strict=True):
        assert logits is expected
        assert topk_idx is chosen


def test_cached_latents_need_no_gradient():
    model = model_of(SMALL)
    cache = LatentCache(SMALL, 1, 8)
    for _ in range(3):
        out = model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    out.sum().backward()
    assert cache.length == 6
    assert not cache.latents[0].requires_grad


def test_misuse_is_named():
    model = model_of(SMALL)
    input_ids = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(Dsv3cError, match=r"attention_mask: expected \[2, 5\], .*found \[2, 4\]"):
        model(input_ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(Dsv3cError, match=r"cache: expected room .*\[2, 5\], found \[2, 4\]"):
        model(input_ids, cache=LatentCache(SMALL, 2, 4))
    with pytest.raises(Dsv3cError, match=r"cache: expected room .*\[2, 5\], found \[1, 8\]"):
        model(input_ids, cache=LatentCache(SMALL, 1, 8))
    with pytest.raises(Dsv3cError, match="return_mtp: expected a model built with mtp=True"):
        model(input_ids, return_mtp=True)
    with pytest.raises(ConfigError, match="num_nextn_predict_layers: expected 1"):
        DeepseekV3(replace(SMALL, num_nextn_predict_layers=0), mtp=True)


# Tracing.


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    # Module attributes that are floats would otherwise become inputs, and AOTAutograd then starts over.
    with torch._dynamo.config.patch(specialize_float=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_traces_as_one_graph():
    """The whole model with MTP and padding: one graph for all sizes, bitwise the same."""
    model = model_of(SMALL, mtp=True)
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for batch, tokens in ((2, 9), (3, 7), (5, 17)):
            input_ids = torch.randint(SMALL.vocab_size, (batch, tokens))
            mask = (torch.arange(tokens) >= 4).expand(batch, -1)
            outs = compiled(input_ids, attention_mask=mask, return_mtp=True)
            expected = model(input_ids, attention_mask=mask, return_mtp=True)
            assert all(map(torch.equal, outs, expected))
    assert len(graphs) == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_layer_traces_with_its_gradient():
    """A bfloat16 MoE layer with a past and a mask: AOTAutograd's forward and backward are bitwise eager's."""
    torch.manual_seed(0)
    layer = DecoderLayer(SMALL, moe=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer.bfloat16()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens, cached in ((2, 5, 3), (3, 4, 9)):
        x = torch.randn(batch, tokens, SMALL.hidden_size).bfloat16()
        past = torch.randn(batch, cached + 4, SMALL.latent_dim).bfloat16()[:, :cached]
        cos, sin = rotary(SMALL, torch.arange(cached, cached + tokens).expand(batch, -1), torch.float32)
        mask = torch.ones(batch, 1, tokens, cached + tokens, dtype=torch.bool).tril(cached)
        results = []
        for function in (layer, compiled):
            leaf = x.clone().requires_grad_()
            out, latent, *_ = function(leaf, cos, sin, mask, past)
            layer.zero_grad()
            (out.float().square().sum() + latent.float().sum()).backward()
            results.append([out, latent, leaf.grad, *(parameter.grad for parameter in layer.parameters())])
        assert all(map(torch.equal, *results))


def test_attention_attends_to_all_of_its_past():
    """Without a mask: one new token sees the whole past; the rotated key in the latent makes positions matter."""
    torch.manual_seed(0)
    attention = Attention(SMALL).double()
    x = torch.randn(2, 6, SMALL.hidden_size, dtype=torch.float64)
    cos, sin = rotary(SMALL, torch.arange(6).expand(2, -1), torch.float64)
    whole, latent = attention(x, cos, sin)
    assert latent.shape == (2, 6, SMALL.latent_dim)
    last, new = attention(x[:, 5:], cos[:, 5:], sin[:, 5:], None, latent[:, :5])
    assert_same(last, whole[:, 5:])
    assert_same(new, latent[:, 5:])
