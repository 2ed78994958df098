"""What the timer counts, and what it waits for."""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from dsv3c.benchmarks.timing import CLEARED, interleaved, replayed


def test_what_is_freed_is_waited_for_before_a_graph_is_captured(monkeypatch):
    done, reserved, result = [], [5 * CLEARED, 2 * CLEARED], object()

    @contextmanager
    def capture(graph):
        done.append("captures")
        yield

    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved.pop(0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("frees"))
    monkeypatch.setattr(time, "sleep", done.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: done.append("replays")))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    replay = replayed(lambda: (done.append("calls"), result)[1])
    assert done == ["calls", "frees", 3.0, "captures", "calls"]
    assert replay() is result
    assert done[5:] == ["replays"]


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_freed_memory_is_cleared_before_anything_is_timed():
    """16 GB take 40 ms, 60 rounds of this half as long; a copy has a tenth less bandwidth meanwhile."""
    source, target = torch.zeros(2, 1 << 27, dtype=torch.uint8, device="cuda")
    torch.empty(1 << 34, dtype=torch.uint8, device="cuda")
    replay = replayed(lambda: target.copy_(source))
    first = interleaved({"copy": replay}, rounds=60)["copy"].median_us
    time.sleep(0.5)
    assert first < 1.05 * interleaved({"copy": replay}, rounds=60)["copy"].median_us
