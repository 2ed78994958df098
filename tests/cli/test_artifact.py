"""`compile_artifact` and `check_artifact` at V3's real sizes: what is written, and that damage is refused."""

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dsv3c import artifact as writer
from dsv3c.artifact import MODES, compile_artifact, kinds, unit_of
from dsv3c.artifact_check import check_artifact, fp8_linears, fp8_products, merged_linears, parse
from dsv3c.config import PRESETS, preset
from dsv3c.errors import ArtifactError, CompileError, ConfigError
from dsv3c.layers import DecoderLayer, Experts
from dsv3c.tuning import cross_compile

V3 = preset("v3-671b")
MODULES = {"dense_layer": 3, "moe_layer": 58, "rotary": 1, "final_norm": 1, "head": 1}


def unit_name(kind, mode):
    tokens = "many_tokens" if mode.tokens > 1 else "one_token_cached" if kind.endswith("layer") else "one_token"
    return f"{kind}_one_sequence_{tokens}_{'training' if mode.training else 'inference'}"


UNITS = {unit_name(kind, mode): (kind, mode) for kind in MODULES for mode in MODES}


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("config", [*PRESETS.values(), replace(preset("tiny"), n_shared_experts=0)])
def test_the_analytic_number_of_linears_is_the_models(config, moe):
    with torch.device("meta"):
        layer = DecoderLayer(config, moe=moe)
    linears = sum(isinstance(module, nn.Linear) for module in layer.modules())
    experts = sum(2 for module in layer.modules() if isinstance(module, Experts))
    kind = "moe_layer" if moe else "dense_layer"
    assert fp8_linears(config, kind) == linears + experts
    assert fp8_products(config, kind, MODES[1]) == 3 * (linears + experts - merged_linears(config, kind))


def test_an_artifact_of_the_real_sizes_passes_its_check(v3):
    artifact, steps = v3
    found = check_artifact(artifact.path)
    assert found["fp8_products"] == {name: fp8_products(V3, kind, mode) for name, (kind, mode) in UNITS.items()}
    assert found["kernels"] == [kernel["name"] for kernel in artifact.kernels]
    assert found["files"] == len(artifact.manifest["files"])
    assert [step for step in steps if step.startswith("lowering")] == [f"lowering {name}" for name in UNITS]
    files = {str(path.relative_to(artifact.path)) for path in artifact.path.rglob("*") if path.is_file()}
    assert files == {"manifest.json", *artifact.manifest["files"]}


def test_the_manifest_says_what_it_was_made_from(v3):
    manifest = json.loads((v3[0].path / "manifest.json").read_text())
    assert (manifest["target"], manifest["precision"], manifest["model"]) == ("h800", "fp8", "v3-671b")
    assert manifest["versions"]["torch"] == torch.__version__
    assert any(step.startswith("QuantizeLinear(recipe=Recipe(") for step in manifest["passes"])
    assert {name: unit["modules"] for name, unit in manifest["units"].items()} == {
        name: MODULES[kind] for name, (kind, _) in UNITS.items()
    }
    assert json.loads((v3[0].path / "config.json").read_text()) == V3.to_dict()


# Multiplied with another, whose region has the FLOPs of both.
MERGED = {"kv_a_proj_with_mqa": "q_a_proj", "up_proj": "gate_proj"}


def test_reported_flops_are_those_of_the_configs_linears(v3):
    """Every linear's region, forward and backward, against its sizes: an oracle that shares nothing with the graphs."""
    units = {unit["name"]: unit for unit in v3[0].report.to_dict()["units"]}
    for name, (kind, mode) in UNITS.items():
        flops = {region["path"]: region["flops"] for region in units[name]["regions"]}
        times, expected = 3 if mode.training else 1, defaultdict(int)
        for path, module in unit_of(V3, kind, mode).template.named_modules():
            parent, _, own = (path or kind).rpartition(".")
            if isinstance(module, nn.Linear):
                first = f"{parent}.{MERGED[own]}" if own in MERGED else path or kind
                again = mode.training and own == "kv_b_proj"  # backward computes keys and values again
                expected[first] += 2 * mode.tokens * module.weight.numel() * (times + again)
            elif isinstance(module, Experts):
                values = module.gate_up_proj[0].numel() + module.down_proj[0].numel()
                expected[path] = 2 * mode.tokens * V3.num_experts_per_tok * values * times
        if mode.cached:
            expected.pop("self_attn.kv_b_proj", None)  # absorbed
        linears = {path: count for path, count in flops.items() if path and path.endswith(("proj", "experts", "head"))}
        assert {path: count for path, count in linears.items() if count} == expected, name


def test_decode_reads_the_experts_it_uses(v3):
    (unit,) = (u for u in v3[0].report.units if u.name == "moe_layer_one_sequence_one_token_cached_inference")
    grouped = [cost for cost in unit.costs if "grouped_gemm" in cost.operator]
    used = V3.num_experts_per_tok * 3 * V3.hidden_size * V3.moe_intermediate_size
    moved = sum(cost.moved_bytes for cost in grouped)
    assert used < moved < 1.01 * used  # the rest: activations and scales


def test_times_are_called_predicted_in_every_file(v3):
    document = json.loads((v3[0].path / "report.json").read_text())
    keys = {key for unit in document["units"] for part in (unit, *unit["regions"], *unit["operators"]) for key in part}
    assert {key for key in keys if key.endswith(("_us", "_ms", "_s"))} == {"predicted_us"}
    assert "not measurements" in (v3[0].path / "report.txt").read_text()


def test_cubins_are_for_hopper_and_do_not_spill(v3):
    for kernel in v3[0].kernels:
        description = json.loads((v3[0].path / f"kernels/{kernel['name']}.json").read_text())
        assert description["arch"] == "sm_90a"
        assert 0 < description["registers"] <= 255
        assert description["spills"] == 0
        assert description["shared_bytes"] <= 232448
        assert (description["fp8_mma"] > 0) == ("gemm" in kernel["name"] or "wgrad" in kernel["name"])


def test_every_kernel_of_ours_has_an_operator_and_every_operator_kernels():
    offline = pytest.importorskip("dsv3c.kernels.offline", reason="needs Triton")
    functions = {variant.kernel.__name__.strip("_") for variant in offline.variants()}
    assert {function for function, _ in cross_compile._FUNCTIONS.values()} == functions
    for operator in cross_compile._KERNELS:
        assert hasattr(torch.ops.dsv3c, operator.removeprefix("dsv3c.").removesuffix(".default"))
    assert {name for names in cross_compile._KERNELS.values() for name in names} == set(cross_compile._FUNCTIONS)
    variants = {name: cross_compile._variant(name) for name in cross_compile._FUNCTIONS}
    assert len({(v.kernel.__name__, *map(str, v.constants.items())) for v in variants.values()}) == len(variants)


# Damage.


def rewrite(folder, name, change):
    """Changes a file and its hash, so that only its content can give it away."""
    path = folder / name
    path.write_text(change(path.read_text()))
    change_manifest(folder, lambda m: m["files"].update({name: hashlib.sha256(path.read_bytes()).hexdigest()}))


def change_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(folder, *words):
    with pytest.raises(ArtifactError) as caught:
        check_artifact(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


ATTENTION = "= scaled_dot_product_attention("
L1 = "graphs/moe_layer_one_sequence_many_tokens_training/L1.txt"
L0 = "graphs/moe_layer_one_sequence_many_tokens_training/L0.txt"
WGRAD = re.compile(r"dsv3c\.gemm_wgrad\.default(.*self_attn\.o_proj)")


def test_a_folder_that_is_no_artifact(tmp_path):
    refused(tmp_path, "manifest.json: expected an artifact's manifest, found none")
    (tmp_path / "manifest.json").write_text("{")
    refused(tmp_path, "expected JSON")
    (tmp_path / "manifest.json").write_text("[]")
    refused(tmp_path, "expected format 2")


def test_a_missing_file(damageable):
    (damageable / "kernels/gemm.cubin").unlink()
    refused(damageable, "kernels/gemm.cubin: expected a file")


def test_a_changed_byte(damageable):
    path = damageable / "kernels/gemm.cubin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(damageable, "kernels/gemm.cubin", "hash")


def test_a_path_out_of_the_artifact(damageable):
    change_manifest(damageable, lambda manifest: manifest["files"].update({"../other": "0"}))
    refused(damageable, "inside the artifact")


@pytest.mark.parametrize("name", ["torch", "triton", "dsv3c"])
def test_other_versions_are_stale(damageable, name):
    change_manifest(damageable, lambda manifest: manifest["versions"].update({name: "0.9"}))
    refused(damageable, f"expected {name} 0.9", "stale")


def test_other_sources_are_stale(damageable):
    change_manifest(damageable, lambda manifest: manifest.update(source_fingerprint="0"))
    refused(damageable, "sources", "stale")


def test_an_edited_manifest_contradicts_its_key(damageable):
    change_manifest(damageable, lambda manifest: manifest["recipe"].update(pow2=True))
    refused(damageable, "cache_key")


def test_another_targets_data(damageable):
    change_manifest(damageable, lambda manifest: manifest.update(target="h200"))
    refused(damageable, "expected the data of target h200 that made it", "stale")


def test_a_manifest_without_an_entry(damageable):
    change_manifest(damageable, lambda manifest: manifest.pop("units"))
    refused(damageable, "complete manifest", "units")


def test_a_missing_unit(damageable):
    change_manifest(damageable, lambda manifest: manifest["units"].popitem())
    refused(damageable, "expected 15 units", "found 14")


def test_an_unlisted_graph(damageable):
    change_manifest(damageable, lambda manifest: manifest["files"].pop(L1))
    refused(damageable, L1, "expected a graph")


def test_a_bf16_product_where_fp8_was_meant(damageable):
    rewrite(damageable, L1, lambda text: WGRAD.sub(r"aten.mm.default\1", text))
    refused(damageable, L1, "an FP8 product, or a reason in the report", "aten.mm.default in self_attn.o_proj (linear)")


def test_with_a_recorded_reason_the_number_still_tells(damageable):
    def record(text):
        report = json.loads(text)
        for unit in report["units"]:
            unit["passes"][-1]["skipped"].append({"where": "self_attn.o_proj (linear)", "reason": "a test"})
        return json.dumps(report)

    rewrite(damageable, "report.json", record)
    rewrite(damageable, L1, lambda text: WGRAD.sub(r"aten.mm.default\1", text))
    refused(damageable, L1, "expected 24 FP8 products", "found 23")


def test_a_float32_product_of_the_router_is_no_violation(v3):
    lines = parse(v3[0].path / L1)
    assert any(line.operator == "dsv3c.wide_mm.default" and line.kind == "router" for line in lines)


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        (L1, lambda text: text.replace("%100 = ", "%100 : ", 1), ":101: expected a node %100"),
        (L1, lambda text: "".join(text.splitlines(keepends=True)[:-1]), "one output, at the end"),
        (L1, lambda text: text.replace("permute.default(%", "permute.default(%9999", 1), "uses what is above it"),
        (L0, lambda text: text.replace("= linear(", "= aten.mm.default(", 1), "expected torch functions"),
        (L0, lambda text: text.replace("= dsv3c.attention.default(", ATTENTION), "dsv3c.attention"),
        (L1, lambda text: text.replace("= aten.permute.default(", "= permute(", 1), "operators of aten, prims"),
        ("kernels/gemm.cubin", lambda text: "x", "a cubin"),
        ("report.json", lambda text: '{"units": [{}]}', "expected a report"),
        ("config.json", lambda text: "{}", "cache_key"),
    ],
)  # fmt: skip
def test_content_that_violates_its_specification(damageable, name, change, word):
    path = damageable / name
    if path.suffix == ".cubin":
        path.write_text("")
    rewrite(damageable, name, change)
    refused(damageable, word)


def test_a_kernel_that_the_graphs_need(damageable):
    change_manifest(damageable, lambda manifest: manifest["files"].pop("kernels/transpose.json"))
    refused(damageable, "kernels/transpose.json", "a kernel that the graphs need")


# Writing. Lowering is left out here: nothing depends on what is written.


@pytest.fixture
def nothing_to_lower(monkeypatch):
    monkeypatch.setattr(writer, "MODES", ())


def test_bad_input_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ArtifactError, match="a new folder or an earlier artifact"):
        compile_artifact("tiny", "cpu", tmp_path / "mine")
    with pytest.raises(ArtifactError, match="parent folder"):
        compile_artifact("tiny", "cpu", tmp_path / "no" / "out")
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        compile_artifact("tinny", "cpu", tmp_path / "out")
    with pytest.raises(CompileError, match="try h800"):
        compile_artifact("tiny", "h80", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_earlier_artifact_is_replaced_and_nothing_is_left_beside(tmp_path, nothing_to_lower):
    out = tmp_path / "out"
    compile_artifact("tiny", "cpu", out)
    (out / "stale.txt").write_text("")
    compile_artifact("v3-16b", "cpu", out)
    assert not (out / "stale.txt").exists()
    assert json.loads((out / "manifest.json").read_text())["model"] == "v3-16b"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_keeps_the_earlier_artifact(tmp_path, nothing_to_lower, monkeypatch):
    out = tmp_path / "out"
    compile_artifact("tiny", "cpu", out)

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ArtifactError, match=r"found No space left on device; nothing was kept"):
        compile_artifact("v3-16b", "cpu", out)
    assert json.loads((out / "manifest.json").read_text())["model"] == "tiny"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_puts_the_earlier_artifact_back(tmp_path, nothing_to_lower, monkeypatch):
    out = tmp_path / "out"
    compile_artifact("tiny", "cpu", out)
    rename = Path.rename

    def fails(self, target):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ArtifactError, match="Input/output error"):
        compile_artifact("v3-16b", "cpu", out)
    assert json.loads((out / "manifest.json").read_text())["model"] == "tiny"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_models_without_one_kind_of_layer():
    tiny = preset("tiny")
    others = {"rotary": 1, "final_norm": 1, "head": 1}
    assert kinds(tiny) == {"dense_layer": 1, "moe_layer": 3} | others
    assert kinds(replace(tiny, first_k_dense_replace=0)) == {"moe_layer": 4} | others
    assert kinds(replace(tiny, first_k_dense_replace=9)) == {"dense_layer": 4} | others
