"""Small checkpoints in the published layouts, written without dsv3c: names and shapes from the config's keys, random
bits for values, and an oracle that decodes FP8 from its definition."""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "seq_aux": True,
    "ep_size": 1, "pretraining_tp": 1, "vocab_size": 96, "hidden_size": 256, "intermediate_size": 384,
    "moe_intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5,
    "kv_lora_rank": 128, "q_lora_rank": 192, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": True, "max_position_embeddings": 512,
    "n_group": 4, "topk_group": 2, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "initializer_range": 0.02,
    "rope_scaling": {
        "type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128,
    },
    "bos_token_id": 0, "eos_token_id": 1, "transformers_version": "4.33.1", "use_cache": True,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "quantization_config": FP8,
}  # fmt: skip
BF16 = {"quantization_config": None, "num_nextn_predict_layers": 0}
# What is peculiar to each member of the family, at small sizes.
FAMILY: dict[str, dict[str, Any]] = {
    "v3": V3,
    # Nothing a multiple of 128: gate and up have blocks of their own, each with a ragged last one.
    "ragged": V3 | {"hidden_size": 320, "moe_intermediate_size": 160, "intermediate_size": 200, "q_lora_rank": 136},
    "v3.1": V3 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
    "moonlight": V3 | BF16 | {
        "q_lora_rank": None, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446,
        "rope_scaling": None, "rope_theta": 50000.0, "rms_norm_eps": 1e-5,
    },
    "kimi-k2": V3 | {
        "model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "n_routed_experts": 12, "num_attention_heads": 2,
        "num_key_value_heads": 2, "rope_theta": 50000.0, "num_nextn_predict_layers": 0,
        "rope_scaling": V3["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    },
    "v2-lite": V3 | BF16 | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "q_lora_rank": None,
        "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "scoring_func": "softmax", "topk_method": "greedy",
        "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "tied": V3 | BF16 | {"tie_word_embeddings": True},
}  # fmt: skip


def layout(c: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, kind) of every weight, in the order of the layers; kind: linear, other or bias."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    query = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    layers, mtp = c["num_hidden_layers"], c["num_nextn_predict_layers"]

    def mlp(path: str, width: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
        yield f"{path}.gate_proj.weight", (width, hidden), "linear"
        yield f"{path}.up_proj.weight", (width, hidden), "linear"
        yield f"{path}.down_proj.weight", (hidden, width), "linear"

    yield "model.embed_tokens.weight", (c["vocab_size"], hidden), "other"
    for layer in range(layers + mtp):
        path, attention = f"model.layers.{layer}", f"model.layers.{layer}.self_attn"
        if c["q_lora_rank"]:
            yield f"{attention}.q_a_proj.weight", (c["q_lora_rank"], hidden), "linear"
            yield f"{attention}.q_a_layernorm.weight", (c["q_lora_rank"],), "other"
            yield f"{attention}.q_b_proj.weight", (query, c["q_lora_rank"]), "linear"
        else:
            yield f"{attention}.q_proj.weight", (query, hidden), "linear"
        rank = c["kv_lora_rank"]
        yield f"{attention}.kv_a_proj_with_mqa.weight", (rank + c["qk_rope_head_dim"], hidden), "linear"
        yield f"{attention}.kv_a_layernorm.weight", (rank,), "other"
        yield f"{attention}.kv_b_proj.weight", (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), rank), "linear"
        yield f"{attention}.o_proj.weight", (hidden, heads * c["v_head_dim"]), "linear"
        if layer < c["first_k_dense_replace"]:
            yield from mlp(f"{path}.mlp", c["intermediate_size"])
        else:
            yield f"{path}.mlp.gate.weight", (c["n_routed_experts"], hidden), "other"
            if c["topk_method"] == "noaux_tc":
                yield f"{path}.mlp.gate.e_score_correction_bias", (c["n_routed_experts"],), "bias"
            for expert in range(c["n_routed_experts"]):
                yield from mlp(f"{path}.mlp.experts.{expert}", c["moe_intermediate_size"])
            yield from mlp(f"{path}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])
        yield f"{path}.input_layernorm.weight", (hidden,), "other"
        yield f"{path}.post_attention_layernorm.weight", (hidden,), "other"
        if layer == layers:
            yield f"{path}.enorm.weight", (hidden,), "other"
            yield f"{path}.hnorm.weight", (hidden,), "other"
            yield f"{path}.eh_proj.weight", (hidden, 2 * hidden), "other"
            yield f"{path}.shared_head.norm.weight", (hidden,), "other"
            yield f"{path}.embed_tokens.weight", (c["vocab_size"], hidden), "other"
            yield f"{path}.shared_head.head.weight", (c["vocab_size"], hidden), "other"
    yield "model.norm.weight", (hidden,), "other"
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], hidden), "other"


def random_tensors(c: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor on disk, by name. FP8: any code but NaN; scales: another magnitude for each block."""
    tensors: dict[str, Tensor] = {}
    for name, shape, kind in layout(c):
        if kind == "bias":
            tensors[name] = torch.randn(shape) * 0.1
        elif kind == "linear" and c["quantization_config"]:
            codes = torch.randint(0, 127, shape, dtype=torch.uint8) | torch.randint(0, 2, shape, dtype=torch.uint8) << 7
            tensors[name] = codes.view(torch.float8_e4m3fn)
            scale_inv = torch.rand([-(-size // 128) for size in shape]) * 2e-3 / shape[1] ** 0.5 + 1e-5
            # V3.1's are powers of two, but V3.1-Terminus' o_proj ones are not.
            if c["quantization_config"].get("scale_fmt") == "ue8m0" and "o_proj" not in name:
                scale_inv = scale_inv.log2().ceil().exp2()
            tensors[f"{name}_scale_inv"] = scale_inv
        else:
            spread = torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.2)
            tensors[name] = (spread + (len(shape) == 1)).bfloat16()
    mtp = f"model.layers.{c['num_hidden_layers']}"
    if f"{mtp}.embed_tokens.weight" in tensors:
        tensors[f"{mtp}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{mtp}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    if c["model_type"] == "kimi_k2":
        for layer in range(c["num_hidden_layers"]):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(28).bfloat16()
    return tensors


def decode_e4m3(x: Tensor) -> np.ndarray:
    """Sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity."""
    codes = x.view(torch.uint8).numpy()
    exponent, mantissa = (codes >> 3 & 15).astype(np.float64), (codes & 7) / 8
    magnitude = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    return np.where(codes >> 7, -magnitude, magnitude)


@dataclass
class Checkpoint:
    """A checkpoint folder and what was written into it."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    weight_map: dict[str, str] = field(default_factory=dict)

    def write(self, shards: int = 3, digits: tuple[int, int] = (5, 6)) -> "Checkpoint":
        """Deals the tensors out in turn, so that scales lie apart from their weights."""
        names = list(self.tensors)
        for shard in range(shards):
            file = f"model-{shard + 1:0{digits[0]}d}-of-{shards:0{digits[1]}d}.safetensors"
            here = names[shard::shards]
            self.weight_map |= dict.fromkeys(here, file)
            save_file({name: self.tensors[name].contiguous() for name in here}, self.folder / file)
        self.write_json()
        return self

    def write_json(self) -> None:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        size = sum(self.tensors[name].nbytes for name in self.weight_map if name in self.tensors)
        index = {"metadata": {"total_size": size}, "weight_map": self.weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def exact(self, name: str) -> Tensor:
        """The float64 value of a weight: one scale for each block of 128x128."""
        tensor, scale_inv = self.tensors[name], self.tensors.get(f"{name}_scale_inv")
        if scale_inv is None:
            return tensor.double()
        values, scales = decode_e4m3(tensor), scale_inv.double().numpy()
        row, column = np.indices(values.shape) // 128
        return torch.from_numpy(values * scales[row, column])


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def family() -> dict[str, dict[str, Any]]:
    return FAMILY


@pytest.fixture
def make(tmp_path) -> Callable[..., Checkpoint]:
    """make(name, write=True, **changes to the config): one of FAMILY, in a folder of its own."""

    def make(name: str, write: bool = True, **changes: Any) -> Checkpoint:
        folder = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        config = FAMILY[name] | changes
        checkpoint = Checkpoint(folder, config, random_tensors(config))
        if not write:
            return checkpoint
        return checkpoint.write(digits=(1, 1) if name == "kimi-k2" else (5, 6))

    return make
