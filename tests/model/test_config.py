"""config.json: every dialect of the family is read, everything else is refused by name, in one line."""

import json
from dataclasses import replace

import pytest

from dsv3c.config import PRESETS, ModelConfig, Yarn, preset
from dsv3c.errors import ConfigError

R1 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
FP8 = R1["quantization_config"]
MOONLIGHT = R1 | {
    "rope_scaling": None, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
    "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "num_nextn_predict_layers": 0, "quantization_config": None,
    "pad_token_id": 163838, "eos_token_id": [163585, 163586],
}  # fmt: skip
V2_LITE = {
    key: value for key, value in R1.items() if key not in ("quantization_config", "num_nextn_predict_layers")
} | {
    "model_type": "deepseek_v2", "q_lora_rank": None, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
    "rope_scaling": R1["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip


def test_r1_is_the_preset():
    assert ModelConfig.from_dict(R1) == replace(preset("v3-671b"), quantization_config=FP8)


def test_every_dialect_reads_the_same():
    expected = ModelConfig.from_dict(R1)
    plain = {key: value for key, value in R1.items() if key not in ("rope_scaling", "rope_theta")}
    yarn = {key: value for key, value in R1["rope_scaling"].items() if key != "type"}
    transformers_4 = plain | {"rope_theta": 10000.0, "rope_scaling": yarn | {"type": "yarn", "rope_type": "yarn"}}
    transformers_5 = plain | {
        "rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": 10000.0},
        "dtype": "bfloat16",
        "head_dim": 64,
        "qk_head_dim": 192,
        "rope_interleave": True,
    }
    assert ModelConfig.from_dict(transformers_4) == expected
    assert ModelConfig.from_dict(transformers_5) == expected
    unscaled = {"rope_type": "default", "rope_theta": 50000.0}
    assert ModelConfig.from_dict(plain | {"rope_parameters": unscaled}).rope_scaling is None


def test_family():
    moonlight = ModelConfig.from_dict(MOONLIGHT)
    assert (moonlight.q_lora_rank, moonlight.rope_scaling, moonlight.rope_theta) == (None, None, 50000.0)
    assert moonlight.eos_token_id == (163585, 163586)
    kimi = ModelConfig.from_dict(R1 | {"model_type": "kimi_k2", "n_routed_experts": 384, "n_group": 1, "topk_group": 1})
    assert kimi.n_routed_experts == 384
    v2 = ModelConfig.from_dict(V2_LITE)
    assert (v2.scoring_func, v2.topk_method, v2.num_nextn_predict_layers) == ("softmax", "greedy", 0)
    unnamed = {key: value for key, value in V2_LITE.items() if key not in ("scoring_func", "topk_method")}
    assert ModelConfig.from_dict(unnamed) == v2
    v31 = ModelConfig.from_dict(R1 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}})
    assert v31.quantization_config["scale_fmt"] == "ue8m0"
    assert ModelConfig.from_dict(R1 | {"n_shared_experts": None}).n_shared_experts == 0
    k25 = {"model_type": "kimi_k25", "vision_config": {}, "text_config": MOONLIGHT}
    assert ModelConfig.from_dict(k25) == moonlight


@pytest.mark.parametrize("name", PRESETS)
def test_written_configs_read_the_same(name, tmp_path):
    config = replace(PRESETS[name], quantization_config=FP8, eos_token_id=(1, 2))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.from_folder(tmp_path) == config
    assert hash(config) == hash(replace(config))


def test_yarn_factors():
    """V3: ms(40)²; V2: cancels on cos and sin; absent: on cos and sin alone (references.md §6, transformers)."""
    ms = 0.1 * 3.6888794541139363 + 1.0  # 0.1 ln 40 + 1
    assert (Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0).attention_factor()) == 1.0
    assert Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0).softmax_factor() == ms**2
    assert (Yarn(40.0, 4096).attention_factor(), Yarn(40.0, 4096).softmax_factor()) == (ms, 1.0)
    assert Yarn(1.0, 4096, mscale=2.0, mscale_all_dim=1.0).attention_factor() == 1.0


def test_with_experts():
    config = preset("v3-671b")
    share = config.with_experts(8)
    assert (share.n_routed_experts, share.num_experts_per_tok, share.n_group, share.topk_group) == (8, 8, 1, 1)
    assert config.with_experts(64).num_experts_per_tok == 8
    assert replace(share, n_routed_experts=256, n_group=8, topk_group=4) == config
    with pytest.raises(ConfigError, match="n_routed_experts"):
        config.with_experts(0)


def test_with_layers():
    config = preset("v3-671b")
    assert config.with_layers(61) == config
    for layers, dense in ((1, 1), (2, 1), (4, 1), (30, 1), (40, 2), (122, 6)):
        fewer = config.with_layers(layers)
        assert (fewer.num_hidden_layers, fewer.first_k_dense_replace) == (layers, dense)
    assert config.with_layers(2).moe_layers == (False, True, True)  # the last is MTP's
    assert replace(config, first_k_dense_replace=0).with_layers(3).first_k_dense_replace == 0
    with pytest.raises(ConfigError, match="num_hidden_layers: expected at least 1, found 0"):
        config.with_layers(0)


BAD = [
    ({"model_type": "deepseek_v32"}, "model_type: expected one of deepseek_v3, .*, found 'deepseek_v32'"),
    ({"model_type": "deepseek_v4"}, "model_type: .*found 'deepseek_v4'"),
    ({"model_type": "kimi_linear"}, "model_type: .*found 'kimi_linear'"),
    ({"model_type": None}, "model_type: .*found None"),
    ({"model_type": ["deepseek_v3"]}, "model_type: "),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quant_method: .*found 'compressed-tensors'"),
    ({"quantization_config": FP8 | {"weight_block_size": [64, 64]}}, "weight_block_size: .*found .64, 64"),
    ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "activation_scheme: expected 'dynamic'"),
    ({"quantization_config": FP8 | {"scale_fmt": "ue4m3"}}, "scale_fmt: expected 'ue8m0'"),
    ({"quantization_config": "fp8"}, "quantization_config: expected an object"),
    ({"moe_layer_freq": 2}, "moe_layer_freq: expected 1, the only one supported, found 2"),
    ({"hidden_act": "gelu"}, "hidden_act: expected 'silu'"),
    ({"attention_bias": True}, "attention_bias: expected False"),
    ({"attention_dropout": 0.1}, "attention_dropout: expected 0.0"),
    ({"rope_interleave": False}, "rope_interleave: expected True"),
    ({"scoring_func": "tanh"}, "scoring_func, topk_method: expected sigmoid/noaux_tc or .*found 'tanh/noaux_tc'"),
    ({"topk_method": "greedy"}, "scoring_func, topk_method: .*found 'sigmoid/greedy'"),
    ({"n_group": 7}, "n_group: expected a divisor of n_routed_experts 256, found 7"),
    ({"n_group": 256, "topk_group": 8}, "n_group: expected groups of two or more"),
    ({"topk_group": 9}, "topk_group: expected at most n_group 8, found 9"),
    ({"num_experts_per_tok": 129}, "num_experts_per_tok: expected at most the 128 experts"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers: expected 0 or 1, found 2"),
    ({"num_key_value_heads": 8}, "num_key_value_heads: expected num_attention_heads"),
    ({"hidden_size": "7168"}, "hidden_size: expected an integer from 1 to 16777216, found '7168'"),
    ({"hidden_size": 7168.0}, "hidden_size: expected an integer"),
    ({"hidden_size": 0}, "hidden_size: expected an integer .*found 0"),
    ({"hidden_size": 10**30}, "hidden_size: expected an integer from 1 to"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers: expected an integer from 1 to 4096"),
    ({"n_shared_experts": []}, "n_shared_experts: expected an integer from 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers: expected an integer"),
    ({"hidden_size": None}, "hidden_size: expected a value"),
    ({"q_lora_rank": 0}, "q_lora_rank: expected a positive integer or null"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim: expected an even number"),
    ({"norm_topk_prob": 1}, "norm_topk_prob: expected true or false"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number"),
    ({"rope_theta": -1}, "rope_theta: expected a positive number"),
    ({"rope_theta": 1}, "rope_theta: expected more than 1"),
    ({"eos_token_id": ["</s>"]}, "eos_token_id: expected a token id"),
    ({"n_groups": 8}, "n_groups: expected no such key, found 8; did you mean 'n_group'"),
    ({"index_topk": 2048}, "index_topk: expected no such key, found 2048"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: expected no such key.*does not change the mathematics"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type: expected 'yarn' or none, found 'linear'"),
    ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2}}, "rope_scaling.type: .*found 'linear'"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: expected a number"),
    ({"rope_scaling": {"factor": 40}}, "rope_scaling: expected a type"),
    ({"rope_scaling": [40]}, "rope_scaling: expected an object"),
    ({"rope_scaling": False}, "rope_scaling: expected an object"),
    ({"rope_scaling": R1["rope_scaling"] | {"factor": 0.5}}, "rope_scaling.factor: expected at least 1"),
    ({"rope_scaling": R1["rope_scaling"] | {"factor": "40"}}, "rope_scaling.factor: expected a positive number"),
    ({"rope_scaling": R1["rope_scaling"] | {"beta_fast": 0.5}}, "rope_scaling.beta_fast: expected at least beta_slow"),
    ({"rope_scaling": R1["rope_scaling"] | {"attention_factor": 1.2}}, "rope_scaling: expected .*attention_factor"),
    ({"rope_scaling": R1["rope_scaling"] | {"truncate": False}}, "rope_scaling.truncate: expected True"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda value: str(value)[:60])
def test_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=f"^somewhere/config.json: .*{message}") as error:
        ModelConfig.from_dict(R1 | change, where="somewhere/config.json")
    assert "\n" not in str(error.value)


def test_int4_kimi_is_refused():
    int4 = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    for k25 in ({"text_config": MOONLIGHT | {"quantization_config": int4}},
                {"text_config": {k: v for k, v in MOONLIGHT.items() if k != "quantization_config"},
                 "quantization_config": int4}):  # fmt: skip
        with pytest.raises(ConfigError, match=r"text_config: quantization_config.quant_method: .*compressed-tensors"):
            ModelConfig.from_dict({"model_type": "kimi_k25", **k25})


def test_softmax_gates_do_not_normalise():
    with pytest.raises(ConfigError, match="norm_topk_prob: expected false with a softmax gate"):
        ModelConfig.from_dict(V2_LITE | {"norm_topk_prob": True})


def test_features_that_are_off_may_be_named():
    assert ModelConfig.from_dict(R1 | {"sliding_window": None, "use_qk_norm": False, "_commit_hash": "abc"})


def test_files(tmp_path):
    with pytest.raises(ConfigError, match=r"config.json: expected a readable file, found No such file"):
        ModelConfig.from_folder(tmp_path)
    for text, message in (("{", "expected JSON"), ("[]", "expected a JSON object, found list"), ("\xff", "expected")):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=f"config.json: {message}"):
            ModelConfig.from_folder(tmp_path)


def test_unknown_preset():
    with pytest.raises(ConfigError, match="found 'v3-671'; did you mean 'v3-671b'"):
        preset("v3-671")
