"""The model's config: HF's config.json, keys verbatim, read in every dialect, checked, and refused by name if foreign.

A key this file does not know is refused unless its value is null or false: silently dropped keys are how a model that
merely looks like DeepSeek-V3 (sparse attention, soft caps, other gates) gets run as if it were one. Keys that cannot
change the forward pass (`HARMLESS`) are skipped, keys that name the only behaviour there is (`ONLY`) are checked.
Needs no torch. Sources: config.json of the checkpoints in the family, transformers' DeepseekV3Config.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dsv3c.errors import ConfigError

MODEL_TYPES = ("deepseek_v3", "kimi_k2", "deepseek_v2")
# (scoring_func, topk_method): V3's biased sigmoid gate and V2's two softmax gates.
GATES = (("sigmoid", "noaux_tc"), ("softmax", "greedy"), ("softmax", "group_limited_greedy"))
# What an implementation could vary and this one does not; null means the one value.
ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "is_encoder_decoder": False,
}
# Far beyond any model, and small enough to fail here and not in an allocation; float32 counts positions exactly so far.
LARGEST_SIZE = 2**24
LARGEST_DEPTH = 2**12
HARMLESS = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "ep_size"),
    *("pretraining_tp", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "output_router_logits", "head_dim"),
    *("qk_head_dim", "unsloth_fixed", "unsloth_version", "id2label", "label2id", "problem_type", "tokenizer_class"),
    *("task_specific_params", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
}


def _expect(ok: bool, key: str, expected: str, found: Any, hint: str = "") -> None:
    if not ok:
        raise ConfigError(f"{key}: expected {expected}, found {found!r}" + (f"; {hint}" if hint else ""))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Yarn:
    """`rope_scaling` of type yarn: rotary frequencies stretched by `factor` beyond the pre-training length."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            optional = name.startswith("mscale")
            ok = (optional and value is None) or (_is_number(value) and (value > 0 or (optional and value == 0)))
            _expect(ok, f"rope_scaling.{name}", "a positive number" + (", 0 or null" if optional else ""), value)
        _expect(self.factor >= 1, "rope_scaling.factor", "at least 1", self.factor)
        _expect(self.beta_fast >= self.beta_slow, "rope_scaling.beta_fast", "at least beta_slow", self.beta_fast)

    def attention_factor(self) -> float:
        """Multiplies cos and sin."""
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def softmax_factor(self) -> float:
        """Multiplies the softmax scale."""
        return self._mscale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """One decoder of the DeepSeek-V3 family. Raises ConfigError, naming the key, for what cannot be run."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    first_k_dense_replace: int
    norm_topk_prob: bool
    max_position_embeddings: int
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    num_nextn_predict_layers: int = 0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    quantization_config: dict[str, Any] | None = field(default=None, hash=False)
    model_type: str = "deepseek_v3"

    def __post_init__(self) -> None:
        _expect(self.model_type in MODEL_TYPES, "model_type", f"one of {', '.join(MODEL_TYPES)}", self.model_type,
                "other architectures are not DeepSeek-V3, however alike their configs look")  # fmt: skip
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int:
                low = 0 if f.name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers") else 1
                high = LARGEST_DEPTH if f.name == "num_hidden_layers" else LARGEST_SIZE
                ok = type(value) is int and low <= value <= high
                _expect(ok, f.name, f"an integer from {low} to {high}", value)
            elif f.type is float:
                _expect(_is_number(value) and value > 0, f.name, "a positive number", value)
            elif f.type is bool:
                _expect(isinstance(value, bool), f.name, "true or false", value)
        _expect(self.rope_theta > 1, "rope_theta", "more than 1", self.rope_theta)
        rank, rope = self.q_lora_rank, self.qk_rope_head_dim
        _expect(rank is None or (type(rank) is int and rank > 0), "q_lora_rank", "a positive integer or null", rank)
        _expect(rope % 2 == 0, "qk_rope_head_dim", "an even number (rotated in pairs)", rope)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, key)
            ids = ids if isinstance(ids, tuple) and key == "eos_token_id" else () if ids is None else (ids,)
            _expect(all(type(i) is int for i in ids), key, "a token id or null", getattr(self, key))
        _expect(self.num_nextn_predict_layers <= 1, "num_nextn_predict_layers", "0 or 1", self.num_nextn_predict_layers)
        self._check_gate()
        if self.quantization_config is not None:
            self._check_quantization(self.quantization_config)

    def _check_gate(self) -> None:
        gate = (self.scoring_func, self.topk_method)
        _expect(gate in GATES, "scoring_func, topk_method", " or ".join(map("/".join, GATES)), "/".join(map(str, gate)))
        experts, groups = self.n_routed_experts, self.n_group
        _expect(experts % groups == 0, "n_group", f"a divisor of n_routed_experts {experts}", groups)
        _expect(self.topk_group <= groups, "topk_group", f"at most n_group {groups}", self.topk_group)
        reachable = experts // groups * self.topk_group
        _expect(self.num_experts_per_tok <= reachable, "num_experts_per_tok",
                f"at most the {reachable} experts of topk_group groups", self.num_experts_per_tok)  # fmt: skip
        if self.scoring_func == "sigmoid":
            _expect(groups == 1 or experts // groups >= 2, "n_group", "groups of two or more experts", groups)
        else:
            # transformers ignores the key here, DeepSeek's V2 code then leaves the scaling factor out.
            _expect(not self.norm_topk_prob, "norm_topk_prob", "false with a softmax gate", self.norm_topk_prob)

    @staticmethod
    def _check_quantization(quantization: Any) -> None:
        _expect(isinstance(quantization, dict), "quantization_config", "an object or null", quantization)
        method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
        _expect(method == "fp8", "quantization_config.quant_method", "'fp8' (block-wise e4m3)", method,
                "convert the checkpoint to fp8 or bf16 first")  # fmt: skip
        _expect(block == [128, 128], "quantization_config.weight_block_size", "[128, 128]", block)
        for key, only in {"fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}.items():
            value = quantization.get(key)
            _expect(value in (None, only), f"quantization_config.{key}", repr(only), value)

    @property
    def moe_layers(self) -> tuple[bool, ...]:
        """For each layer, MTP's included: does it route to experts?"""
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        return tuple(index >= self.first_k_dense_replace for index in range(layers))

    @property
    def latent_dim(self) -> int:
        """Cached values per token and layer: the normed latent and the rotated key (512 + 64 = 576 in V3)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        return scale * self.rope_scaling.softmax_factor() if self.rope_scaling else scale

    def with_layers(self, num_layers: int) -> "ModelConfig":
        """The same model with fewer (or more) layers: the share of dense ones is kept, at least one if there is any."""
        _expect(type(num_layers) is int and num_layers >= 1, "num_hidden_layers", "at least 1", num_layers)
        dense = round(self.first_k_dense_replace * num_layers / self.num_hidden_layers)
        dense = max(dense, min(1, self.first_k_dense_replace))
        return replace(self, num_hidden_layers=num_layers, first_k_dense_replace=dense)

    def with_experts(self, num_experts: int) -> "ModelConfig":
        """The same model with fewer (or more) routed experts, all in one group: 8 are a GPU's share of V3's when 32
        hold a copy, where each of its tokens' 8 experts stands for one of another GPU's."""
        _expect(type(num_experts) is int and num_experts >= 1, "n_routed_experts", "at least 1", num_experts)
        top_k = min(self.num_experts_per_tok, num_experts)
        return replace(self, n_routed_experts=num_experts, num_experts_per_tok=top_k, n_group=1, topk_group=1)

    def to_dict(self) -> dict[str, Any]:
        """config.json in DeepSeek's dialect, as transformers and DeepSeek's own code read it (no torch_dtype)."""
        out = {key: value for key, value in asdict(self).items() if value is not None or key == "q_lora_rank"}
        if self.rope_scaling:
            yarn = {key: value for key, value in asdict(self.rope_scaling).items() if value is not None}
            out["rope_scaling"] = {"type": "yarn", **yarn}
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        architecture = "DeepseekV2ForCausalLM" if self.model_type == "deepseek_v2" else "DeepseekV3ForCausalLM"
        fixed = {key: ONLY[key] for key in ("hidden_act", "attention_bias", "attention_dropout", "moe_layer_freq")}
        return {"architectures": [architecture], **out, **fixed, "num_key_value_heads": self.num_attention_heads}

    @classmethod
    def from_folder(cls, path: str | Path) -> "ModelConfig":
        """Reads `path`/config.json."""
        file = Path(path) / "config.json"
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{file}: expected a readable file, found {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{file}: expected JSON, found {error}") from None
        return cls.from_dict(raw, where=str(file))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Reads DeepSeek's dialect (`rope_theta`, `rope_scaling.type`), transformers 4's (both `type` and `rope_type`)
        and 5's (`rope_parameters`), and the `text_config` of Kimi's multimodal wrappers. Raises ConfigError."""
        if not isinstance(raw, dict):
            raise ConfigError(f"{where}: expected a JSON object, found {type(raw).__name__}")
        if isinstance(raw.get("text_config"), dict) and str(raw.get("model_type")).startswith("kimi_k2"):
            outer = {"quantization_config": raw.get("quantization_config")}
            return cls.from_dict(outer | raw["text_config"], where=f"{where} text_config")
        try:
            return cls(**_read(raw, cls))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def _read(raw: dict[str, Any], cls: type[ModelConfig]) -> dict[str, Any]:
    known = {f.name for f in fields(cls)}
    out: dict[str, Any] = {"model_type": raw.get("model_type")}
    _expect(out["model_type"] in MODEL_TYPES, "model_type", f"one of {', '.join(MODEL_TYPES)}", out["model_type"],
            "other architectures are not DeepSeek-V3, however alike their configs look")  # fmt: skip
    if out["model_type"] == "deepseek_v2":
        out |= {"scoring_func": "softmax", "topk_method": "greedy"}
    for key, value in raw.items():
        if key in ONLY:
            _expect(value is None or value == ONLY[key], key, f"{ONLY[key]!r}, the only one supported", value)
        elif key in known:
            # Null stands for the default, and for none of an optional part.
            if value is not None or key in ("q_lora_rank", "n_shared_experts"):
                out[key] = value
        elif key not in HARMLESS and key not in ("rope_parameters", "num_key_value_heads") and not key.startswith("_"):
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it if it does not change the mathematics"
            _expect(value in (None, False), key, "no such key", value, hint)
    missing = [f.name for f in fields(cls) if f.default is f.default_factory and f.name not in out]
    _expect(not missing, ", ".join(missing), "a value", None)
    heads = raw.get("num_key_value_heads")
    _expect(heads in (None, out["num_attention_heads"]), "num_key_value_heads", "num_attention_heads (MLA)", heads)
    if out["n_shared_experts"] is None:
        out["n_shared_experts"] = 0
    if isinstance(out.get("eos_token_id"), list):
        out["eos_token_id"] = tuple(out["eos_token_id"])
    return out | _read_rope(raw, out["max_position_embeddings"])


def _read_rope(raw: dict[str, Any], max_position_embeddings: Any) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from `rope_parameters` (transformers 5) or the two keys of the same name."""
    rope = raw.get("rope_scaling") if raw.get("rope_parameters") is None else raw["rope_parameters"]
    rope = {} if rope is None else rope
    _expect(isinstance(rope, dict), "rope_scaling", "an object or null", rope)
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.get("type", "default"))
    _expect(kind in ("default", "yarn"), "rope_scaling.type", "'yarn' or none", kind)
    _expect(rope.pop("type", kind) == kind, "rope_scaling.type", f"the rope_type beside it, {kind!r}", "another")
    for key, only in {"truncate": True, "partial_rotary_factor": 1.0}.items():
        value = rope.pop(key, only)
        _expect(value == only, f"rope_scaling.{key}", f"{only!r}, the only one supported", value)
    if kind == "default":
        _expect(not rope, "rope_scaling", "a type", rope, 'add "type": "yarn"')
        return {"rope_theta": theta, "rope_scaling": None}
    known = {f.name for f in fields(Yarn)}
    _expect(rope.keys() <= known, "rope_scaling", f"keys among {', '.join(sorted(known))}", sorted(rope.keys() - known))
    _expect("factor" in rope, "rope_scaling.factor", "a number", None)
    rope.setdefault("original_max_position_embeddings", max_position_embeddings)
    return {"rope_theta": theta, "rope_scaling": Yarn(**rope)}


_V3_YARN = Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
_V3 = ModelConfig(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
    num_attention_heads=128, n_shared_experts=1, n_routed_experts=256, num_experts_per_tok=8,
    routed_scaling_factor=2.5, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128, first_k_dense_replace=3, norm_topk_prob=True, max_position_embeddings=163840, n_group=8,
    topk_group=4, rope_scaling=_V3_YARN, num_nextn_predict_layers=1, bos_token_id=0, eos_token_id=1,
)  # fmt: skip

PRESETS: dict[str, ModelConfig] = {
    "v3-671b": _V3,
    # DeepSeek-V2-Lite's sizes with V3's gate; the scaling factor is Moonlight's, which has the same experts.
    "v3-16b": replace(
        _V3, vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
        num_hidden_layers=27, num_attention_heads=16, n_shared_experts=2, n_routed_experts=64, num_experts_per_tok=6,
        routed_scaling_factor=2.446, q_lora_rank=None, first_k_dense_replace=1, n_group=1, topk_group=1,
        rope_scaling=replace(_V3_YARN, mscale=0.707, mscale_all_dim=0.707), num_nextn_predict_layers=0,
        bos_token_id=100000, eos_token_id=100001,
    ),
    # The shape of V3 at sizes that train on one GPU, and that run on a CPU.
    "v3-2.6b": replace(
        _V3, vocab_size=32768, hidden_size=1536, intermediate_size=4096, moe_intermediate_size=512,
        num_hidden_layers=16, num_attention_heads=16, n_routed_experts=64, q_lora_rank=512, first_k_dense_replace=1,
    ),
    "v3-120m": replace(
        _V3, vocab_size=16384, hidden_size=512, intermediate_size=1536, moe_intermediate_size=256,
        num_hidden_layers=8, num_attention_heads=8, n_routed_experts=32, num_experts_per_tok=4, q_lora_rank=256,
        kv_lora_rank=256, first_k_dense_replace=1, n_group=4, topk_group=2,
    ),
    # Everything the big one has, ragged 128-blocks included, in seconds on one core.
    "tiny": replace(
        _V3, vocab_size=1024, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, n_routed_experts=16, num_experts_per_tok=4, q_lora_rank=128, kv_lora_rank=128,
        qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, first_k_dense_replace=1, n_group=4, topk_group=2,
        max_position_embeddings=4096, rope_scaling=replace(_V3_YARN, original_max_position_embeddings=128),
    ),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """A config by name. Raises ConfigError naming the nearest one."""
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "or a folder that holds a config.json"
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r}; {hint}")
    return PRESETS[name]
