"""Where the GPU's time goes in a call: products, attention, everything else, and waiting.

From torch's profiler with nothing but the GPU's activity recorded, which leaves the host as quick as it is. Kernels are
told apart by name; the names come from profiles of every contender on an H200.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median_low

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROUNDS = 3
_ATTENTION = re.compile(r"sdpa|flash|fmha|cudnn::fusion::|mla_decode|^_combine_kernel")
_GEMM = re.compile(r"gemm|gemv|nvjet|wgrad|split_?k|^_add_splits_kernel", re.IGNORECASE)


@dataclass(frozen=True)
class KernelTimes:
    """Microseconds from the start of a call's first kernel to the end of its last."""

    gemm_us: float
    attention_us: float
    other_us: float
    idle_us: float

    @property
    def total_us(self) -> float:
        return self.gemm_us + self.attention_us + self.other_us + self.idle_us


def kind(name: str) -> str:
    """Of a kernel: "gemm", "attention" or "other". Casts are other, whatever they are for; so is what Inductor made of
    pointwise operators and reductions, which has their names, a product's with its epilogue is a template."""
    if name.startswith("triton_"):
        return "gemm" if name.startswith("triton_tem_") else "other"
    return "attention" if _ATTENTION.search(name) else "gemm" if _GEMM.search(name) else "other"


def kernel_times(call: Callable[[], object]) -> KernelTimes | None:
    """Of the median of ROUNDS calls, by length; None without a GPU, or kernels seen. The call must be warm."""
    if not torch.cuda.is_available():
        return None
    seen = [_kernels(call) for _ in range(ROUNDS)]
    if not all(seen):
        return None
    rounds = [_summary(kernels) for kernels in seen]
    middle = median_low(times.total_us for times in rounds)
    return next(times for times in rounds if times.total_us == middle)


def _kernels(call: Callable[[], object]) -> list[tuple[str, float, float]]:
    """Name, start and end of each."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return [(event.name, event.time_range.start, event.time_range.end) for event in events]


def _summary(kernels: list[tuple[str, float, float]]) -> KernelTimes:
    """Kernels run one after another; where two overlap, the time counts for the one that started first."""
    us = dict.fromkeys(("gemm", "attention", "other", "idle"), 0.0)
    ordered = sorted(kernels, key=lambda kernel: kernel[1])
    done = ordered[0][1]
    for name, start, end in ordered:
        us["idle"] += max(start - done, 0.0)
        us[kind(name)] += max(end - max(start, done), 0.0)
        done = max(done, end)
    return KernelTimes(**{f"{what}_us": time for what, time in us.items()})
