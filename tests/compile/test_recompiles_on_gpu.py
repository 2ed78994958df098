"""On a GPU, after a warm-up of {many tokens, one token, padded}, no number of tokens compiles anything: not in Dynamo,
not in Inductor, not in Triton."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch._dynamo.utils import counters

import dsv3c
from dsv3c.model import DeepseekV3

pytestmark = pytest.mark.gpu

TOKEN_COUNTS = (1, 17, 3001, *range(2, 17), *range(100, 2148, 64))
WARM_UP = ((2, False), (5, False), (640, False), (1, False), (6, True), (640, True))


class Compilations:
    """What each compiler has done so far, what it found in its cache on disk included."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def kernel(self, *, src, **_) -> None:
        self.kernels.append(src.name)

    def counts(self) -> dict[str, int]:
        caches = (counters["inductor"], counters["aot_autograd"])
        return {
            "Dynamo": counters["stats"]["unique_graphs"],
            "Inductor": sum(n for cache in caches for what, n in cache.items() if "_cache_" in what),
            "Triton": len(self.kernels),
        }


def forget_kernels() -> None:
    """As in a new process, whatever tests ran in this one."""
    from dsv3c.kernels import implementations, launch, offline, wide_mm

    implementations._prepared.clear()
    wide_mm._compiled.clear()
    for family in offline.FAMILIES:
        for kernel in vars(import_module(f"dsv3c.kernels.{family}")).values():
            if isinstance(getattr(kernel, "run", None), launch._Launcher):
                kernel.device_caches.clear()
                kernel.run.loaded.clear()


@pytest.fixture
def compilations(monkeypatch):
    from triton import knobs

    torch._dynamo.reset()
    counters.clear()
    forget_kernels()
    found = Compilations()
    monkeypatch.setattr(knobs.compilation, "listener", found.kernel)
    return found


def calls_of(model: DeepseekV3, training: bool) -> Callable[[int, bool], None]:
    """A call with so many tokens, padded or not."""
    compiled = dsv3c.compile(model, precision="fp8")

    def call(tokens: int, padded: bool) -> None:
        ids = torch.randint(0, 256, (1 + padded, tokens), device="cuda")
        mask = torch.ones_like(ids) if padded else None
        if mask is not None:
            mask[0, : tokens // 2] = 0
        with torch.set_grad_enabled(training):
            out = compiled(ids, attention_mask=mask)
        if training:
            out.float().square().mean().backward()
            compiled.zero_grad(set_to_none=True)

    return call


@pytest.mark.parametrize("training", [False, True])
def test_fifty_token_counts(training, compilations, gpu_model):
    assert len(set(TOKEN_COUNTS)) == 50
    call = calls_of(gpu_model, training)
    for tokens, padded in WARM_UP:
        call(tokens, padded)
    warm = compilations.counts()
    assert all(count > 0 for count in warm.values()), warm  # each counter moves
    known = set(compilations.kernels)
    for tokens in TOKEN_COUNTS:
        for padded in (False, True):
            if tokens > 1 or not padded:
                call(tokens, padded)
                assert compilations.counts() == warm, (tokens, padded, set(compilations.kernels) - known)
