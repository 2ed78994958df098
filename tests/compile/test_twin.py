"""A compiled model copied, pickled and compiled again, with hooks inside and parts replaced: eager's results, from the
parameters that are its own."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from dsv3c.compiler import compilation_of, compile

pytestmark = pytest.mark.usefixtures("without_codegen")


def ids(batch, tokens):
    return torch.randint(0, 256, (batch, tokens))


@pytest.fixture
def agree(logits, float64, close):
    """Whether a model's logits and gradients are as close to float64's as eager's are."""

    def ask(result, eager, tokens) -> bool:
        found = []
        for candidate in (result, eager, float64(eager)):
            candidate.zero_grad()
            out = logits(candidate, tokens)
            out.square().mean().backward()
            found.append([out.detach(), *(p.grad.clone() for p in candidate.parameters() if p.grad is not None)])
        return len(found[0]) == len(found[1]) and all(map(close, *found))

    return ask


def test_a_copy_of_a_part_is_eager_and_has_its_own_parameters(make_their_model, compiled, units):
    result, tokens = compiled(make_their_model(num_hidden_layers=2)), ids(1, 6)
    with torch.no_grad():
        before = result.model(tokens).last_hidden_state
        copied = copy.deepcopy(result.model)
        for layer in copied.layers:
            for parameter in layer.parameters():
                parameter.zero_()
        seen = set(units(result))
        assert torch.equal(copied(tokens).last_hidden_state, copied.norm(copied.embed_tokens(tokens)))
        assert set(units(result)) == seen
        assert torch.equal(result.model(tokens).last_hidden_state, before)


def test_a_deep_copy_of_the_model_keeps_what_was_done_to_it(make_their_model, compiled):
    result = compiled(make_their_model(num_hidden_layers=1)).train()
    result.lm_head = nn.Identity()
    copied = copy.deepcopy(result)
    assert copied.training
    assert type(copied.lm_head) is nn.Identity
    assert compilation_of(copied) is not compilation_of(result)


def test_pickles(dense_model, compiled, logits):
    result, file, tokens = compiled(dense_model), io.BytesIO(), ids(1, 6)
    with torch.no_grad():
        expected = logits(result, tokens)
        torch.save({"all": result, "part": result.model}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(logits(loaded["all"], tokens), expected)
    assert compilation_of(loaded["all"]).precision == "exact"
    assert loaded["part"].embed_tokens.weight is loaded["all"].model.embed_tokens.weight


def test_compiled_again_in_another_precision(dense_model, compiled, logits):
    once, tokens = compiled(dense_model), ids(1, 6)
    with torch.no_grad():
        logits(once, tokens)
        assert torch.equal(logits(compiled(once, "fp8"), tokens), logits(compiled(dense_model, "fp8"), tokens))


def steered(module, args, out):
    return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out


@pytest.mark.parametrize(
    ("family", "where", "first"),
    [("transformers", "layers.1.mlp", False), ("ours", "layers.0.self_attn.o_proj", True), ("ours", "layers.1", True),
     ("transformers", "layers.1", False), ("transformers", "embed_tokens", False), ("ours", "embed_tokens", False),
     ("transformers", "norm", True)],
)  # fmt: skip
def test_hooks(family, where, first, make_model, make_their_model, compiled, logits, agree):
    """On one module, before the first call or after; a hook on a part has its layer run eagerly, and says so."""
    make = {"ours": make_model, "transformers": make_their_model}[family]
    model = make(num_hidden_layers=2, first_k_dense_replace=2)
    result, eager, tokens = compiled(model), copy.deepcopy(model), ids(1, 6)
    if not first:
        logits(result, tokens)
    handles = [m.model.get_submodule(where).register_forward_hook(steered) for m in (result, eager)]
    if where in ("layers.1.mlp", "layers.0.self_attn.o_proj"):
        with pytest.warns(UserWarning, match=rf"model.{where[:8]} runs eagerly: .*hook"):
            assert agree(result, eager, tokens)
        assert any(where[:8] in note for note in compilation_of(result).notes)
    else:
        assert agree(result, eager, tokens)
    for handle in handles:
        handle.remove()
    assert agree(result, eager, tokens)


def test_transformers_hooks_stay_and_do_nothing(make_their_model, compiled, agree, units, float64, close):
    """Asked once for hidden states, the model keeps hooks on each attention and router."""
    model, tokens = make_their_model(), ids(1, 6)
    result, eager = compiled(model), copy.deepcopy(model)
    for asked in ({"output_hidden_states": True}, {"output_router_logits": True}):
        found = [m.model(tokens, **asked) for m in (result, eager, float64(eager))]
        states = [out.hidden_states or out.router_logits for out in found]
        assert len(states[0]) == len(states[1]) > 0
        assert all(map(close, *states))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dsv3c.compile")
        assert agree(result, eager, tokens)
    assert any("moe" in unit.name for unit in units(result).values())


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.full((4, base.in_features), 0.01))
        self.b = nn.Parameter(torch.full((base.out_features, 4), 0.01))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("first", [True, False])
def test_a_linear_replaced_in_one_layer(first, dense_model, compiled, logits, agree):
    """Before or after the model is compiled."""
    eager, tokens = copy.deepcopy(dense_model), ids(1, 6)
    result = None if first else compiled(dense_model)
    if result is not None:
        logits(result, tokens)
    for candidate in (dense_model if first else result, eager):
        attention = candidate.model.layers[1].self_attn
        attention.q_b_proj = LowRank(attention.q_b_proj)
    if first:
        assert agree(compiled(dense_model), eager, tokens)
    else:
        with pytest.warns(UserWarning, match="model.layers.1 runs eagerly: a part of it was replaced"):
            assert agree(result, eager, tokens)


def test_layers_with_equal_parameters_and_other_constants(make_model, compiled, agree):
    model, tokens = make_model(), ids(1, 6)
    eager = copy.deepcopy(model)
    for candidate in (model, eager):
        candidate.model.layers[2].mlp.gate.routed_scaling_factor *= 3
        candidate.model.layers[2].mlp.gate.top_k = 2
    assert agree(compiled(model), eager, tokens)


def test_a_layer_s_own_forward_of_the_user_s_stays(make_their_model, compiled, logits, float64, close):
    model = make_their_model()
    model.model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.warns(UserWarning, match="model.layers.1 runs eagerly"):
        result = compile(model, precision="exact")
    with torch.no_grad():
        tokens = ids(1, 6)
        assert close(*(logits(m, tokens) for m in (result, model, float64(model))))
