"""Data files of targets: complete, plausible, sourced."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from dsv3c.errors import CompileError
from dsv3c.tuning import targets

GPUS = [name for name in targets.names() if name != "cpu"]


def test_the_targets_that_there_must_be():
    assert {"h100", "h200", "h800"} <= set(GPUS)


@pytest.mark.parametrize("name", GPUS)
def test_a_target_is_complete(name):
    fields = asdict(targets.load(name))
    assert fields["name"] == name
    assert set(fields["flops"]) == set(fields["achievable"]) - {"hbm"} >= {"fp8", "bf16", "tf32", "fp32"}
    numbers = [value for value in fields.values() if isinstance(value, int | float)]
    assert all(value > 0 for value in (*numbers, *fields["flops"].values()))
    assert all(0 < fraction <= 1 for fraction in fields["achievable"].values())
    said = " ".join(fields["sources"])
    assert all(
        word in said for word in ("SMs", "HBM" if name != "h800" else "memory", "L2", "NVLink", "NIC", "achievable")
    )


def test_rates_fit_the_chip():
    """Dense FP8: 1024 multiply-adds a clock and SM on each of 4 tensor cores, at the boost clock at most."""
    for name in GPUS:
        target = targets.load(name)
        assert target.flops["fp8"] <= 2 * 4096 * target.sms * target.clock_mhz * 1e6
        assert round(target.flops["fp8"] / target.flops["bf16"]) == 2


def test_h800_is_an_h100_with_less_nvlink():
    h100, h800 = asdict(targets.load("h100")), asdict(targets.load("h800"))
    differ = {key for key in h100 if h100[key] != h800[key]}
    assert differ == {"name", "device", "nvlink_bytes_per_s", "sources"}
    assert h800["nvlink_bytes_per_s"] < h100["nvlink_bytes_per_s"]


@pytest.fixture
def gpu(monkeypatch):
    """Pretends one."""

    def pretend(name, sms):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        found = SimpleNamespace(name=name, multi_processor_count=sms)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: found)

    return pretend


def test_auto_is_this_machines(gpu):
    assert targets.resolve("auto").name == "cpu"
    gpu("NVIDIA H800", 132)
    assert targets.resolve("auto").name == "h800"
    assert targets.is_here(targets.load("h800"))
    assert not targets.is_here(targets.load("h100"))


@pytest.mark.parametrize(("name", "sms"), [("NVIDIA H100 PCIe", 114), ("NVIDIA B300", 148), ("Graphics", 132)])
def test_a_gpu_without_a_data_file_is_refused(gpu, name, sms):
    gpu(name, sms)
    expected = f"expected a GPU of h100, h200, h800, found {name} with {sms} multiprocessors; try target='h100'"
    with pytest.raises(CompileError, match=expected):
        targets.resolve("auto")
