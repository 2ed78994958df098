"""One timer for benchmarks: contenders take turns, so that a machine that slows down slows all of them.

A kernel is timed as `replayed`. Launched from Python it would count that the GPU waits for the host: the flush before
covers 160 µs, and a product's launch takes 100 to 400 after a wait, more in one process than in another.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeVar

import torch

Result = TypeVar("Result")

FLUSH_BYTES = 512 << 20  # several times the L2 cache of any GPU there is
LEAST_ROUNDS = 5
CLEARED = 200e9  # bytes a second, half of what an H200 seems to clear


@dataclass(frozen=True)
class Timing:
    """Microseconds of a call: the median, and the 20th and 80th percentile of so many runs; and the GPU memory it takes
    above what was allocated before (None on a CPU)."""

    median_us: float
    p20_us: float
    p80_us: float
    runs: int
    peak_bytes: int | None


def interleaved(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 50, seconds: float = 10.0
) -> dict[str, Timing]:
    """Times the contenders in turn, in rounds, for about `seconds` in all. They must be warm.

    With a GPU: device events around the call, the device idle and its L2 cache flushed before it, so that a call's own
    launches count. Without: the wall clock.
    """
    clock = _gpu_us if torch.cuda.is_available() else _cpu_us
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    start = time.perf_counter()
    for count in range(1, rounds + 1):
        for name in order:
            times[name].append(clock(contenders[name]))
        order.append(order.pop(0))
        if count >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
    return {name: summary(us, _peak_bytes(contenders[name])) for name, us in times.items()}


def replayed(call: Callable[[], Result]) -> Callable[[], Result]:
    """`call` from a CUDA graph, which costs what it costs the GPU. Returns the graph's own result, each time the same
    memory; `call`, and what it refers to, is kept.

    Before, cached memory is given back and what follows that is waited for: for 2.5 ms a GB, while the driver clears it
    as it seems, others have a tenth less bandwidth (H200).
    """
    call()  # compiles
    reserved = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    time.sleep((reserved - torch.cuda.memory_reserved()) / CLEARED)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay(_keep: Callable[[], Result] = call) -> Result:
        graph.replay()
        return result

    return replay


def copy_of(traffic: int) -> Callable[[], object]:
    """Reads and writes so many bytes together, as a contender. Not to be replayed: a graph's copy of gigabytes, or of a
    multiple of 2 KiB only, has two thirds of the speed (H200)."""
    source, target = torch.empty(2, traffic // 2, dtype=torch.uint8, device="cuda")
    return lambda: target.copy_(source)


def summary(us: list[float], peak_bytes: int | None = None) -> Timing:
    p20, *_, p80 = quantiles(us, n=5, method="inclusive") if len(us) > 1 else 4 * us
    return Timing(median(us), p20, p80, len(us), peak_bytes)


def _cpu_us(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def _gpu_us(call: Callable[[], object]) -> float:
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) * 1e3


def _peak_bytes(call: Callable[[], object]) -> int | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
