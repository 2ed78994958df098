"""Decode steps of compiled models: over pages, and on a GPU as CUDA graphs, which change no token."""

from dataclasses import replace

import pytest
import torch

import dsv3c
from dsv3c.compiler import compilation_of
from dsv3c.decoding import Choice, GraphStep, Step, step_of
from dsv3c.generation import generate
from dsv3c.model import LatentCache
from dsv3c.paged_cache import PagedCache

GREEDY, SAMPLED = Choice(), Choice(do_sample=True, temperature=0.8, top_k=50, top_p=0.9)


def tokens_of(step: Step, prompt, count, mask=None):
    with torch.no_grad():
        return torch.cat([step.prefill(prompt, mask).clone(), *(step().clone() for _ in range(count - 1))], dim=1)


def plain(model, prompt, count, choice=GREEDY, mask=None):
    weight = model.model.embed_tokens.weight
    size = len(prompt), prompt.shape[1] + count
    return tokens_of(
        Step(model, PagedCache(model.config, *size, device=weight.device, dtype=weight.dtype), choice),
        prompt,
        count,
        mask,
    )


def graphed(model, prompt, count, choice=GREEDY, mask=None):
    step = step_of(model, len(prompt), prompt.shape[1] + count, choice)
    assert isinstance(step, GraphStep)
    tokens = tokens_of(step, prompt, count, mask)
    assert step.graph is not None
    return tokens


@pytest.fixture(scope="module")
def on_gpu():
    config = replace(
        dsv3c.preset("v3-671b").with_layers(2), vocab_size=512, hidden_size=1024, intermediate_size=2048,
        num_attention_heads=16, moe_intermediate_size=256, n_routed_experts=32, initializer_range=0.05,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return dsv3c.DeepseekV3(config).bfloat16().eval()


@pytest.mark.gpu
def test_a_replay_is_the_step(on_gpu):
    """Bit for bit, for several batch sizes over the same pages, short after long, greedy and sampled."""
    model = dsv3c.compile(on_gpu)
    for batch, prompt, count in ((3, 70, 70), (1, 5, 9), (3, 9, 40), (64, 60, 20), (3, 70, 70)):
        for choice in (Choice(), SAMPLED):
            ids = torch.randint(0, 512, (batch, prompt), device="cuda")
            out = []
            for run in (plain, graphed):
                torch.manual_seed(batch)
                out.append(run(model, ids, count, choice))
            assert torch.equal(*out), (batch, prompt, choice)


@pytest.mark.gpu
def test_padding_and_ends(on_gpu):
    model = dsv3c.compile(on_gpu)
    ids = torch.randint(0, 512, (3, 12), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    free = graphed(model, ids, 24, mask=mask)
    assert torch.equal(free, plain(model, ids, 24, mask=mask))
    ends = sorted({int(row[7]) for row in free})
    tokens = generate(model, ids, max_new_tokens=24, eos_token_id=ends, pad_token_id=0, attention_mask=mask)[:, 12:]
    stops = [next(i for i, token in enumerate(row.tolist()) if token in ends) for row in free]
    assert tokens.shape[1] == max(stops) + 1
    for row, new, stop in zip(free, tokens, stops, strict=True):
        assert torch.equal(new[: stop + 1], row[: stop + 1])
        assert not new[stop + 1 :].any()


@pytest.mark.gpu
def test_a_changed_weight_is_captured_again(on_gpu):
    """Written in place, replaced, and through `.data`; of a weight with an FP8 copy and of others."""
    model, ids = dsv3c.compile(on_gpu), torch.randint(0, 512, (2, 6), device="cuda")
    parameters = dict(model.named_parameters())
    layer = model.model.layers[1]
    before = graphed(model, ids, 12)

    def changed(name, change):
        kept = parameters[name].detach().clone()
        change(parameters[name])
        tokens = graphed(model, ids, 12)
        assert torch.equal(tokens, plain(model, ids, 12)), name
        assert not torch.equal(tokens, before), name
        with torch.no_grad():
            parameters[name].copy_(kept)
        model.weights_changed()
        assert torch.equal(graphed(model, ids, 12), before), name

    with torch.no_grad():
        changed("model.layers.1.mlp.experts.down_proj", lambda p: p.neg_())
        changed("lm_head.weight", lambda p: p.copy_(p.roll(1, 0)))
        changed("model.norm.weight", lambda p: setattr(p, "data", torch.randn_like(p)))

    def through_data(p):
        p.data.copy_(p.data.flip(0))
        model.weights_changed()

    changed("model.layers.0.self_attn.o_proj.weight", through_data)
    o_proj = layer.self_attn.o_proj
    kept = o_proj.weight
    o_proj.weight = torch.nn.Parameter(torch.randn_like(kept) * 0.1)
    assert torch.equal(graphed(model, ids, 12), plain(model, ids, 12))
    o_proj.weight = kept
    assert torch.equal(graphed(model, ids, 12), before)


@pytest.mark.gpu
def test_no_copy_of_the_cache(on_gpu):
    """A step writes its tokens in place: it takes less memory than a layer's pages."""
    model = dsv3c.compile(on_gpu)
    step = step_of(model, 4, 32768, Choice())
    ids = torch.randint(0, 512, (4, 8), device="cuda")
    with torch.no_grad():
        step.prefill(ids, None)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        Step.__call__(step)
        assert torch.cuda.max_memory_allocated() - before < step.cache.latents[0].nbytes / 4


@pytest.mark.gpu
def test_what_cannot_be_captured_is_launched(on_gpu):
    """The mutant: a layer that asks the host."""
    model, ids = dsv3c.compile(on_gpu), torch.randint(0, 512, (2, 6), device="cuda")
    expected = plain(model, ids, 8)
    model.model.layers[0].register_forward_hook(lambda module, args, out: bool(out[0].isnan().any()) and None)
    with pytest.warns(UserWarning, match="launched one by one"):
        tokens = generate(model, ids, max_new_tokens=8)
    assert torch.equal(tokens[:, 6:], expected)


@pytest.mark.usefixtures("without_codegen")
def test_pages_and_a_growing_cache_agree(make_model, compiled):
    """Greedy tokens over pages are those over LatentCache, padded prompts included."""
    model = make_model(torch.float64)  # no ties
    ids, mask = torch.randint(0, 256, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    tokens, cache = ids, LatentCache(model.config, 3, 80, dtype=torch.float64)
    with torch.no_grad():
        new = ids
        for _ in range(70):  # from one page to two
            new = model(new, attention_mask=mask, cache=cache, logits_to_keep=1).argmax(dim=-1)
            tokens, mask = torch.cat((tokens, new), dim=1), torch.cat((mask, mask.new_ones(3, 1)), dim=1)
    for candidate in (model, compiled(model)):
        assert torch.equal(
            candidate.generate(ids, max_new_tokens=70, eos_token_id=(), attention_mask=mask[:, :9]), tokens
        )


@pytest.mark.usefixtures("without_codegen")
def test_steps_compile_nothing_new(make_model, compiled):
    """Whatever the lengths and the number of pages."""
    model = compiled(make_model())
    for prompt, count in ((5, 3), (90, 3), (200, 3)):
        for batch in (1, 2, 5):
            generate(model, torch.randint(0, 256, (batch, prompt)), max_new_tokens=count)
    calls = {unit.name: backend.calls for unit, backend in compilation_of(model).backends.items()}
    assert set(calls.values()) == {1}
    assert sum("paged" in name for name in calls) == 2 * 2
