"""Decoding over the latent itself: the same logits, for both families, and only where it may be done."""

import copy

import pytest
import torch

from dsv3c.cache import LatentCache, PagedCache, Pages
from dsv3c.compiler import compilation_of
from dsv3c.numerics import MODEL_DISTANCE, distance
from dsv3c.passes import AbsorbAttention, RaiseAttention, RaiseGroupedLinear, absorb_attention

pytestmark = pytest.mark.usefixtures("without_codegen")

V3_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 2}
PASSES = (RaiseAttention(), RaiseGroupedLinear(), AbsorbAttention())


def sites(result) -> dict[str, int]:
    """By unit, of those that decode."""
    return {
        unit.name: sum(record.sites for record in backend.joint.records)
        for unit, backend in compilation_of(result).backends.items()
        if "cached" in unit.name or "paged" in unit.name
    }


def three_steps(result, model, batch, num_new):
    """`pages_step` compiled, eager, and in float64."""
    exact = copy.deepcopy(model).double()
    return [pages_step(*pair, batch, num_new) for pair in ((result, model), (model, model), (exact, exact))]


def pages_step(model, eager, batch, num_new):
    """Logits of new tokens after prompts of several lengths, which `eager` reads: compiling that, too, takes longer."""
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 256, (batch, 63 + num_new)), torch.ones(batch, 63, dtype=torch.long)
    mask[0, :5] = 0
    cache = PagedCache(model.config, batch, 70, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        eager(ids[:, :63], attention_mask=mask, cache=cache)
        return model(ids[:, 63:], cache=cache)


def decode(model, eager, batch, prompt, steps, new_cache, logits, mask=None):
    """Logits of the tokens after the prompt, which `eager` reads, one at a time."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (batch, prompt + steps))
    cache, argument = new_cache(model, batch, prompt + steps)
    outs = []
    for end in range(prompt, prompt + steps + 1):
        chunk = tokens[:, :prompt] if end == prompt else tokens[:, end - 1 : end]
        masks = {"attention_mask": mask[:, :end]} if mask is not None else {}
        with torch.no_grad():
            outs.append(logits(eager if end == prompt else model, chunk, **{argument: cache}, **masks)[:, -1])
    return torch.stack(outs[1:])


def our_cache(model, batch, tokens):
    return LatentCache(model.config, batch, tokens, dtype=next(model.parameters()).dtype), "cache"


def their_cache(model, batch, tokens):
    return pytest.importorskip("transformers").DynamicCache(), "past_key_values"


@pytest.mark.parametrize(("family", "batch"), [("ours", 3), ("theirs", 1)])
def test_the_logits_are_those_of_the_expanded_form(make_model, make_their_model, compiled, logits, family, batch):
    model = (make_model if family == "ours" else make_their_model)(**V3_LATENT)
    new_cache = our_cache if family == "ours" else their_cache
    exact = copy.deepcopy(model).double()
    if family == "theirs":
        exact.set_experts_implementation("eager")
    result = compiled(model, passes=PASSES)
    # From one page to two, in one unit.
    out, eager, truth = (
        decode(*pair, batch, 60, 8, new_cache, logits) for pair in ((result, model), (model, model), (exact, exact))
    )
    assert set(sites(result).values()) == {1}
    assert len(sites(result)) == 2  # dense and MoE
    for found, reference in zip(distance(out, truth), distance(eager, truth), strict=True):
        assert found <= MODEL_DISTANCE * reference


@pytest.mark.parametrize(("batch", "num_new"), [(3, 1), (1, 2), (1, 1)])
def test_pages_are_read_where_they_are(make_model, compiled, batch, num_new):
    model = make_model(**V3_LATENT)
    result = compiled(model, passes=PASSES)
    out, eager, truth = three_steps(result, model, batch, num_new)
    assert set(sites(result).values()) == {1}
    assert len(sites(result)) == 2  # dense and MoE
    for unit, backend in compilation_of(result).backends.items():
        assert "read_pages" not in backend.joint.text
        if "paged" in unit.name:  # heads are put behind one another, which of one token they are
            assert ("aten.clone" in backend.joint.text) == (batch * num_new > 1)
    for found, reference in zip(distance(out, truth), distance(eager, truth), strict=True):
        assert found <= MODEL_DISTANCE * reference


def test_another_scale_breaks_the_bound(make_model, compiled, monkeypatch):
    right = absorb_attention._absorbed
    monkeypatch.setattr(absorb_attention, "_absorbed", lambda at, q, scale, *rest: right(at, q, 1.01 * scale, *rest))
    model = make_model(**V3_LATENT | {"num_hidden_layers": 1})
    result = compiled(model, passes=PASSES)
    out, eager, truth = three_steps(result, model, 3, 1)
    assert distance(out, truth)[0] > MODEL_DISTANCE * distance(eager, truth)[0]


def test_a_mask_that_is_not_the_pages_stays(make_model, compiled, monkeypatch):
    """A window over the last tokens, which mla_decode does not know."""
    append = Pages.append

    def windowed(self, latent):
        latents, seen = append(self, latent)
        return latents, seen & ~seen.roll(-8, dims=-1)

    monkeypatch.setattr(Pages, "append", windowed)
    model = make_model(**V3_LATENT)
    result = compiled(model, passes=PASSES)
    out, eager, truth = three_steps(result, model, 2, 1)
    assert set(sites(result).values()) == {0}
    for found, reference in zip(distance(out, truth), distance(eager, truth), strict=True):
        assert found <= MODEL_DISTANCE * reference


def test_masks_and_other_latents_stay(make_model, compiled, logits):
    padded = torch.ones(2, 12, dtype=torch.long)
    padded[0, :3] = 0
    for changes, mask, reason in (
        (V3_LATENT, padded, "a mask"),
        ({}, None, "512 + 64"),
    ):
        model = make_model(**changes | {"num_hidden_layers": 1})
        result = compiled(model, passes=PASSES)
        decode(result, model, 2, 10, 2, our_cache, logits, mask)
        assert set(sites(result).values()) == {0}
        skipped = [s for b in compilation_of(result).backends.values() for r in b.joint.records for s in r.skipped]
        assert any(reason in site.reason for site in skipped)
