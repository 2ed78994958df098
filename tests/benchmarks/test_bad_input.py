"""`dsv3c bench` told what cannot be: one line, before anything is measured."""

import json
import re
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from typer.testing import CliRunner

from dsv3c.benchmarks import bench_model, bench_report, parts, workloads
from dsv3c.benchmarks.bench_model import measure
from dsv3c.cli import app
from dsv3c.config import preset
from dsv3c.errors import Dsv3cError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "v3-671b"}, "expected .* GB of cpu memory for the weights alone, found .*; try --layers 2"),
        ({"source": "tiny", "tokens": 0}, "--tokens: expected at least 1, found 0"),
        ({"source": "v3-16bn"}, "did you mean 'v3-16b'"),
        ({"source": "tiny", "layers": 1, "modes": ("moe",)}, "--mode moe: expected a MoE layer at the end"),
        ({"source": "tiny", "routing": "zipf"}, "--routing zipf: expected 4 experts, .* found 16; try --experts 4"),
        (
            {"source": "tiny", "modes": ("start",), "precisions": ("exact", "fp8")},
            "start: expected one precision, found",
        ),
        ({"source": "tiny", "routing": "zipf", "modes": ("decode",)}, "--routing zipf: expected modes of forward"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(Dsv3cError, match=message):
        measure(**arguments)


@pytest.mark.parametrize(
    ("layers", "later", "message"),
    [
        (1, "moe", "--mode moe: expected a MoE layer at the end"),
        (2, "main-grad", r"--mode main-grad: expected \S+ GB of cpu memory, found .*; try --layers 2 --experts 4"),
        (2, "optimizer", r"--mode optimizer: expected \S+ GB of cpu memory, found .*; try --layers 2 --experts 4"),
    ],
)
def test_what_cannot_be_is_known_before_anything_is_measured(monkeypatch, layers, later, message):
    monkeypatch.setitem(parts.ROOM, later, (10**9, 0))
    monkeypatch.setattr(bench_model, "_measure_mode", lambda *a: pytest.fail("measured"))
    with pytest.raises(Dsv3cError, match=message):
        measure("tiny", layers=layers, modes=("forward", later))


def test_hints_for_a_checkpoint_are_no_options_of_presets(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(preset("tiny").to_dict()))
    monkeypatch.setattr(workloads.os, "sysconf", lambda name: 1)  # a byte of memory
    for mode in ("forward", "main-grad"):
        with pytest.raises(Dsv3cError, match=r"; try a machine with more$"):
            measure(str(tmp_path), modes=(mode,))


@pytest.mark.parametrize(("dtype", "each"), [(torch.bfloat16, 2 + 16), (torch.float32, 4 + 20)])
def test_room_depends_on_the_dtype(monkeypatch, dtype, each):
    needed = []
    monkeypatch.setattr(parts, "check_memory", lambda where, bytes_, *rest: needed.append(bytes_))
    outline = workloads.outline_of(preset("tiny"), dtype)
    parts.check_room("main-grad", outline, torch.device("cpu"), "")
    biases = outline.num_parameters() - sum(p.numel() for p in outline.parameters())
    assert needed == [each * sum(p.numel() for p in outline.parameters()) + biases * dtype.itemsize]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        *((f"bench_{name}", ()) for name in ("kernels", "producers", "routing", "mla_decode", "host")),
        *(("bench_tuning", (what, "/nonexistent/out")) for what in ("sweep", "held-back")),
    ],
)
def test_a_script_without_a_gpu(script, arguments, monkeypatch, capsys):
    refused(script, arguments, "an NVIDIA GPU of compute capability 9.0 or higher, found none", monkeypatch, capsys)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("bench_kernels", ("--only", "dense,foo"), "--only: expected some of grouped, dense, .*, found 'foo'"),
        ("bench_producers", ("--only", ""), "--only: expected some of casts, swiglu, .*, found ''"),
        ("bench_routing", ("--tokens", "0"), "--tokens: expected a number of at least 1, found '0'"),
        ("bench_host", ("--rounds", "-1"), "--rounds: expected a number of at least 1, found '-1'"),
        ("bench_tuning", ("sweep", "--sample", "x"), "--sample: expected a number of at least 1, found 'x'"),
        ("bench_deepgemm", (), "expected the package deep_gemm, found none; build it from"),
    ],
)
def test_a_script_told_what_cannot_be(script, arguments, message, monkeypatch, capsys):
    if script == "bench_deepgemm" and find_spec("deep_gemm"):
        pytest.skip("DeepGEMM is here")
    refused(script, arguments, message, monkeypatch, capsys)


def refused(script, arguments, message, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr("sys.argv", [script, *arguments])
    with pytest.raises(SystemExit) as stop:
        import_module(f"dsv3c.benchmarks.{script}").main()
    assert stop.value.code == 2
    assert re.search(rf"{script}: error: .*{message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    "option", [("--mode", "froward"), ("--routing", "pareto"), ("--model", "ours,hf"), ("--precision", "int4")]
)
def test_bad_choices(option):
    with pytest.raises(Dsv3cError, match=f"{option[0]}: expected .*, found '{option[1]}'"):
        CliRunner().invoke(app, ["bench", "tiny", *option], catch_exceptions=False)


@pytest.mark.parametrize("name", ["nonexistent/x.png", "x.bmp3", "folder.png"])
def test_a_plot_that_cannot_be_drawn(monkeypatch, tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(bench_model, "measure", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(Dsv3cError, match=r"--plot: expected a .png in a folder that is there, found .*; try \w+.png"):
        CliRunner().invoke(app, ["bench", "tiny", "--plot", str(tmp_path / name)], catch_exceptions=False)


def test_a_plot_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(bench_model, "measure", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(Dsv3cError, match=r"--plot: expected a file that can be written, found /proc/x.png: \w+"):
        CliRunner().invoke(app, ["bench", "tiny", "--plot", "/proc/x.png"], catch_exceptions=False)


def test_a_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_model, "measure", lambda *a, **k: pytest.fail("measured"))
    monkeypatch.setattr(bench_report, "find_spec", lambda name: None)
    with pytest.raises(Dsv3cError, match="--plot: expected matplotlib, found none"):
        CliRunner().invoke(app, ["bench", "tiny", "--plot", str(tmp_path / "x.png")], catch_exceptions=False)


def test_layers_of_a_checkpoint_are_its_own(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(preset("tiny").to_dict()))
    with pytest.raises(Dsv3cError, match="--layers: expected a preset, found the checkpoint"):
        bench_model.measure(str(tmp_path), layers=2)
