"""Each unit is compiled once, whatever sizes follow; equal layers share units."""

import itertools

import pytest
import torch
from torch._dynamo.utils import counters

from dsv3c import families
from dsv3c.cache import LatentCache
from dsv3c.compiler import compilation_of

pytestmark = pytest.mark.usefixtures("without_codegen")

TOKEN_COUNTS = (1, 17, 3001, *range(2, 17), *range(40, 72))
LAYERS = 10


def assert_no_recompiles(model) -> None:
    compilation = compilation_of(model)
    assert all(backend.calls == 1 for backend in compilation.backends.values())
    assert counters["stats"]["unique_graphs"] == len(compilation.backends)
    assert not counters["graph_break"]


@pytest.fixture(autouse=True)
def fresh_counters():
    torch._dynamo.reset()
    counters.clear()


def small(make_model):
    return make_model(num_hidden_layers=LAYERS, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
                      num_attention_heads=2, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
                      v_head_dim=8, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2)  # fmt: skip


def test_fifty_token_counts_after_two_kinds_of_call(make_model, compiled):
    assert len(set(TOKEN_COUNTS)) == 50
    model = compiled(small(make_model))
    with torch.no_grad():
        for warm_up in (5, 1):
            model(torch.randint(0, 256, (1, warm_up)))
        compilations = counters["stats"]["unique_graphs"]
        assert compilations == 10  # rotary angles, dense and MoE layer, final norm, head; many tokens and one
        for count in TOKEN_COUNTS:
            model(torch.randint(0, 256, (1, count)))
    assert counters["stats"]["unique_graphs"] == compilations
    assert_no_recompiles(model)


def test_all_kinds_of_calls_twice(make_model, compiled):
    """{no cache, cache, gradients} x {batch 1, 2} x {T = 1, T > 1} x {padded or not}: a second round, at other sizes
    and in training mode, compiles nothing, and no unit is compiled twice."""
    model = compiled(small(make_model))

    def round_of_calls(tokens, cached):
        for kind, batch, count, padded in itertools.product(
            ("no cache", "cache", "gradients"), (1, 2), (1, tokens), (False, True)
        ):
            past = cached if kind == "cache" else 0
            cache = LatentCache(model.config, batch, past + count) if past else None
            mask = torch.ones(batch, past + count, dtype=torch.long) if padded else None
            if padded and past + count > 1:
                mask[0, 0] = 0
            with torch.set_grad_enabled(kind == "gradients"):
                if past:
                    model(torch.randint(0, 256, (batch, past)), cache=cache)
                out = model(torch.randint(0, 256, (batch, count)), cache=cache, attention_mask=mask)
                if kind == "gradients":
                    out.square().mean().backward()

    round_of_calls(tokens=5, cached=3)
    compilations = counters["stats"]["unique_graphs"]
    model.train()
    round_of_calls(tokens=9, cached=6)
    assert counters["stats"]["unique_graphs"] == compilations
    assert_no_recompiles(model)


def test_depth_costs_no_compilation(make_model, compiled):
    sizes = []
    for depth in (3, LAYERS):
        model = compiled(make_model(num_hidden_layers=depth))
        with torch.no_grad():
            model(torch.randint(0, 256, (1, 6)))
        sizes.append(len(compilation_of(model).backends))
    assert sizes == [5, 5]


def test_a_view_of_all_of_a_tensor_is_not_copied():
    """As positions are; Dynamo would guard the sizes of what any other view is one of."""
    x = torch.arange(6.0, requires_grad=True) * 1
    for view, copied in (
        (x, False), (x[:], False), (x[None], False), (x.expand(1, -1), False), (x.view(2, 3), False),
        (x.expand(2, -1), True), (x[1:], True), (x.view(2, 3).t(), True),
    ):  # fmt: skip
        found = families._no_view(view)
        assert found._base is None
        assert (found.data_ptr() != view.data_ptr()) is copied
        assert torch.equal(found, view)
        assert found.is_contiguous()
        assert found.requires_grad
