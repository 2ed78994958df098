"""`dsv3c tune`: without a GPU, with one that is pretended, and with bad arguments."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3c import cli, cli_tune
from dsv3c.config import preset
from dsv3c.debug import debug_config
from dsv3c.kernels.implementations import Problem
from dsv3c.tuning import prefilter as prefilter_module
from dsv3c.tuning import study, tables, targets
from dsv3c.tuning.prefilter import Verdict

pytest.importorskip("triton")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The command with a prefilter that compiles nothing and drops what has so many `stages`: its exit code, stdout and
    stderr."""
    monkeypatch.setenv("DSV3C_TABLES", str(tmp_path / "mine"))

    def run(*arguments: str, stages: int = 6) -> tuple[int, str, str]:
        monkeypatch.setattr(prefilter_module, "prefilter", lambda configs, target, progress: {
            of: [Verdict(config, "spills" if config.get("num_stages") == stages else None) for config in given]
            for of, given in configs.items()
        })  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["dsv3c", "tune", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def pretended(monkeypatch, hopper):
    """An H200 whose times are made up."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import misbehave

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(targets, "resolve", lambda name: targets.load("h200"))
    monkeypatch.setattr("dsv3c.tuning.measure.measure", misbehave.measure_problem)


def test_without_a_gpu_it_compiles_and_says_that_nothing_was_measured(run, tmp_path):
    code, out, _ = run("--kernel", "gemm")
    assert code == 0
    assert "compiled for h200" in out
    assert "gemm triton: 792 of 990 configurations fit; dropped: spills 198" in out
    assert "nothing was measured and no table written: there is no GPU here" in out
    assert not (tmp_path / "mine").exists()
    assert "gemm triton: 6 of 7 configurations fit" in run("--kernel", "gemm", "--sample", "7")[1]
    code, out, _ = run("--kernel", "gemm", "--target", "h800", "--json", "--prefilter-only")
    report = json.loads(out)
    assert (report["target"], report["measured"], report["why_not"]) == ("h800", False, "--prefilter-only")
    library = {"operator": "gemm", "implementation": "cublaslt", "configurations": 1, "fit": 1}
    library |= {"dropped": {}, "known_dropped": []}
    assert library in report["configurations"]


def test_what_was_good_before_and_is_dropped_is_an_error(run):
    known = "rows=64 columns=128 halves=2 num_warps=4 num_stages=3 band=8 programs=0"
    code, out, _ = run("--kernel", "grouped_gemm", "--prefilter-only", stages=3)
    assert code == 1
    assert f"    among them, good before: {known}\n" in out
    code, out, _ = run("--kernel", "grouped_gemm", "--prefilter-only", "--json", stages=3)
    assert code == 1
    lost = {found["implementation"]: len(found["known_dropped"]) for found in json.loads(out)["configurations"]}
    assert lost == {"triton": 2, "warp_specialized": 0}


def test_with_a_gpu_it_writes_a_table_that_launches_read_and_goes_on(run, pretended, tmp_path):
    arguments = "--problem", "gemm:4096x4096x7168", "--problem", "grouped_gemm:8x4096x4096x7168", "--trials", "6"
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "gemm:4096x4096x7168" in out
    path = tmp_path / "mine" / "h200.json"
    assert str(path) in out
    rows = tables.read(path, "h200")
    assert [row.problem for row in rows] == [
        Problem("gemm", 4096, 4096, 7168), Problem("grouped_gemm", 8 * 4096, 4096, 7168, 8),
    ]  # fmt: skip
    assert rows[0].runner_up is not None
    _, out, _ = run(*arguments, "--json")
    again = json.loads(out)
    assert [row["trials"] for row in again["rows"]] == [6, 6]
    assert again["rows"][0]["best"]["config"] == rows[0].best.config
    assert (tmp_path / "mine" / "studies.db").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "gem"], "--kernel: expected one of gemm, .* found 'gem'; try gemm"),
        (["--target", "b200"], "target: expected one of .* found 'b200'"),
        (["--target", "cpu"], "--target: expected a GPU, found cpu"),
        (["--problem", "gemm:4096x4096"], "--problem: expected OPERATOR:.* found 'gemm:4096x4096'; try gemm:"),
        (["--problem", "gemm:4x4096x4096x128"], "--problem: expected OPERATOR"),
        (["--problem", "gemm:0x4096x128"], "--problem: expected OPERATOR"),
        (["--problem", "attention:1x1x1"], "--problem: expected one of"),
        (["--model", "v3-672b"], "expected one of .* did you mean .v3-671b"),
        (["--trials", "0"], "Invalid value for '--trials'"),
    ],
)
def test_bad_arguments(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    if "Invalid" not in message:
        assert len(err.strip().splitlines()) == 1
    assert re.search(message, " ".join(err.replace("│", "").split()))


def test_what_cannot_be_used_is_a_line(run, pretended, tmp_path, monkeypatch):
    path = tmp_path / "mine" / "h200.json"
    path.parent.mkdir()
    path.write_text("{")
    code, _, err = run("--problem", "gemm:64x128x128")
    assert (code, "expected a tuning table" in err) == (2, True)
    path.unlink()
    storage = tmp_path / "storage.db"
    storage.write_text("no database, but long enough for one " * 10)
    code, _, err = run("--problem", "gemm:64x128x128", "--storage", str(storage))
    assert (code, "expected an Optuna storage" in err) == (2, True)
    code, _, err = run("--problem", "gemm:64x128x128", "--output", str(storage / "h200.json"))
    assert (code, "expected a file to write" in err) == (2, True)
    code, _, err = run("--problem", "gemm:64x128x128", "--plots", str(storage / "plots"))
    assert (code, "--plots: expected a folder to write to" in err) == (2, True)
    assert "compile for" not in err  # nor compiled before that is known
    assert tables.read(path, "h200") == []
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("--problem", "gemm:64x128x128", "--plots", str(tmp_path / "plots"))
    assert (code, "--plots: expected matplotlib" in err) == (2, True)
    assert not path.with_name("studies.db").exists()
    monkeypatch.setenv("DSV3C_TABLES", "~nobody-of-that-name")
    code, _, err = run("--problem", "gemm:64x128x128")
    assert (code, "in a home that is not known" in err) == (2, True)
    assert debug_config().tables == Path("~nobody-of-that-name")  # which compiling a model does not stumble over


def test_a_models_problems():
    found = cli_tune.model_problems(preset("v3-671b"), [64, 4096])
    assert {(p.N, p.K) for p in found if p.operator == "gemm" and p.rows == 64} == {
        (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048),
    }  # fmt: skip
    assert Problem("grouped_gemm", 256 * 128, 4096, 7168, 256) in found
    assert Problem("grouped_gemm_wgrad", 8 * 4096, 7168, 2048, 8) in found
    assert len(set(found)) == len(found)


def test_help_needs_no_torch():
    code = "import sys; from dsv3c import cli_tune; print('torch' in sys.modules, 'optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2


def test_names_of_studies_tell_spaces_apart():
    spaces = [study.Space({"ours": {"x": values}}, {}) for values in ((1, 2), (1, 3))]
    names = [study.name_of(Problem("gemm", 64, 128, 128), "h200", space) for space in spaces]
    assert names[0] != names[1]
