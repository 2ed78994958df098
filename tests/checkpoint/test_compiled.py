"""Weights kept in FP8, compiled: the passes take them as they are."""

import pytest
import torch

import dsv3c
from dsv3c import backend, compiler

ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0}


@pytest.fixture
def compiled(monkeypatch):
    """Compiles for FP8 and returns the model, whose graphs are run as they are after the passes, without Inductor."""
    monkeypatch.setattr(compiler, "Backend", backend.Recorder)

    def compiled(model, **options):
        with pytest.warns(UserWarning, match="emulated"):
            return compiler.compile(model, precision="fp8", **options)

    return compiled


def joint_text(model) -> str:
    backends = compiler.compilation_of(model).backends
    (layer,) = (backend for unit, backend in backends.items() if unit.kind.name.endswith("layer"))
    return layer.joint.text


@torch.no_grad()
def test_same_products_as_from_bf16(make, compiled):
    """Quantised when read, or by the compiler: the same bits, the same GEMMs, and no dequantisation is left."""
    folder = make("moonlight", **ONE_LAYER).folder
    kept = compiled(dsv3c.load(folder, dtype="fp8"))
    plain = compiled(dsv3c.load(folder), skip=["MergeLinear"])  # which leaves weights kept in FP8 apart
    ids = torch.randint(96, (2, 9))
    assert torch.equal(kept(ids), plain(ids))
    assert "dequantize_block" not in joint_text(kept)
    for operator in ("dsv3c.gemm", "dsv3c.grouped_gemm", "aten.mm", "aten._grouped_mm"):
        assert joint_text(kept).count(f"{operator}.default") == joint_text(plain).count(f"{operator}.default")
    assert not compiler.compilation_of(kept).weights.copies


@torch.no_grad()
def test_ragged_experts_stay(make, compiled):
    """Gate and up with ragged blocks of their own are dequantised in the graph; everything else is not."""
    kept = dsv3c.load(make("ragged", **ONE_LAYER, num_nextn_predict_layers=0).folder, dtype="fp8")
    out = compiled(kept)
    assert out(torch.randint(96, (2, 9))).isfinite().all()
    assert joint_text(out).count("dsv3c.dequantize_block.default") == 2
    assert joint_text(out).count("dsv3c.grouped_gemm.default") == 1
