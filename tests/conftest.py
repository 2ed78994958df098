"""For all tests: seeds, the GPU mark, and no second copy of our folders."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; small tensors, few cores

import sys
import zlib
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("passes", "schedules", "kernels", "tuning", "benchmarks")


class BareNames(MetaPathFinder):
    """Refuses `import kernels` and the like where it would find this repository's folder: a second copy of each
    module in it, in the way of PyPI's `kernels`."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname in FOLDERS and path is None:
            spec = PathFinder.find_spec(fullname)
            places = [spec.origin or "", *(spec.submodule_search_locations or [])] if spec else []
            if any(Path(place).is_relative_to(ROOT) for place in places if place):
                raise ImportError(
                    f"import {fullname}: expected dsv3c.{fullname}, found the bare folder {ROOT / fullname}"
                )
        return None


sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]  # `python -m pytest` puts it there
sys.meta_path.insert(0, BareNames())


@pytest.fixture(autouse=True)
def _seed(request):
    """Every test has a seed of its own, the same in every run and order."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(zlib.crc32(request.node.nodeid.encode()))


def pytest_collection_finish():
    """What was imported stays: searching it for garbage again and again took a tenth of the time of compiling."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        reason = "needs an NVIDIA GPU of compute capability 9.0 or higher"
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@pytest.fixture
def without_codegen(monkeypatch):
    """Everything of the compiler except Inductor's code generation, which costs half a minute a unit on two cores: the
    partitioned graphs are run as they are, with the operators' CPU definitions, and kept as the backend's `halves`."""
    from dsv3c import backend

    def lower(self, gm, example_inputs):
        recorder = backend.Recorder(self.unit, self.pipeline, self.weights)
        recorder.joint = self.joint
        compiled = recorder.lower(gm, example_inputs)
        self.halves = recorder.halves
        return compiled

    monkeypatch.setattr(backend.Backend, "lower", lower)
