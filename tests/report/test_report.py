"""`dsv3c.explain` on a small model, ours and transformers'; no code is generated."""

import json
import re
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import dsv3c
from dsv3c.artifact import MODES
from dsv3c.artifact_check import fp8_products
from dsv3c.config import preset
from dsv3c.errors import CompileError
from dsv3c.measure import Launch
from dsv3c.model import DeepseekV3
from dsv3c.passes import ChooseSaved, Record, Skipped
from dsv3c.report import Report, UnitReport
from dsv3c.tuning import targets

SMALL = replace(preset("tiny"), num_hidden_layers=2, first_k_dense_replace=0, vocab_size=64)
PREFILL, TRAINING, _ = MODES
IDS = torch.zeros(2, 17, dtype=torch.long)


def compiled(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that FP8 is emulated; the report says so
        return dsv3c.compile(model, **options)


@pytest.fixture(scope="module")
def model():
    return DeepseekV3(SMALL).bfloat16().eval()


@pytest.fixture(scope="module")
def explained(model, without_codegen):
    """A model compiled for training in FP8, and its report."""
    result = compiled(model, precision="fp8", target="h800", memory={"moe": "none"})
    return result, dsv3c.explain(result, IDS)


def products(unit):
    return sum("gemm" in operator["operator"] for operator in unit["operators"])


def test_a_model_that_was_not_called_is_refused(model):
    with pytest.raises(CompileError, match=r"been called.*try dsv3c\.explain\(compiled, input_ids\)"):
        dsv3c.explain(compiled(model))


def test_an_eager_model_is_refused(model):
    with pytest.raises(CompileError, match="found an eager DeepseekV3"):
        dsv3c.explain(model, IDS)


def test_a_report_of_training(explained):
    _, report = explained
    document = report.to_dict()
    assert document == json.loads(json.dumps(document))
    assert (document["precision"], document["target"]) == ("fp8", "h800")
    assert any("emulated" in note for note in document["notes"])

    rotary, unit, _, head = document["units"]
    assert [u["modules"] for u in document["units"]] == [1, 2, 1, 1]
    assert [region["kind"] for region in rotary["regions"]] == ["rotary"]
    assert [region["kind"] for region in head["regions"]] == ["head"]
    assert head["flops"] == 3 * 2 * IDS.numel() * SMALL.vocab_size * SMALL.hidden_size
    assert unit["inputs"][0] == "bfloat16[2, 17, 256]"
    assert products(unit) == fp8_products(SMALL, "moe_layer", TRAINING)
    for quantity in ("flops", "moved_bytes", "nodes", "saved_bytes"):
        assert sum(region[quantity] for region in unit["regions"]) == unit[quantity] > 0
    for quantity in ("flops", "moved_bytes", "nodes"):
        assert sum(operator[quantity] for operator in unit["operators"]) == unit[quantity]
    assert {step["name"]: step["level"] for step in unit["passes"]}["RaiseAttention"] == "L0"
    assert all(step["time_us"] > 0 for step in unit["passes"])
    assert any(operator["backward"] for operator in unit["operators"])

    kinds = {region["path"]: region["kind"] for region in unit["regions"]}
    expected = {
        "input_layernorm": "norm", "self_attn": "attention", "self_attn.o_proj": "linear",
        "mlp.gate": "router", "mlp.experts": "experts", "mlp.shared_experts.down_proj": "linear", "layer": "layer",
    }  # fmt: skip
    assert expected.items() <= kinds.items()
    policies = {region["path"]: region["memory"] for region in unit["regions"]}
    assert {policy == "none" for path, policy in policies.items() if path and path.startswith("mlp")} == {True}
    assert {policy == "default" for path, policy in policies.items() if not path or path[:3] != "mlp"} == {True}
    # What autograd adds up where paths meet belongs to no module.
    assert set(unit["unrecognised"]) == {"aten.add.Tensor"}


def test_what_the_graph_costs_before_and_after_each_pass(explained):
    unit = explained[1].to_dict()["units"][1]
    captured, joint = ([p for p in unit["passes"] if p["level"] == level] for level in ("L0", "L1"))
    assert all(step["priced"] is None for step in captured)
    for step, following in pairwise(joint):
        assert step["priced"]["after"] == following["priced"]["before"]
    for step in joint:
        before, after = step["priced"]["before"], step["priced"]["after"]
        for key in ("nodes", "flops", "moved_bytes"):
            changes = sum(region["after"][key] - region["before"][key] for region in step["priced"]["regions"])
            assert after[key] - before[key] == changes
        if step["sites"] == 0:
            assert before == after
    fused = next(step for step in joint if step["name"] == "FuseNormBackward")["priced"]
    assert fused["after"]["moved_bytes"] < fused["before"]["moved_bytes"]
    (norm,) = (region for region in fused["regions"] if region["path"] == "input_layernorm")
    assert norm["kind"] == "norm"
    assert norm["after"]["moved_bytes"] < norm["before"]["moved_bytes"]


def test_the_text_names_units_regions_passes_and_calls_predictions_so(explained):
    text = str(explained[1])
    assert re.search(r"^mlp\.shared_experts\.down_proj +linear .* none ", text, re.MULTILINE)
    for word in ("moe_layer_many_sequences_many_tokens_training: of 2 modules", "mlp.experts", "QuantizeLinear",
                 "dsv3c.gemm", "MB before", "operators after", "saved MB  memory", "predicted forward us",
                 "predicted backward us", "note: FP8 is emulated", "h800",
                 "in no recognised region, compiled by Inductor as they are: aten.add.Tensor"):  # fmt: skip
        assert word in text
    assert all("predicted" in word for line in text.splitlines() for word in line.split("  ") if word.endswith(" us"))


def test_the_reports_own_lowering_quantises_no_weight(explained):
    weights = explained[0]._dsv3c.weights
    eligible = {id(parameter) for parameter in explained[0].parameters()}
    assert weights.copies
    assert {weight for stack in weights.copies for weight in stack} <= eligible


def test_inference_in_exact_precision_and_the_earlier_calls(without_codegen):
    dense = DeepseekV3(replace(SMALL, num_hidden_layers=1, first_k_dense_replace=1)).bfloat16().eval()
    result = compiled(dense, precision="exact", target="cpu")
    with torch.no_grad():
        result(IDS)
        result(IDS[:, :1])
    report = dsv3c.explain(result)
    names = [unit.name for unit in report.units]
    assert names == [
        f"{kind}_many_sequences_{tokens}_inference"
        for tokens in ("many_tokens", "one_token")
        for kind in ("rotary", "dense_layer", "final_norm", "head")
    ]
    assert not any(products(unit.to_dict()) for unit in report.units)
    assert "predicted us" in str(report)
    assert "predicted backward us" not in str(report)
    assert not any("emulated" in note for note in report.notes)


def test_sites_left_alone_stand_in_both_forms_with_their_reason():
    left = Skipped("mlp.up_proj (linear)", "too odd")
    record = Record("QuantizeLinear", "QuantizeLinear()", "numeric", 0, 1.0, [left])
    unit = UnitReport("unit", 1, (), (), {}, ChooseSaved(), {"L1": [record]}, {})
    report = Report("fp8", targets.load("h800"), (), (unit,))
    assert "QuantizeLinear left mlp.up_proj (linear): too odd" in str(report)
    (step,) = report.to_dict()["units"][0]["passes"]
    assert step["skipped"] == [{"where": "mlp.up_proj (linear)", "reason": "too odd"}]


def test_what_lies_between_the_kernels():
    times = [(False, 10.0, 2.0), (False, 12.0, 3.0), (False, 20.0, 1.0), (True, 50.0, 4.0)]
    launches = tuple(Launch("layer", back, "fused", ("kernel",), (), start, time) for back, start, time in times)
    unit = UnitReport("unit", 1, (), (), {}, ChooseSaved(), {}, {}, launches)
    assert unit.to_dict()["gaps_us"] == {"forward": 5.0, "backward": 0.0}
    assert UnitReport("unit", 1, (), (), {}, ChooseSaved(), {}, {}, launches[:1]).gaps_us(True) is None


def test_transformers_model_has_the_same_regions(without_codegen):
    transformers = pytest.importorskip("transformers", reason="their model: pip install 'dsv3c[hf]'")
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=16, kv_lora_rank=128,
        q_lora_rank=128, qk_rope_head_dim=32, v_head_dim=64, qk_nope_head_dim=64, n_group=4, topk_group=2,
        num_experts_per_tok=4, first_k_dense_replace=0,
    )  # fmt: skip
    theirs = compiled(transformers.DeepseekV3ForCausalLM(config).bfloat16().eval(), precision="fp8", target="h800")
    with torch.no_grad():
        theirs(IDS, use_cache=False)
    _, unit, *_ = dsv3c.explain(theirs).to_dict()["units"]
    assert unit["name"] == "moe_layer_many_sequences_many_tokens_inference"
    assert products(unit) == fp8_products(SMALL, "moe_layer", PREFILL)
    kinds = {region["kind"] for region in unit["regions"]}
    assert {"attention", "norm", "linear", "layer", "router", "experts"} <= kinds
