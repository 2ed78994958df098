"""What the compiler knows of a GPU: one data file a target, and the roofline time of an operator on it."""

import hashlib
import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from dsv3c.errors import CompileError

_FOLDER = Path(__file__).parent / "targets"


@dataclass(frozen=True)
class Target:
    """A data file of tuning/targets. `flops` and the rates are the datasheet's; `achievable` the fraction of each that
    large kernels reach, with its source in `sources`."""

    name: str
    device: str
    arch: str
    sms: int
    clock_mhz: int
    shared_memory_per_block_bytes: int
    registers_per_sm: int
    flops: dict[str, float]
    hbm_bytes: int
    hbm_bytes_per_s: float
    l2_bytes: int
    nvlink_bytes_per_s: float
    nic_bytes_per_s: float
    achievable: dict[str, float]
    sources: tuple[str, ...]

    def roofline_us(self, flops: float, moved_bytes: float, dtype: str) -> float:
        """Microseconds for `flops` in `dtype` ("bf16", "fp8", "fp32") and `moved_bytes` of device memory, whichever is
        longer, at the achievable rates. A prediction."""
        compute = flops / (self.flops[dtype] * self.achievable[dtype])
        memory = moved_bytes / (self.hbm_bytes_per_s * self.achievable["hbm"])
        return 1e6 * max(compute, memory)


def fingerprint(name: str) -> str:
    """SHA-256 of the data file: predictions depend on it."""
    return hashlib.sha256((_FOLDER / f"{name}.json").read_bytes()).hexdigest()


def names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


@cache
def load(name: str) -> Target:
    """Raises CompileError for an unknown target."""
    if name not in names():
        near = get_close_matches(name, names(), 1) or names()
        raise CompileError(f"target: expected one of {', '.join(['auto', *names()])}, found {name!r}; try {near[0]}")
    fields = json.loads((_FOLDER / f"{name}.json").read_text())
    return Target(**{**fields, "sources": tuple(fields["sources"])})


def is_here(target: Target) -> bool:
    """Whether this process's GPU is one. A PCIe card has fewer multiprocessors than its namesake."""
    import torch

    if not torch.cuda.is_available():
        return False
    gpu = torch.cuda.get_device_properties()
    return target.device.split()[1:2] == gpu.name.split()[1:2] and target.sms == gpu.multi_processor_count


def resolve(name: str) -> Target:
    """`load`, with "auto" for this machine's GPU, or the CPU.

    Raises:
        CompileError: an unknown target, or "auto" on a GPU that has no data file.
    """
    if name != "auto":
        return load(name)
    import torch

    if not torch.cuda.is_available():
        return load("cpu")
    gpus = [target for target in map(load, names()) if target.arch != "cpu"]
    here = next(filter(is_here, gpus), None)
    if here is None:
        gpu = torch.cuda.get_device_properties()
        raise CompileError(
            f"target: expected a GPU of {', '.join(target.name for target in gpus)}, found {gpu.name} with "
            f"{gpu.multi_processor_count} multiprocessors; try target='h100'"
        )
    return here
