"""On a GPU, after a warm-up of {many tokens, one token, padded}, no number of tokens compiles anything: not in Dynamo,
not in Inductor, not in Triton."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

import dsv3c

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


@pytest.fixture
def compilations(monkeypatch):
    from triton import knobs

    torch._dynamo.reset()
    counters.clear()
    found = Compilations()
    monkeypatch.setattr(knobs.compilation, "listener", found.kernel)
    return found


def model_and_calls(training: bool) -> Callable[[int, bool], None]:
    """A call of a model of one dense and one MoE layer with so many tokens, padded or not."""
    config = replace(
        dsv3c.preset("v3-671b").with_layers(2), vocab_size=256, hidden_size=1024, intermediate_size=2048,
        num_attention_heads=16, moe_intermediate_size=256, n_routed_experts=32,
    )  # fmt: skip
    with torch.device("cuda"):
        model = dsv3c.DeepseekV3(config).bfloat16()
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
def test_fifty_token_counts(training, compilations):
    assert len(set(TOKEN_COUNTS)) == 50
    call = model_and_calls(training)
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
