"""`dsv3c bench`: what it measures, that it refuses to show the speed of something wrong, and what it writes."""

import json
import warnings
from contextlib import contextmanager

import pytest
import torch
from typer.testing import CliRunner

from dsv3c.benchmarks import bench_model, readme_table, record, timing
from dsv3c.benchmarks.bench_model import draw, measure, report
from dsv3c.benchmarks.gate import median_row_distance
from dsv3c.cli import app
from dsv3c.errors import Dsv3cError
from dsv3c.kernels.reference import gemms as reference


@pytest.fixture
def quick(without_codegen, monkeypatch):
    """No code generation for the baseline either, and few rounds."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: original(model, **({"backend": "eager"} | options)))
    interleaved = timing.interleaved
    monkeypatch.setattr(timing, "interleaved", lambda calls: interleaved(calls, rounds=2))


@pytest.mark.parametrize(("family", "modes"), [("ours", bench_model.MODES), ("hf", ("decode",))])
def test_every_mode_is_checked_and_timed(quick, family, modes, tmp_path):
    if family == "hf":
        pytest.importorskip("transformers", reason="their model: pip install 'dsv3c[hf]'")
    document = measure("tiny", layers=2, experts=4, tokens=16, modes=modes, family=family, precisions=("exact", "fp8"))
    assert (document["layers"], document["experts"]) == (2, 4)
    assert "--layers 2 --experts 4 --tokens 16" in document["command"]
    assert [row["mode"] for row in document["modes"]] == list(modes)
    for row in document["modes"]:
        assert row["passed"]
        assert [c["name"] for c in row["contenders"]] == ["eager", "torch.compile", "dsv3c exact", "dsv3c fp8"]
        eager, _, exact, fp8 = row["contenders"]
        assert eager["speedup_over_eager"] == 1
        assert exact["speedup_over_eager"] == eager["median_us"] / exact["median_us"]
        assert exact["p20_us"] <= exact["median_us"] <= exact["p80_us"]
        # Quantisation errs, and more than summing in another order does: the FP8 model is compared, not exact's.
        assert fp8["worst_check"]["error"] > exact["worst_check"]["bound"]
    assert json.loads(json.dumps(document)) == document
    text = report(document)
    assert " ms" not in text  # of a CPU nobody wants to know
    assert text.count("emulated") == 2 * len(modes) + 1
    draw(document, tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_no_speed_of_a_wrong_model(quick, monkeypatch, tmp_path):
    """The mutant: a GEMM with scales a fifth too large. (The latent hides that: it is normed after its one product.)"""

    def enlarged(x, x_scale_inv, w, w_scale_inv, dtype):
        return reference.gemm_ref(x, x_scale_inv, w, 1.2 * w_scale_inv, dtype)

    x = torch.ops.dsv3c.quantize_tile(torch.randn(2, 2), 1.0, False)
    w = torch.ops.dsv3c.quantize_block(torch.randn(2, 2), 1.0, False)
    before = torch.ops.dsv3c.gemm(*x, *w, torch.float32)
    with replaced("gemm", enlarged):
        monkeypatch.setattr(record, "RESULTS", tmp_path)
        arguments = ["bench", "tiny", "--layers", "1", "--tokens", "16", "--precision", "fp8", "--record", "--json"]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout)["modes"]
    assert not row["passed"]
    assert row["contenders"] == []
    assert [check["what"] for check in row["failed"]] == ["x"]
    assert all(check["error"] > check["bound"] for check in row["failed"])
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.ops.dsv3c.gemm(*x, *w, torch.float32), before)  # the mutant is gone
    assert "wrong" in report(json.loads(result.stdout))


@contextmanager
def replaced(operator, function):
    """An operator with another CPU definition."""
    library = torch.library.Library("dsv3c", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it overrides one
        library.impl(operator, function, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def test_median_row_distance(monkeypatch):
    monkeypatch.setattr("dsv3c.benchmarks.gate.CHUNK", 64)  # several pieces
    out, ref = torch.randn(5, 7, 16), torch.randn(5, 7, 16, dtype=torch.float64)
    rows = (out.double() - ref).square().mean(-1).sqrt().flatten()
    expected = rows.sort().values[(len(rows) - 1) // 2] / ref.square().mean().sqrt()
    assert f"{median_row_distance(out, ref):.6g}" == f"{float(expected):.6g}"
    assert median_row_distance(ref, ref) == 0
    assert not median_row_distance(torch.full_like(out, torch.nan), ref) <= 1


def test_contenders_take_turns(monkeypatch):
    ticks, calls = iter(range(10**6)), []
    monkeypatch.setattr(timing, "_cpu_us", lambda call: call() or next(ticks))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    times = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=5)
    assert "".join(calls) == "abbaabbaab"
    assert times["a"] == timing.Timing(4.0, 2.4, 7.2, 5, None)


def test_recorded_rows_make_the_readme_table(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    row = {
        "benchmark": "model", "source": "v3-671b", "family": "ours", "layers": 2, "tokens": 4096, "batch": 1,
        "mode": "forward", "contenders": [
            {"name": "eager", "median_us": 30000.0, "p20_us": 29000.0, "p80_us": 31000.0, "speedup_over_eager": 1.0,
             "speedup_over_torch_compile": 0.9, "worst_check": None},
        ],
        "environment": {"machine": "NVIDIA H200", "power_limit_w": 700.0, "torch": "2.11.0", "date": "2026-11-21T20:00",
                        "commit": "abc", "source": "def"},
    }  # fmt: skip
    newer = row | {"contenders": [row["contenders"][0] | {"median_us": 28000.0}]}
    path = record.append([row, newer])
    assert path.name == "nvidia-h200.jsonl"
    table = readme_table.table(record.read())
    assert "28.00 (29.00-31.00)" in table
    assert "30.00" not in table
    readme = f"before\n{readme_table.BEGIN}old\n{readme_table.END}\nafter\n"
    assert readme_table.updated(readme) == f"before\n{readme_table.BEGIN}{table}\n{readme_table.END}\nafter\n"


def test_environment_says_what_and_where():
    found = record.environment("cpu")
    assert found["torch"] == torch.__version__
    assert found["machine"].startswith("cpu")
    assert len(found["source"]) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "v3-671b"}, "expected .* GB of cpu memory for the weights alone, found .*; try --layers 2"),
        ({"source": "tiny", "tokens": 0}, "--tokens: expected at least 1, found 0"),
        ({"source": "v3-16bn"}, "did you mean 'v3-16b'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(Dsv3cError, match=message):
        measure(**arguments)


@pytest.mark.parametrize("option", [("--mode", "froward"), ("--model", "ours,hf"), ("--precision", "int4")])
def test_bad_choices(option):
    with pytest.raises(Dsv3cError, match=f"{option[0]}: expected .*, found '{option[1]}'"):
        CliRunner().invoke(app, ["bench", "tiny", *option], catch_exceptions=False)


def test_layers_of_a_checkpoint_are_its_own(tmp_path):
    from dsv3c.config import preset

    (tmp_path / "config.json").write_text(json.dumps(preset("tiny").to_dict()))
    with pytest.raises(Dsv3cError, match="--layers: expected a preset, found the checkpoint"):
        bench_model.measure(str(tmp_path), layers=2)
