"""Tables: what is written is read, what is not a table is refused in a line, and which row a problem gets."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from dsv3c.errors import TuneError
from dsv3c.kernels.implementations import Problem
from dsv3c.tuning import derive, tables, targets
from dsv3c.tuning.tables import Entry, Row, Table

BEST = Entry("triton", {"rows": 64, "columns": 128}, 220.4, 220.0, 221.2)
OTHER = Entry("cublaslt", {}, 296.8, 295.0, 300.0)
ROW = Row("gemm", 4096, 7168, 1, 4096, 4096, BEST, OTHER, 30, "2.11.0", "3.6")


def row(bucket: int, name: str, **changes) -> Row:
    return replace(ROW, bucket=bucket, rows=bucket, best=replace(BEST, implementation=name), **changes)


def names(table: Table, rows: int, operator: str = "gemm") -> list[str]:
    found = table.row(Problem(operator, rows, 4096, 7168))
    return [entry.implementation for entry in found.entries] if found else []


def test_written_rows_are_read_back_sorted(tmp_path):
    path = tmp_path / "new" / "h200.json"
    rows = [row(4096, "a"), row(128, "b"), row(4096, "c", triton="3.7")]
    tables.write(path, "h200", rows)
    assert tables.read(path, "h200") == [rows[1], rows[0], rows[2]]
    assert len(path.read_text().splitlines()) == len(rows) + 5
    assert list(path.parent.iterdir()) == [path]
    assert tables.merge(rows, [row(128, "d")])[1].best.implementation == "d"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", '{"format": 1, "target": "h200"}', '{"format": 1, "target": "h200", "rows": [{}]}',
     '{"format": 2, "target": "h200", "rows": []}', '{"format": 1, "target": "b200", "rows": []}', "\0"],
)  # fmt: skip
def test_what_is_no_table_of_the_device_is_refused_in_a_line(tmp_path, text):
    path = tmp_path / "h200.json"
    path.write_text(text)
    with pytest.raises(TuneError, match=r"h200\.json: expected a tuning table.*, found.*; try") as caught:
        tables.read(path, "h200")
    assert "\n" not in str(caught.value)


def entry(**changes) -> dict:
    return asdict(BEST) | changes


@pytest.mark.parametrize(
    "change",
    [
        {"N": "4096"},
        {"groups": True},
        {"rows": 0},
        {"best": None},
        {"best": {"implementation": "x"}},
        {"best": entry(median_us="220.4")},  # what a launch would stumble over
        {"best": entry(median_us=None)},
        {"runner_up": entry(p20_us=0)},
        {"best": entry(config=[])},
        {"runner_up": entry(implementation=["triton"])},
        {"triton": 3.6},
    ],
)
def test_a_bad_row_is_refused(tmp_path, change):
    path = tmp_path / "h200.json"
    tables.write(path, "h200", [ROW])
    document = json.loads(path.read_text())
    document["rows"][0] |= change
    path.write_text(json.dumps(document))
    with pytest.raises(TuneError, match="expected a tuning table"):
        tables.read(path, "h200")


def test_no_file_has_no_rows(tmp_path):
    (tmp_path / "file").write_text("")
    assert tables.read(tmp_path / "h200.json", "h200") == tables.read(tmp_path / "file" / "h200.json", "h200") == []


@pytest.mark.parametrize("folder", ["x" * 300, "~nobody-of-that-name/tables"])
def test_a_folder_that_cannot_be_looked_into_is_a_line_and_the_shipped_rows(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("DSV3C_TABLES", folder)
    monkeypatch.setattr(tables, "SHIPPED", tmp_path)
    tables.write(tmp_path / "h200.json", "h200", [row(4096, "shipped")])
    table, (complaint,) = tables.load(targets.load("h200"))
    assert names(table, 4096)[0] == "shipped"
    assert ": expected a " in complaint
    assert "; try " in complaint
    assert "\n" not in complaint


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TuneError, match=r"expected a file to write, found.*; try .*built-in defaults"):
        tables.write(tmp_path / "file" / "h200.json", "h200", [ROW])


def test_which_row_a_problem_gets():
    table = Table([row(128, "few"), row(2048, "some"), row(4096, "many")], 132)
    assert names(table, 4096) == ["many", "cublaslt"]
    assert names(table, 4000) == ["many", "cublaslt"]
    assert names(table, 100000) == ["many", "cublaslt"]
    assert names(table, 65) == names(table, 128) == ["few", "cublaslt"]
    assert names(table, 1500) == ["some", "cublaslt"]  # the next larger bucket
    assert names(table, 300) == ["some", "cublaslt"]
    assert names(table, 20) == []  # none within a factor of two, where waves do not count
    assert names(table, 4096, "gemm_wgrad") == []
    assert table.row(Problem("gemm", 4096, 4096, 512)) is None


def test_the_users_rows_and_this_tritons_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv("DSV3C_TABLES", str(tmp_path / "mine"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path)
    monkeypatch.setattr(tables, "triton_version", lambda: "3.6")
    h200 = targets.load("h200")
    assert tables.load(h200)[1] == []
    tables.write(tmp_path / "h200.json", "h200", [row(4096, "shipped"), row(4096, "newer", triton="3.9")])
    assert names(tables.load(h200)[0], 4096)[0] == "shipped"
    tables.write(tables.user_path("h200"), "h200", [row(4096, "mine")])
    assert names(tables.load(h200)[0], 4096)[0] == "mine"
    tables.user_path("h200").write_text("{")
    table, complaints = tables.load(h200)
    assert names(table, 4096)[0] == "shipped"
    assert len(complaints) == 1


def test_predictions_follow_the_roofline():
    h200, h800 = targets.load("h200"), targets.load("h800")
    compute, memory = derive.derive([ROW, row(64, "x")], h200, h800)
    assert compute.predicted
    assert compute.best.median_us == ROW.best.median_us  # the same tensor cores
    assert memory.best.median_us == round(ROW.best.median_us * h200.hbm_bytes_per_s / h800.hbm_bytes_per_s, 2)
    assert (compute.bucket, compute.best.config, compute.runner_up.config) == (4096, BEST.config, {})


@pytest.mark.parametrize("name", ["h800", "h100"])
def test_shipped_predictions_are_derived_from_the_shipped_measurements(name):
    measured = tables.read(tables.SHIPPED / "h200.json", "h200")
    assert measured
    assert not any(row.predicted for row in measured)
    derived = derive.derive(measured, targets.load("h200"), targets.load(name))
    assert tables.read(tables.SHIPPED / f"{name}.json", name) == sorted(derived, key=lambda row: row.key)


def test_shipped_choices_are_of_this_version():
    """Every row's, so that a knob that changes its name takes its rows along; and a sample of them fits the device."""
    pytest.importorskip("triton")
    from dsv3c.kernels.implementations import implementations
    from dsv3c.tuning.prefilter import prefilter

    h200, chosen = targets.load("h200"), {}
    for row in tables.read(tables.SHIPPED / "h200.json", "h200"):
        for entry in filter(None, (row.best, row.runner_up)):
            implementation = implementations(row.operator)[entry.implementation]
            assert implementation.holds(entry.config), (row, entry)
            if entry.config:
                chosen.setdefault((row.operator, entry.implementation), []).append(entry.config)
    for of, (verdict,) in prefilter({of: configs[:1] for of, configs in chosen.items()}, h200).items():
        assert verdict.reason is None, (of, verdict)


def test_a_cold_process_needs_no_tuning():
    """With the shipped table alone, whatever V3's linears compute in 64, 128 or 4096 tokens is chosen by a row of it,
    and nothing that measures is even imported."""
    pytest.importorskip("triton")
    code = """
import sys, warnings
import torch
from dsv3c.cli_tune import model_problems
from dsv3c.config import preset
from dsv3c.kernels import implementations
from dsv3c.tuning import targets
warnings.simplefilter("error")
targets.resolve, torch.cuda.get_device_capability = lambda name: targets.load("h200"), lambda device=None: (9, 0)
for problem in model_problems(preset("v3-671b"), [64, 128, 4096]):
    row = implementations._table().row(problem)
    assert row is not None, problem
    chosen, config = implementations.choose(problem)
    assert (chosen.name, config) in [(entry.implementation, entry.config) for entry in row.entries], problem
print(*(name for name in ("optuna", "dsv3c.tuning.tuner", "dsv3c.tuning.measure") if name in sys.modules), "none")
"""
    environment = os.environ | {"DSV3C_TABLES": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["none"], done.stderr
