"""Every benchmark can be imported: most run on a GPU only."""

from importlib import import_module
from pathlib import Path

import pytest

from dsv3c import benchmarks

NAMES = sorted(path.stem for path in Path(benchmarks.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_import(name):
    pytest.importorskip("triton")
    import_module(f"dsv3c.benchmarks.{name}")
