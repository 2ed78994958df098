"""Measured times: each operator of ours is found in the profile with its region, and drawn."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from typer.testing import CliRunner

import dsv3c
from dsv3c import measure, report_page
from dsv3c.cli import app
from dsv3c.errors import CompileError, Dsv3cError
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


class Event(SimpleNamespace):
    """As the profiler's: on the host with what it launched, or on the device."""

    def __init__(self, name, start, end, parent=None, kernels=(), device=False, thread=1):
        times = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        kernels = [SimpleNamespace(name=name, duration=time) for name, time in kernels]
        kind = DeviceType.CUDA if device else DeviceType.CPU
        super().__init__(name=name, time_range=times, device_type=kind, kernels=kernels, cpu_parent=parent,
                         thread=thread, input_shapes=[[4, 8], [], [8]])  # fmt: skip


def test_on_a_gpu_an_operators_kernels_are_one_launch_and_begin_on_the_device():
    layer = Event("dsv3c module model.layers.0", 0.0, 100.0, kernels=[("dsv3c module model.layers.0", 500.0)])
    attention = Event("dsv3c::attention", 10.0, 30.0, layer)
    cudnn = Event("aten::_scaled_dot_product_cudnn_attention", 12.0, 20.0, attention, [("cudnn", 40.0)])
    copy = Event("aten::copy_", 22.0, 25.0, attention, [("copy", 5.0)])
    fused = Event("triton_poi_fused_add", 40.0, 42.0, layer, [("triton_poi_fused_add", 7.0)])
    again = Event("triton_poi_fused_add", 50.0, 52.0, layer, [("triton_poi_fused_add", 7.0)])
    backward = Event("CompiledFunctionBackward", 200.0, 300.0, thread=2)
    runtime = Event("cudaDeviceSynchronize", 205.0, 206.0, backward, [("gemm", 9.0)], thread=2)  # numbered like gemm
    gemm = Event("dsv3c::gemm", 210.0, 220.0, backward, [("gemm", 9.0)], thread=2)
    outside = Event("aten::add", 400.0, 410.0, None, [("add", 1.0)])
    device = [
        Event(name, start, start + time, device=True)
        for name, start, time in (("cudnn", 1000.0, 40.0), ("copy", 1041.0, 5.0), ("triton_poi_fused_add", 1050.0, 7.0),
                                  ("triton_poi_fused_add", 1060.0, 7.0), ("gemm", 1100.0, 9.0), ("add", 1200.0, 1.0))
    ]  # fmt: skip
    host = [layer, attention, cudnn, copy, fused, again, backward, runtime, gemm, outside]
    found = [
        (x.module, x.backward, x.operator, x.kernels, x.start_us, x.time_us)
        for x in measure._launches([*host, *device], cuda=True)
    ]
    path = "model.layers.0"
    assert found == [
        (path, False, "dsv3c.attention.default", ("cudnn", "copy"), 0.0, 45.0),
        (path, False, "fused", ("triton_poi_fused_add",), 50.0, 7.0),
        (path, False, "fused", ("triton_poi_fused_add",), 60.0, 7.0),
        (path, True, "dsv3c.gemm.default", ("gemm",), 100.0, 9.0),
    ]


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
        assert page.count("<details>") == len(found.units)
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
        (["--html", "/nowhere/at/all.html"], "--html: expected a file that can be written"),
        (["--trace", "/nowhere/at/all.json"], "--trace: expected a file that can be written"),
        (["--html", "/proc/x.html"], "--html: expected a file that can be written"),  # a folder, but a system's
        (["--trace", "/"], "--trace: expected a file that can be written"),
    ],
)
def test_bad_options(options, message, monkeypatch):
    """Found out before anything is compiled."""
    monkeypatch.setattr(dsv3c, "compile", lambda *args, **kwargs: pytest.fail("compiled"))
    result = CliRunner().invoke(app, ["explain", "tiny", *options])
    assert isinstance(result.exception, Dsv3cError)
    assert str(result.exception).startswith(message)
