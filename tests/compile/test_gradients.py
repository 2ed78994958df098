"""Gradients that go other ways than from a loss over the logits to the parameters: through a cache, a mask, a view, a
hook; and under autocast."""

import pytest
import torch
from torch import nn

from dsv3c.errors import Dsv3cError
from dsv3c.kernels.attention import attention, attention_backward

pytestmark = pytest.mark.usefixtures("without_codegen")
SMALL = {"num_hidden_layers": 2, "first_k_dense_replace": 2}


def ids(batch, tokens):
    return torch.randint(0, 256, (batch, tokens))


@pytest.fixture
def same(compiled, float64, close):
    """Whether `run(model)` leaves the gradients that it leaves in eager's model, and returns what it returns there."""

    def ask(model, run) -> bool:
        found = []
        for candidate in (compiled(model), model, float64(model)):
            candidate.zero_grad()
            results = run(candidate)
            gradients = {n: p.grad.clone() for n, p in candidate.named_parameters() if p.grad is not None}
            found.append({**dict(enumerate(results)), **gradients})
        ours, eager, exact = found
        return list(ours) == list(eager) and all(close(ours[name], eager[name], exact[name]) for name in ours)

    return ask


def test_through_a_cache(make_their_model, same):
    """Of one prompt, two continuations' losses train its layers."""
    transformers, tokens = pytest.importorskip("transformers"), ids(2, 12)

    def run(model):
        cache = transformers.DynamicCache(config=model.config)
        prompt = model(tokens[:, :5], past_key_values=cache).logits
        rest = model(tokens[:, 5:], past_key_values=cache).logits
        (prompt.square().mean() + rest.square().mean()).backward()
        return ()

    assert same(make_their_model(**SMALL), run)


def test_through_a_cache_of_a_model_partly_frozen(make_their_model, same):
    model, tokens = make_their_model(**SMALL), ids(1, 9)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0.self_attn.kv_a" in name or "layers.1.input" in name)

    def run(candidate):
        out = candidate(tokens[:, :4])
        candidate(tokens[:, 4:], past_key_values=out.past_key_values).logits.square().mean().backward()
        return ()

    assert same(model, run)


def test_through_a_cache_after_the_backward_that_frees_it(make_their_model, compiled):
    model, tokens = compiled(make_their_model(**SMALL)), ids(1, 9)
    out = model(tokens[:, :4])
    out.logits.square().mean().backward()
    with pytest.raises(Dsv3cError, match="the backward through a cache"):
        model(tokens[:, 4:], past_key_values=out.past_key_values).logits.square().mean().backward()


@pytest.mark.parametrize(
    ("shape", "learned"), [((1, 1, 8, 8), False), ((2, 4, 8, 8), False), ((2, 1, 8, 8), True)]
)  # fmt: skip
def test_a_mask_that_is_added(shape, learned, make_their_model, same):
    tokens, causal = ids(2, 8), torch.full((8, 8), -1e4).triu(1)
    mask = torch.randn(shape) + causal

    def run(model):
        added = mask.detach().clone().to(model.dtype).requires_grad_(learned)
        out = model(tokens, attention_mask=added, use_cache=False).logits
        out.square().mean().backward()
        return (out.detach(), *([added.grad] if learned else []))

    assert same(make_their_model(**SMALL), run)


def test_the_attention_of_an_added_mask():
    """It is the one of a bool mask, where it says the same; rows that attend to nothing included."""
    q, k, v, dout = (torch.randn(2, 3, 5, size) for size in (8, 8, 4, 4))
    allowed = torch.rand(2, 1, 5, 5) > 0.5
    allowed[..., 0] = True
    allowed[0, 0, 3] = False
    added = torch.zeros(2, 1, 5, 5).masked_fill(~allowed, -torch.inf)
    found = []
    for mask in (allowed, added):
        out, lse = attention(q, k, v, mask, 0.3, False)
        found.append((out, *attention_backward(dout, q, k, v, out, lse, mask, 0.3, False)))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("part", ["norm", "head"])
def test_of_views(part, make_model, compiled):
    """A view made without gradients leads to none; one that is a leaf has its own; x may be rows alone."""
    model = make_model(num_hidden_layers=1)
    found = []
    for candidate in (compiled(model), model):
        module = candidate.lm_head if part == "head" else candidate.model.norm
        base = torch.ones(2, 5, 256, requires_grad=True)
        with torch.no_grad():
            view = base.view(2, 5, 256)
        module(view).sum().backward()
        leaf = torch.ones(2, 5, 256).view(2, 5, 256).requires_grad_()
        module(leaf).sum().backward()
        rows = torch.ones(10, 256, requires_grad=True)
        module(rows).sum().backward()
        found.append((base.grad, leaf.grad is None, module(rows).shape, rows.grad.shape))
    assert found[0] == found[1] == (None, False, found[1][2], (10, 256))


def test_bits_seen_as_another_dtype(make_model, compiled):
    model, bits = make_model(num_hidden_layers=1), torch.randint(0, 1 << 29, (1, 4, 256), dtype=torch.int32)
    with torch.no_grad():
        x = bits.view(torch.float32)
        assert torch.equal(compiled(model).lm_head(x), model.lm_head(x))


@pytest.mark.parametrize("where", ["model.norm", "lm_head", "model.layers.1"])
def test_backward_hooks(where, dense_model, same):
    def run(candidate):
        module, seen = candidate.get_submodule(where), []
        handles = [
            module.register_full_backward_pre_hook(lambda module, d: (3 * d[0], *d[1:])),
            module.register_full_backward_hook(lambda module, dx, dy: seen.append(dx[0].clone())),
        ]
        out = candidate(torch.arange(8)[None])
        (out if isinstance(out, torch.Tensor) else out.logits).square().mean().backward()
        for handle in handles:
            handle.remove()
        return seen

    assert same(dense_model, run)


def test_of_trained_embeddings(make_their_model, same):
    """A Parameter, whose sizes Dynamo takes for fixed."""

    def run(model):
        torch.manual_seed(0)
        x = nn.Parameter(torch.randn(2, 8, 256).to(model.dtype))
        model(inputs_embeds=x).logits.square().mean().backward()
        return (x.grad,)

    assert same(make_their_model(**SMALL), run)


def autocasts(result, model, logits) -> bool:
    """As eager does, in forward and backward, and afterwards no more."""
    tokens = ids(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [logits(candidate, tokens) for candidate in (result, model)]
    outs[0].float().square().mean().backward()
    gradients = [p.grad for p in result.parameters() if p.grad is not None]
    return (
        outs[0].dtype == outs[1].dtype == torch.bfloat16
        and all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
        and logits(result, tokens).dtype == torch.float32
    )


def test_under_autocast(dense_model, compiled, logits):
    assert autocasts(compiled(dense_model), dense_model, logits)


def test_in_fp8_under_autocast(make_their_model, compiled, logits):
    model = make_their_model(num_hidden_layers=2)  # one of them of experts
    assert autocasts(compiled(model, "fp8"), model, logits)
