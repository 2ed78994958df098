"""Configurations compiled for a target on a machine without a GPU, and dropped with a reason."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from dsv3c.kernels.implementations import implementations
from dsv3c.tuning import targets
from dsv3c.tuning.prefilter import num_kernels, prefilter

H200 = targets.load("h200")
BASE = {"rows": 64, "columns": 64, "halves": 1, "num_warps": 4, "num_stages": 2, "band": 8, "programs": 0}


def test_what_does_not_fit_is_dropped_with_its_reason():
    tile = {"rows": 128, "columns": 128, "halves": 2, "num_warps": 8}
    configs = [BASE, BASE | {"programs": 2}, BASE | tile | {"num_stages": 6}, BASE | {"rows": 96}]
    compiled = []
    found = prefilter(
        "gemm", implementations("gemm")["triton"], H200, configs=configs, progress=lambda: compiled.append(1)
    )
    assert [verdict.reason for verdict in found] == [None, None, "shared memory", "does not compile"]
    assert [verdict.config for verdict in found] == configs
    assert len(compiled) == 3  # the first two are one kernel


def test_limits_are_the_targets():
    small = replace(H200, registers_per_sm=8192)
    (verdict,) = prefilter("gemm", implementations("gemm")["triton"], small, configs=[BASE])
    assert verdict.reason == "registers"


def test_a_library_has_nothing_to_compile():
    library = implementations("gemm")["cublaslt"]
    assert [(verdict.config, verdict.reason) for verdict in prefilter("gemm", library, H200)] == [({}, None)]
    assert num_kernels(library) == 0
    assert num_kernels(implementations("gemm")["triton"]) >= 200
