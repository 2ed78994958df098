"""The package as it is installed, and the rules that hold across files: who imports whom, what tests may not
contain."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("passes", "schedules", "kernels", "tuning", "benchmarks")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What may be imported of dsv3c, folder by folder. dsv3c/ itself may import everything but benchmarks.
MAY_IMPORT = {
    "schedules": {"schedules"},
    "kernels": {"kernels", "tuning", "numerics", "errors"},
    "tuning": {"tuning", "kernels", "operators", "numerics", "errors", "debug", "benchmarks"},
    "passes": {"passes", "schedules", "numerics", "errors", "operators", "attention", "grouped_linear"},
    "benchmarks": None,
}


def python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """stdout of `code` in a fresh interpreter, with `path` in front of everything else."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["dsv3c", "dsv3c.cli", "dsv3c.schedules", "dsv3c.config"])
def test_import_needs_no_torch(module, tmp_path):
    assert python(f"import sys, {module}; print('torch' in sys.modules)", cwd=tmp_path) == "False"


def test_import_is_quick(tmp_path):
    """The best of five, since other processes may be at work."""
    code = "from time import process_time as t; start = t(); import dsv3c; print(t() - start)"
    seconds = min(float(python(code, cwd=tmp_path)) for _ in range(5))
    assert seconds * 10 < 3


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_one_package_even_in_the_root(folder):
    code = f"import sys, dsv3c.{folder}; print('{folder}' in sys.modules, *dsv3c.{folder}.__path__)"
    assert python(code, cwd=ROOT) == f"False {ROOT / folder}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_bare_names_are_refused_in_tests(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=rf"expected dsv3c\.{folder}"):
        importlib.import_module(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel made from it, of a copy of the sources."""
    copy, out = tmp_path_factory.mktemp("source") / "dsv3c", tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "out", "__pycache__", "tests")
    shutil.copytree(ROOT, copy, ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def sources() -> set[str]:
    """Every file that belongs into the package, by its path in the wheel."""
    found = {f"dsv3c/{path.relative_to(ROOT / 'dsv3c').as_posix()}" for path in (ROOT / "dsv3c").rglob("*.py")}
    for folder in FOLDERS:
        found |= {
            f"dsv3c/{folder}/{path.relative_to(ROOT / folder).as_posix()}" for path in (ROOT / folder).rglob("*.py")
        }
    found |= {
        f"dsv3c/tuning/{path.relative_to(ROOT / 'tuning').as_posix()}" for path in (ROOT / "tuning").rglob("*.json")
    }
    return found | {"dsv3c/py.typed"}


def test_wheel_holds_every_source_and_data_file(built, tmp_path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path)
    assert sources() <= names
    assert {name for name in names if name.endswith(".py")} <= sources()
    assert any(name.endswith("LICENSE") for name in names)
    code = "import dsv3c.schedules, dsv3c.tuning.targets as t; print(dsv3c.__file__, *t.names())"
    file, *targets = python(code, cwd=tmp_path, path=tmp_path).split()
    assert Path(file).is_relative_to(tmp_path)
    assert targets == sorted(path.stem for path in (ROOT / "tuning" / "targets").glob("*.json"))


def test_sdist_holds_what_the_wheel_is_made_of(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "kernels/__init__.py", "tuning/targets/h800.json"} <= names


def test_every_requirement_is_pinned():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    extras = PROJECT["project"]["optional-dependencies"]
    installed = PROJECT["project"]["dependencies"] + [
        r for extra in ("dev", "hf", "plot", "schedules") for r in extras[extra]
    ]
    assert {re.match(r"[\w.-]+", requirement)[0] for requirement in installed} <= set(pins)
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")


def imports(file: Path) -> set[str]:
    """Dotted names that `file` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", [*MAY_IMPORT, "dsv3c"])
def test_dependency_direction(folder):
    for file in (ROOT / folder).rglob("*.py"):
        for name in imports(file):
            top, part = [*name.split("."), ""][:2]
            where = f"{file.relative_to(ROOT)}: import {name}"
            assert top not in FOLDERS, where
            if folder == "schedules":
                assert top not in ("torch", "triton"), where
            if top == "dsv3c" and folder == "dsv3c":
                assert part != "benchmarks" or file.name in ("cli.py", "cli_explain.py"), where
            elif top == "dsv3c" and MAY_IMPORT[folder] is not None:
                assert part in MAY_IMPORT[folder], where


def test_environment_is_read_in_one_file_and_documented():
    readers = {
        file for file in (ROOT / "dsv3c").rglob("*.py") if re.search(r"\bos\.(environ|getenv)", file.read_text())
    }
    for folder in FOLDERS:
        readers |= {
            f for f in (ROOT / folder).rglob("*.py") if re.search(r"os\.(getenv|environ(\.get|\[\"))", f.read_text())
        }
    assert readers == {ROOT / "dsv3c" / "debug.py"}
    read = set(re.findall(r"\"(DSV3C_\w+)\"", (ROOT / "dsv3c" / "debug.py").read_text()))
    documented = set(re.findall(r"^\| `(DSV3C_\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert read == documented


def test_no_tolerance_stands_in_a_test():
    """Bounds are derived in dsv3c/numerics.py. Comparing with a small literal, or passing one, is a bound made up."""
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.keyword):
                assert node.arg not in ("atol", "rtol"), where
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("approx", "assert_close", "allclose", "isclose"), where
            if isinstance(node, ast.Compare):
                small = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and type(c.value) is float]
                assert not any(0 < abs(value) < 0.1 for value in small), where
