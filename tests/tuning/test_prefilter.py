"""Configurations compiled for a target on a machine without a GPU, and dropped with a reason."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from dsv3c.errors import TuneError
from dsv3c.kernels.implementations import implementations
from dsv3c.tuning import targets
from dsv3c.tuning.prefilter import everything, prefilter

H200 = targets.load("h200")
TRITON = "gemm", "triton"
BASE = {"rows": 64, "columns": 64, "halves": 1, "num_warps": 4, "num_stages": 2, "band": 8, "programs": 0}


def test_what_does_not_fit_is_dropped_with_its_reason():
    tile = {"rows": 128, "columns": 128, "halves": 2, "num_warps": 8}
    configs = [BASE, BASE | {"programs": 2}, BASE | tile | {"num_stages": 6}, BASE | {"rows": 96}]
    told = []
    found = prefilter({TRITON: configs, ("gemm", "cublaslt"): [{}]}, H200, lambda *counts: told.append(counts))
    assert [verdict.reason for verdict in found[TRITON]] == [None, None, "shared memory", "does not compile"]
    assert [verdict.config for verdict in found[TRITON]] == configs
    assert [(verdict.config, verdict.reason) for verdict in found["gemm", "cublaslt"]] == [({}, None)]
    assert told == [(1, 3), (2, 3), (3, 3)]  # the first two are one kernel, and a library has none


def test_a_cache_that_cannot_be_written_drops_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(TuneError, match=r"expected a file to write, found: .*; try another TRITON_CACHE_DIR") as caught:
        prefilter({TRITON: [BASE]}, H200)
    assert str(tmp_path / "file") in str(caught.value)


def test_limits_are_the_targets():
    ((verdict,),) = prefilter({TRITON: [BASE]}, replace(H200, registers_per_sm=8192)).values()
    assert verdict.reason == "registers"


def test_everything_is_all_there_is():
    found = everything(["gemm", "gemm_wgrad"])
    assert len(found[TRITON]) >= 200
    assert found["gemm_wgrad", "cublaslt"] == [{}]


def test_a_sample_holds_what_is_known_and_is_the_same_each_time():
    of, shared = ("gemm", "split_2"), ("gemm", "split_3")
    sample, again, few = everything(["gemm"], 20), everything(["gemm"], 20), everything(["gemm"], 2)
    assert sample == again
    known = list(implementations("gemm")["split_2"].known)
    assert sample[of][: len(known)] == known
    assert sample[of] == sample[shared]
    assert len(sample[of]) == len({tuple(config.items()) for config in sample[of]}) == 20
    assert all(implementations("gemm")["split_2"].holds(config) for config in sample[of])
    assert few[of] == known[:2]
    assert sample["gemm", "cublaslt"] == [{}]
