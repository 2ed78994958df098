"""Measured times: each operator of ours is found in the profile with its region, and drawn."""

import json
import re
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

import dsv3c
from dsv3c import report_page
from dsv3c.cli import app
from dsv3c.errors import CompileError
from dsv3c.measure import Launch, located
from dsv3c.model import DeepseekV3
from dsv3c.tuning import targets


@pytest.fixture
def compiled(without_codegen):
    model = DeepseekV3(dsv3c.preset("tiny").with_layers(2))
    return dsv3c.compile(model, precision="fp8", target="h200")


def of_ours(costs):
    return Counter((c.operator, c.region, c.backward) for c in costs if c.operator.startswith("dsv3c."))


@pytest.mark.parametrize("training", [False, True])
def test_every_operator_of_ours_is_measured_in_its_region(compiled, training, tmp_path):
    ids, forward = torch.randint(1024, (1, 64)), compiled.model.layers[0].forward
    with torch.set_grad_enabled(training):
        report = dsv3c.explain(compiled, ids, measure=True, trace=tmp_path / "trace.json")
    layers = [unit for unit in report.units if "layer" in unit.name]
    assert len(layers) == 2
    for unit in layers:
        found = Counter((x.operator, x.region, x.backward) for x in unit.launches)
        assert found == of_ours(unit.costs)
        assert all(x.time_us > 0 for x in unit.launches)
        assert any(x.backward for x in unit.launches) is training
        assert unit.to_dict()["measured_us"] == unit.measured_us
    assert "measured" in str(report)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert compiled.model.layers[0].forward is forward
    json.dumps(report.to_dict())


def test_the_same_operator_takes_the_regions_in_order(compiled):
    with torch.no_grad():
        report = dsv3c.explain(compiled, torch.randint(1024, (1, 64)), measure=True)
    (unit,) = [unit for unit in report.units if unit.name.startswith("dense")]
    casts = [x.region.path for x in unit.launches if x.operator == "dsv3c.quantize_tile.default"]
    expected = [c.region.path for c in unit.costs if c.operator == "dsv3c.quantize_tile.default"]
    assert casts == expected
    assert len(set(casts)) > 1


def test_a_kernel_of_no_graph_has_no_region():
    launch = Launch("model.norm", False, "aten.fill_.default", ("fill",), ((3,),), 0.0, 1.0)
    assert located((launch,), (), targets.load("h200")) == (launch,)


def test_nothing_to_measure(compiled):
    with pytest.raises(CompileError, match="explain"):
        dsv3c.explain(compiled, measure=True)


def test_the_page_needs_nothing_else(compiled):
    with torch.no_grad():
        report = dsv3c.explain(compiled, torch.randint(1024, (1, 64)))
        measured = dsv3c.explain(compiled, torch.randint(1024, (1, 64)), measure=True)
    for found, word in ((report, "predicted: forward"), (measured, "measured: forward")):
        page = report_page.page(found)
        assert word in page
        assert not re.search(r"(src|href)=|https?:", page)
        for unit in found.units:
            assert unit.name in page
        unit = found.units[1]
        bars = unit.launches or unit.costs
        assert page.count("<rect") >= len(bars)


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("dsv3c.gemm_wgrad.default", "product"),
        ("aten._grouped_mm.default", "product"),
        ("dsv3c.attention_backward.default", "attention"),
        ("dsv3c.rms_norm_quantize.default", "cast"),
        ("dsv3c.unpermute.default", "routing"),
        ("fused", "fused"),
    ],
)
def test_colours(operator, kind):
    assert report_page.kind_of(operator) == kind


def test_command(without_codegen, tmp_path):
    html = tmp_path / "page.html"
    arguments = ["explain", "tiny", "--layers", "1", "--tokens", "16", "--precision", "fp8", "--html", str(html)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["precision"] == "fp8"
    assert html.read_text().startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [html]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "sideways"], "--mode"),
        (["--tokens", "0"], "--tokens"),
        (["--html", "/nowhere/at/all.html"], "--html"),
        (["--trace", "/nowhere/at/all.json"], "--trace"),
    ],
)
def test_bad_options(options, message):
    result = CliRunner().invoke(app, ["explain", "tiny", *options])
    assert message in str(result.exception)
