"""Operands and oracles: what the definitions compute passes, what is slightly wrong does not."""

from dataclasses import replace

import pytest
import torch

from dsv3c.errors import TuneError
from dsv3c.kernels.implementations import FILES, Problem, implementations
from dsv3c.tuning import workloads

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def problem(operator: str) -> Problem:
    groups = 3 if operator.startswith("grouped") else 1
    return Problem(operator, 100 * groups, 144, 272, groups)


@pytest.mark.parametrize("operator", FILES)
def test_the_definition_passes_and_a_wrong_tile_does_not(operator):
    workload = workloads.make(problem(operator), "cpu")
    workload.out.copy_(getattr(torch.ops.dsv3c, operator)(*workload.operands, workload.out.dtype))
    workload.check()
    right = workload.out.clone()
    workload.out.view(-1, workload.out.shape[-1])[16:32, :16] *= 1.25
    with pytest.raises(AssertionError, match="beyond the bound"):
        workload.check()
    workload.out.copy_(right).view(-1)[7] = torch.nan
    with pytest.raises(AssertionError, match="beyond the bound"):
        workload.check()


def test_an_operator_without_a_workload_is_named():
    with pytest.raises(TuneError, match=r"operator: expected one of gemm, .*found attention"):
        workloads.make(Problem("attention", 1, 1, 1), "cpu")


def test_least_work():
    assert workloads.flops_and_bytes(Problem("gemm", 2, 3, 5)) == (60, 2 * 5 + 3 * 5 + 2 * 2 * 3)
    assert workloads.flops_and_bytes(Problem("grouped_gemm", 4, 3, 5, 2)) == (120, 4 * 5 + 2 * 3 * 5 + 2 * 4 * 3)
    assert workloads.flops_and_bytes(Problem("gemm_wgrad", 4, 3, 5)) == (120, 4 * 8 + 4 * 3 * 5)
    assert workloads.flops_and_bytes(Problem("grouped_gemm_wgrad", 4, 3, 5, 2)) == (120, 4 * 8 + 2 * 2 * 3 * 5)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0")
@pytest.mark.parametrize("operator", FILES)
def test_every_implementation_passes_on_the_gpu(operator, monkeypatch):
    """In a known configuration, and one that runs but computes something else does not."""
    from dsv3c.tuning.measure import measure, verified

    groups = 3 if operator.startswith("grouped") else 1
    small = Problem(operator, 128 * groups, 256, 512, groups)
    for name, implementation in implementations(operator).items():
        if implementation.takes(small):
            config = next(iter(implementation.known or implementation.configs()))
            (timing,) = measure(small, [(name, config)], 3)
            assert 0 < timing.p20_us <= timing.median_us <= timing.p80_us
    found = implementations(operator)
    zero = replace(found["triton"], launch=lambda *operands, **config: operands[-1].zero_())
    monkeypatch.setitem(found, "triton", zero)
    with pytest.raises(AssertionError, match="bits differ"):
        verified(small, ("triton", zero.known[0]))
