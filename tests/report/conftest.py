"""Fixtures of the report's tests: graphs with fake values, and a compiler that generates no code."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dsv3c import backend


@pytest.fixture
def trace():
    """trace(function, *example tensors): its aten graph on fake tensors, sizes symbolic."""

    def make(function, *examples):
        with torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()) as mode:
            fakes = [mode.from_tensor(example) for example in examples]
            return make_fx(function, tracing_mode="symbolic")(*fakes)

    return make


@pytest.fixture(scope="module")
def without_codegen():
    """Units run their captured graph: Inductor's code generation takes half a minute a unit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "compile_fx", lambda gm, inputs, **options: gm.forward)
        yield
