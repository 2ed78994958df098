"""What the timer counts, and what it waits for."""

import time

import pytest
import torch

from dsv3c.benchmarks.timing import interleaved, replayed

pytestmark = pytest.mark.gpu


def test_a_slow_host_counts_unless_replayed():
    x = torch.zeros(1, device="cuda")

    def call() -> torch.Tensor:
        time.sleep(0.002)
        return x.add_(1)

    replay = replayed(call)
    assert replay() is x
    assert x.item() == 2  # the first call and the replay; capturing computes nothing
    times = interleaved({"launched": call, "replayed": replay}, rounds=5)
    assert times["launched"].median_us > 1000 > 100 > times["replayed"].median_us


def test_freed_memory_is_cleared_before_anything_is_timed():
    """16 GB take 40 ms, 60 rounds of this half as long; a copy has a tenth less bandwidth meanwhile."""
    source, target = torch.zeros(2, 1 << 27, dtype=torch.uint8, device="cuda")
    torch.empty(1 << 34, dtype=torch.uint8, device="cuda")
    replay = replayed(lambda: target.copy_(source))
    first = interleaved({"copy": replay}, rounds=60)["copy"].median_us
    time.sleep(0.5)
    assert first < 1.05 * interleaved({"copy": replay}, rounds=60)["copy"].median_us
