"""A Hopper GPU that is pretended, for what asks which one there is."""

import pytest
import torch


@pytest.fixture
def hopper(monkeypatch):
    gemm = pytest.importorskip("dsv3c.kernels.gemm", reason="needs Triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    gemm.hopper.cache_clear()
    yield
    gemm.hopper.cache_clear()
