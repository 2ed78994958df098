"""Fixtures of the command line's tests: one artifact of the real sizes, made once, and `dsv3c …` in this process."""

import json
import shutil
import sys

import pytest

from dsv3c.artifact import compile_artifact
from dsv3c.cli import main


@pytest.fixture(scope="session")
def v3(tmp_path_factory):
    """`dsv3c compile v3-671b --target h800`: what was made, and the steps it told of."""
    pytest.importorskip("triton", reason="compiles Triton kernels")
    steps = []
    out = tmp_path_factory.mktemp("artifact") / "v3-671b"
    return compile_artifact("v3-671b", "h800", out, progress=steps.append), steps


@pytest.fixture
def damageable(v3, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(v3[0].path, tmp_path / "copy")


@pytest.fixture
def dsv3c(monkeypatch, capsys):
    """dsv3c(*arguments): the exit code, stdout (as a document with --json), and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dsv3c", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in arguments and out else out, err

    return run
