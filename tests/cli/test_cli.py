"""The `dsv3c` command: documents on stdout, one line on stderr, exit codes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dsv3c as package
from dsv3c import artifact, artifact_check, checkpoint, debug
from dsv3c.benchmarks import bench_model
from dsv3c.cli import app
from dsv3c.config import preset
from dsv3c.model import DeepseekV3

DENSE = replace(preset("tiny"), num_hidden_layers=2, first_k_dense_replace=2)
COMMANDS = ("bench", "check", "compile", "info", "schedule")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An FP8 checkpoint in the real layout; dense layers only, so that compiling it lowers one kind."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny-fp8"
    torch.manual_seed(0)
    package.save(DeepseekV3(DENSE).bfloat16(), path, fp8=True)
    return path


def process(*arguments):
    command = [sys.executable, "-c", "from dsv3c.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def one_line(err, *words):
    assert err.startswith("dsv3c: ")
    assert err.count("\n") == 1, err
    assert all(word in err for word in words), err


def test_help_names_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)
    for command in COMMANDS:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_the_command_line_starts_without_torch():
    heavy = ("torch", "triton", "numpy", "matplotlib", "transformers", "safetensors", "optuna")
    code = f"import sys, dsv3c.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_memory_is_one_line(dsv3c, monkeypatch):
    def measure(*args, **kwargs):
        raise torch.OutOfMemoryError("Tried to allocate 28.00 GiB.\nGPU 0 has less")

    monkeypatch.setattr(bench_model, "measure", measure)
    code, _, err = dsv3c("bench", "tiny")
    assert code == 2
    one_line(err, "28.00 GiB", "--tokens")


def test_info_of_the_real_model(dsv3c):
    code, document, err = dsv3c("info", "v3-671b", "--json")
    assert (code, err) == (0, "")
    assert document["parameters"] == 671_026_419_200
    assert document["active_parameters"] == 671_026_419_200 - 58 * 248 * 3 * 7168 * 2048
    assert (document["dense_layers"], document["moe_layers"]) == (3, 58)
    assert document["cache_bytes_per_token"] == 61 * 576 * 2
    _, text, _ = dsv3c("info", "v3-671b")
    assert "671,026,419,200" in text


def test_info_of_a_checkpoint(dsv3c, folder):
    code, document, _ = dsv3c("info", folder, "--json")
    assert code == 0
    assert document["parameters"] == document["active_parameters"] == DeepseekV3(DENSE).num_parameters()
    assert document["bytes_by_dtype"]["F8_E4M3"] > 0


@pytest.mark.parametrize("command", ["info", "compile"])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("v3-671", ["did you mean 'v3-671b'?"]),
        ("{folder}-", ["expected a checkpoint's folder, found nothing there", "did you mean", "tiny-fp8?"]),
        ("{folder}/config.json", ["found a file"]),
        ("{folder}/..", ["config.json"]),
    ],
)
def test_an_unknown_model_is_one_line(dsv3c, folder, tmp_path, command, source, words):
    output = ["-o", tmp_path / "out"] if command == "compile" else []
    code, out, err = dsv3c(command, source.format(folder=folder), *output)
    assert (code, out) == (2, "")
    one_line(err, *words)
    assert not list(tmp_path.iterdir())


def test_compile_refuses_a_damaged_checkpoint(dsv3c, folder, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    for file in folder.iterdir():
        content = file.read_bytes()
        half = content[: len(content) // 2] if file.suffix == ".safetensors" else content
        (tmp_path / "checkpoint" / file.name).write_bytes(half)
    code, _, err = dsv3c("compile", tmp_path / "checkpoint", "-o", tmp_path / "out", "--target", "cpu")
    assert code == 2
    one_line(err, ".safetensors")
    assert not (tmp_path / "out").exists()


def test_compile_and_check_a_checkpoint_for_the_cpu(dsv3c, folder, tmp_path, monkeypatch):
    for module in (artifact, artifact_check):
        monkeypatch.setattr(module, "MODES", artifact.MODES[-1:])  # decode: the quickest to lower
    out = tmp_path / "out"
    code, made, _ = dsv3c("compile", folder, "--target", "cpu", "-o", out, "--json")
    assert code == 0
    assert (made["artifact"], made["target"], made["precision"], made["kernels"]) == (str(out), "cpu", "exact", [])
    assert len(made["units"]) == 4  # rotary angles, layer, final norm, head
    assert all(unit["predicted_us"] > 0 and unit["moved_bytes"] > 0 for unit in made["units"])
    code, found, err = dsv3c("check", out, "--json")
    assert (code, err) == (0, "")
    assert set(found["fp8_products"].values()) == {0}
    assert found["kernels"] == []


def test_compile_prints_a_table(dsv3c, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3c.artifact.MODES", ())
    code, out, _ = dsv3c("compile", "tiny", "--target", "cpu", "-o", tmp_path / "out")
    assert code == 0
    assert out.startswith("exact for cpu (CPU)")
    assert "not measurements" in out


def test_check_in_a_process_of_its_own(v3):
    done = process("check", str(v3[0].path), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert sum(json.loads(done.stdout)["fp8_products"].values()) == 68


def test_check_in_words(dsv3c, v3):
    code, out, _ = dsv3c("check", v3[0].path)
    assert code == 0
    assert "15 units with 68 FP8 products" in out


def test_a_damaged_artifact_is_one_line_without_a_traceback(damageable):
    (damageable / "config.json").write_text("{}")
    done = process("check", str(damageable), "--json")
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, "config.json", "hash")


def test_usage_errors_and_unknown_targets_are_2(dsv3c, tmp_path):
    assert dsv3c("compile", "tiny")[0] == 2
    assert dsv3c("nonsense")[0] == 2
    code, _, err = dsv3c("compile", "tiny", "-o", tmp_path / "out", "--target", "h900")
    assert code == 2
    one_line(err, "expected one of auto, cpu, h100, h200, h800", "found 'h900'")


@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME"])
def test_a_cache_that_cannot_be_written_is_replaced(tmp_path, monkeypatch, variable):
    (tmp_path / "file").write_text("")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    if variable == "TRITON_HOME":
        monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv(variable, str(tmp_path / "file" / "cache"))
    cache = variable.replace("HOME", "CACHE_DIR")
    told = []
    for _ in range(2):
        debug.use_writable_caches(told.append)
    (line,) = told
    assert f"{cache}: expected a folder to write to, found {tmp_path / 'file'}" in line
    assert list(Path(os.environ[cache]).iterdir()) == []


def test_the_command_line_says_which_cache_it_uses(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    done = process("info", "tiny")
    assert done.returncode == 0
    one_line(done.stderr, "TORCHINDUCTOR_CACHE_DIR: expected a folder to write to", "until this process ends")


def test_a_bad_schedule_is_one_line(dsv3c):
    code, out, err = dsv3c("schedule", "--ranks", "0", "--microbatches", "4")
    assert (code, out) == (2, "")
    one_line(err, "expected")


def test_a_failed_correctness_gate_is_1(dsv3c, monkeypatch):
    failed = {"modes": [{"mode": "forward", "passed": False}]}
    monkeypatch.setattr(bench_model, "measure", lambda *args, **kwargs: failed)
    code, document, _ = dsv3c("bench", "tiny", "--json")
    assert (code, document) == (1, failed)


def test_an_interrupt_is_130(dsv3c, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "inspect", interrupted)
    assert dsv3c("info", "tiny")[0] == 130


def test_a_mistake_of_ours_is_no_users_error(dsv3c, monkeypatch):
    def wrong(path):
        raise RuntimeError("a bug")

    monkeypatch.setattr(checkpoint, "inspect", wrong)
    with pytest.raises(RuntimeError, match="a bug"):
        dsv3c("info", "tiny")
