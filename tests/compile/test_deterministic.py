"""deterministic=True: the bits of a step repeat."""

from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch.fx.experimental.proxy_tensor import make_fx

import dsv3c
from dsv3c import backend
from dsv3c.compiler import compilation_of
from dsv3c.errors import CompileError
from dsv3c.kernels.attention import deterministic_algorithms
from dsv3c.passes import OrderSums, default, run


def attention_backward(x):
    return torch.ops.dsv3c.attention_backward(x, x, x, x, x, x[..., 0], None, 0.1, True)


def test_the_gradient_of_attention_is_ordered():
    gm = make_fx(attention_backward, tracing_mode="fake")(torch.zeros(1, 2, 4, 8))
    (traced,) = gm.graph.find_nodes(op="call_function", target=torch.ops.dsv3c.attention_backward.default)
    traced.meta["eager_input_vals"] = (traced.args, {})  # what Inductor holds the arguments against
    (record,) = run(gm, [OrderSums()])
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.dsv3c.attention_backward.default)
    assert record.sites == 1
    assert node.args[-2:] == (True, True)
    assert "eager_input_vals" not in node.meta
    assert run(gm, [OrderSums()])[0].sites == 0
    other = make_fx(torch.relu, tracing_mode="fake")(torch.zeros(2))
    assert run(other, [OrderSums()])[0].sites == 0


@pytest.mark.parametrize("deterministic", [False, True])
def test_inductor_is_told(make_model, compiled, monkeypatch, deterministic):
    told = []

    def compile_fx(gm, inputs, config_patches):
        told.append((torch.are_deterministic_algorithms_enabled(), config_patches.get("deterministic", False)))
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    model = compiled(make_model(num_hidden_layers=1), deterministic=deterministic)
    model(torch.zeros(1, 4, dtype=torch.long))
    assert set(told) == {(deterministic, deterministic)}
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert (OrderSums() in compilation_of(model).pipeline.joint) is deterministic


def test_backward_is_compiled_so_too(make_model, compiled, monkeypatch):
    """One token of one sequence: torch would compile backward when it is called."""
    told = []

    def inner(gm, inputs, is_backward=False, **kwargs):
        told.append((is_backward, torch.are_deterministic_algorithms_enabled()))
        return make_boxed_func(gm.forward)

    monkeypatch.setattr(backend, "compile_fx", partial(backend.compile_fx, inner_compile=inner))
    model = compiled(make_model(num_hidden_layers=1), deterministic=True)
    model(torch.zeros(1, 1, dtype=torch.long)).sum().backward()
    assert (True, True) in told
    assert all(enabled for _, enabled in told)


def test_settings_are_as_they_were(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config, "deterministic", True)
    with deterministic_algorithms():
        assert torch.are_deterministic_algorithms_enabled()
    assert config.deterministic
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("without", [{"skip": ("OrderSums",)}, {"passes": default("exact")}])
def test_the_pass_is_needed(make_model, without):
    with pytest.raises(CompileError, match="OrderSums"):
        dsv3c.compile(make_model(num_hidden_layers=1), deterministic=True, **without)


SIZES = {
    "num_hidden_layers": 1, "first_k_dense_replace": 0, "vocab_size": 4096, "hidden_size": 2048,
    "num_attention_heads": 32, "moe_intermediate_size": 512, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("make", "more", "precision"),
    [
        ("make_model", {}, "fp8"),
        ("make_model", {}, "exact"),
        ("make_their_model", {"num_key_value_heads": 32}, "fp8"),
    ],
)
def test_a_step_again_and_again(make, more, precision, request, compiled, logits):
    """Sizes at which steps differ without it: in FP8 now and then, in exact precision each time."""
    model = request.getfixturevalue(make)(torch.bfloat16, **SIZES, **more).cuda()
    model = compiled(model, precision, deterministic=True)
    ids = torch.randint(4096, (1, 4096), device="cuda")

    def step():
        out = logits(model, ids)
        out.float().square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return {"output": out.detach(), **gradients}

    first = step()
    assert len(first) == 1 + sum(p.requires_grad for p in model.parameters())
    for _ in range(5):
        again = step()
        assert not [name for name, tensor in first.items() if not torch.equal(tensor, again[name])]
