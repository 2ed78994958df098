"""Fixtures of the compiler's tests: small models of both families, and how to compile, call and compare them."""

import copy
import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch

from dsv3c.compiler import compilation_of, compile
from dsv3c.config import preset
from dsv3c.model import DeepseekV3
from dsv3c.numerics import MODEL_DISTANCE, distance

# One dense and two MoE layers; sizes are multiples of 128 where V3's are.
SMALL = replace(preset("tiny"), num_hidden_layers=3, vocab_size=256)


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights with a clear signal: at the initial 0.02 a tiny model's layers hardly change their input."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
    return model.eval()


@pytest.fixture
def gpu_model() -> DeepseekV3:
    """One dense and one MoE layer of sizes that kernels take, with weights as they are initialised."""
    config = replace(
        preset("v3-671b").with_layers(2), vocab_size=256, hidden_size=1024, intermediate_size=2048,
        num_attention_heads=16, moe_intermediate_size=256, n_routed_experts=32,
    )  # fmt: skip
    with torch.device("cuda"):
        return DeepseekV3(config).bfloat16()


def our_model(dtype=torch.float32, **changes) -> DeepseekV3:
    return spread(DeepseekV3(replace(SMALL, **changes)).to(dtype))


def their_model(dtype=torch.float32, **changes):
    transformers = pytest.importorskip("transformers", reason="their model: pip install 'dsv3c[hf]'")
    config = transformers.DeepseekV3Config(
        **{
            "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1,
            "n_routed_experts": 16, "kv_lora_rank": 128, "q_lora_rank": 128, "qk_rope_head_dim": 32, "v_head_dim": 64,
            "qk_nope_head_dim": 64, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
            "first_k_dense_replace": 1, "max_position_embeddings": 4096,
            **changes,
        }
    )  # fmt: skip
    return spread(transformers.DeepseekV3ForCausalLM(config).to(dtype))


MODELS = {"ours": our_model, "transformers": their_model}


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param]()


@pytest.fixture(params=list(MODELS))
def dense_model(request):
    """Two equal layers without experts, for what has nothing to do with these: a MoE takes twice as long to compile."""
    return MODELS[request.param](num_hidden_layers=2, first_k_dense_replace=2)


@cache
def compiled_once(file, family):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[family]()
    return model, compile(model, precision="exact")


@pytest.fixture(params=list(MODELS))
def shared(request):
    """A model and its compilation in exact precision, for all tests of a file that change neither: what one of them
    has called is compiled for the next."""
    return compiled_once(request.path, request.param)


@pytest.fixture
def our_shared(request):
    return compiled_once(request.path, "ours")


@pytest.fixture
def their_shared(request):
    return compiled_once(request.path, "transformers")


@pytest.fixture
def make_model():
    return our_model


@pytest.fixture
def make_their_model():
    return their_model


@pytest.fixture
def compiled():
    """compile(model, precision, ...) without the note about FP8 on a CPU."""

    def make(model, precision="exact", **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compile(model, precision=precision, **kwargs)

    return make


@pytest.fixture
def logits():
    def run(model, ids, **kwargs):
        out = model(ids, **kwargs)
        return out if isinstance(out, torch.Tensor) else out.logits

    return run


@pytest.fixture
def units():
    return lambda model: compilation_of(model).units.units


@pytest.fixture
def float64():
    """float64(model): a copy that computes in it."""

    def make(model):
        exact = copy.deepcopy(model).double()
        if hasattr(exact, "set_experts_implementation"):
            exact.set_experts_implementation("eager")  # transformers' grouped products know no float64
        return exact

    return make


@pytest.fixture
def close():
    """As close to the float64 evaluation as eager is, up to the factor that evaluation orders make."""

    def compare(out, eager, exact) -> bool:
        return all(c <= MODEL_DISTANCE * e for c, e in zip(distance(out, exact), distance(eager, exact), strict=True))

    return compare
