"""Decode steps of compiled models: over pages, and on a GPU as CUDA graphs, which change no token."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import dsv3c
import dsv3c.errors
from dsv3c.cache import LatentCache, PagedCache
from dsv3c.compiler import compilation_of
from dsv3c.decoding import Choice, Decoder, Step, step_of
from dsv3c.generation import generate
from dsv3c.model import DeepseekV3
from dsv3c.speculation import SPARE, SpeculativeStep

GREEDY = Choice()
PENALIZED = Choice(repetition_penalty=5.0)
SAMPLED = Choice(do_sample=True, temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.3)


def tokens_of(step, prompt, count, mask=None):
    with torch.no_grad():
        step.prefill(prompt, mask, count)
        for _ in range(count - 1):
            step()
    return step.tokens()


def plain(model, prompt, count, choice=GREEDY, mask=None):
    weight = model.model.embed_tokens.weight
    cache = PagedCache(
        model.config, len(prompt), prompt.shape[1] + count, mtp=model.mtp, device=weight.device, dtype=weight.dtype
    )
    return tokens_of(Step(model, cache, choice), prompt, count, mask)


def graphed(model, prompt, count, choice=GREEDY, mask=None):
    step = step_of(model, Step, len(prompt), prompt.shape[1] + count, choice)
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
        for choice in (GREEDY, SAMPLED):
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
    step = step_of(model, Step, 4, 32768, GREEDY)
    ids = torch.randint(0, 512, (4, 8), device="cuda")
    with torch.no_grad():
        step.prefill(ids, None, 8)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.run()
        assert torch.cuda.max_memory_allocated() - before < step.cache.latents[0].nbytes / 4


@pytest.mark.gpu
def test_guesses_on_a_gpu(on_gpu):
    """The graph's tokens are those of its step launched kernel by kernel; in float32 they are those of greedy decoding
    (in FP8 up to near ties: two tokens a sequence may be summed in another order than one)."""
    torch.manual_seed(1)
    with torch.device("cuda"):
        model = dsv3c.DeepseekV3(replace(on_gpu.config, num_nextn_predict_layers=1, vocab_size=64), mtp=True).eval()
    ids, found = torch.randint(0, 64, (5, 12), device="cuda"), []
    assert torch.equal(model.generate(ids, max_new_tokens=24, mtp=True), model.generate(ids, max_new_tokens=24))
    model = dsv3c.compile(model.bfloat16())
    tokens = model.generate(ids, max_new_tokens=48, mtp=True, on_accepted=found.append)
    step = step_of(model, SpeculativeStep, 5, 12 + 48 + SPARE, GREEDY)
    assert step.graph is not None
    with torch.no_grad():
        step.prefill(ids, None, 48)
        for _ in range(47):
            step.run()
    assert torch.equal(step.tokens(), tokens[:, 12:])
    assert step.accepted() == found[0]


@pytest.mark.gpu
def test_what_cannot_be_captured_is_launched(on_gpu):
    """The mutant: a layer that asks the host."""
    model, ids = dsv3c.compile(on_gpu), torch.randint(0, 512, (2, 6), device="cuda")
    expected = plain(model, ids, 8)
    model.model.layers[0].register_forward_hook(
        lambda module, args, out: print(end=str(bool(out[0].isnan().any()))[:0])
    )
    with pytest.warns(UserWarning, match="one by one"):
        tokens = generate(model, ids, max_new_tokens=8)
    assert torch.equal(tokens[:, 6:], expected)


def small(make_model, **changes):
    """A dense and a MoE layer."""
    return make_model(torch.float64, num_hidden_layers=2, hidden_size=32, intermediate_size=32,
                      moe_intermediate_size=16, num_attention_heads=2, kv_lora_rank=16, q_lora_rank=16,
                      qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8, n_group=2, topk_group=1,
                      num_experts_per_tok=2, eos_token_id=None, **changes)  # fmt: skip


@pytest.mark.usefixtures("without_codegen")
def test_pages_and_a_growing_cache_agree(make_model, compiled):
    """Greedy tokens over pages are those over LatentCache, padded prompts included. A compiled step is compiled once,
    whatever the lengths and the number of pages."""
    model = small(make_model)
    result = compiled(model)
    for prompt in (60, 9):  # from one page to two
        ids, mask = torch.randint(0, 256, (3, prompt)), torch.ones(3, prompt, dtype=torch.long)
        mask[1, :4] = 0
        tokens, new, masks, cache = ids, ids, mask, LatentCache(model.config, 3, prompt + 8, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(8):
                new = model(new, attention_mask=masks, cache=cache, logits_to_keep=1).argmax(dim=-1)
                tokens, masks = torch.cat((tokens, new), dim=1), torch.cat((masks, masks.new_ones(3, 1)), dim=1)
        for candidate in (model, result):
            assert torch.equal(candidate.generate(ids, max_new_tokens=8, attention_mask=mask), tokens)
    calls = {unit.name: backend.calls for unit, backend in compilation_of(result).backends.items()}
    assert set(calls.values()) == {1}
    assert sum("paged" in name for name in calls) == 2


def accepted(model, tokens, prompt, limit) -> tuple[int, int]:
    """Guesses and how many are right, from a pass over all tokens of one sequence."""
    _, logits = model(tokens[None], return_mtp=True)
    right = logits[0].argmax(dim=-1)[:-1] == tokens[2:]  # of token t + 2, guessed from t and t + 1
    place, guesses, rights = prompt + 1, 0, 0
    while place < prompt + limit:
        guesses, rights = guesses + 1, rights + int(right[place - 2])
        place += 1 + int(right[place - 2])
    return guesses, rights


@pytest.mark.usefixtures("without_codegen")
def test_guesses_change_no_token(make_model, compiled):
    """Of few words, so that many guesses are right. Padded prompts; ends and limits in the middle of a pair."""
    model = DeepseekV3(replace(small(make_model).config, vocab_size=5), mtp=True).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    ids, mask = torch.randint(0, 5, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = 0
    free = model.generate(ids, max_new_tokens=60, attention_mask=mask)
    with torch.no_grad():
        counts = [accepted(model, row[start:], 7 - start, 60) for row, start in zip(free, (3, 0, 0), strict=True)]
    found, result = [], compiled(model)
    for candidate in (model, result):
        tokens = candidate.generate(ids, max_new_tokens=60, attention_mask=mask, mtp=True, on_accepted=found.append)
        assert torch.equal(tokens, free)
    assert found == [tuple(map(sum, zip(*counts, strict=True)))] * 2
    assert 0 < found[0].accepted < found[0].guesses
    for count, ends in ((1, None), (2, None), (23, None), (24, None), (40, 0), (40, (1, 2)), (40, 3), (40, 4)):
        arguments = {"max_new_tokens": count, "eos_token_id": ends, "pad_token_id": 9, "attention_mask": mask}
        assert torch.equal(model.generate(ids, mtp=True, **arguments), model.generate(ids, **arguments)), (count, ends)


@pytest.mark.parametrize("arguments", [{"do_sample": True}, {"repetition_penalty": 1.1}, {}])
def test_guessing_needs_a_guesser_and_greed(make_model, arguments):
    model = small(make_model)
    model.mtp = bool(arguments)
    with pytest.raises(dsv3c.errors.Dsv3cError, match="mtp: expected"):
        model.generate(torch.zeros(1, 2, dtype=torch.long), max_new_tokens=2, mtp=True, **arguments)


class FakeGraph:
    """Replays by running again."""

    def pool(self):
        return (1, 0)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Streams and graphs that do nothing, and the mode in which waiting is an error; for the protocol alone."""

    class Mode:
        now = 0

    def set_mode(mode):
        Mode.now = mode

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda stream: nullcontext(),
        "CUDAGraph": FakeGraph, "graph": lambda graph, pool: nullcontext(), "get_rng_state": torch.get_rng_state,
        "set_rng_state": torch.set_rng_state, "get_sync_debug_mode": lambda: Mode.now, "set_sync_debug_mode": set_mode,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return Mode


@pytest.mark.parametrize(
    ("kind", "choice"), [(Step, GREEDY), (Step, SAMPLED), (Step, PENALIZED), (SpeculativeStep, GREEDY)]
)
def test_a_capture_leaves_no_trace(make_model, fake_cuda, kind, choice):
    """Nor does the second use of a step's buffers; a step that waits is not captured, and goes on."""
    model = DeepseekV3(replace(small(make_model).config, vocab_size=64), mtp=True).double().eval()
    ids, tokens = torch.randint(0, 64, (2, 5)), []
    decoder = Decoder(model, None)

    def hook(module, args, out):
        if fake_cuda.now == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def generated(step):
        torch.manual_seed(1)
        with torch.no_grad():
            step.prefill(ids, None, 20)
            if step.graph:
                step.graph.replay = step.run
            for _ in range(19):
                step()
        assert fake_cuda.now == 0
        return step.tokens()

    cache = PagedCache(model.config, 2, 25 + SPARE, mtp=True, dtype=torch.float64)
    tokens = generated(kind(model, cache, choice))
    for _ in range(2):
        step = decoder.step(kind, 2, 25 + SPARE, choice)
        assert torch.equal(generated(step), tokens)
        assert step.graph
    model.model.layers[0].register_forward_hook(hook)
    decoder = Decoder(model, None)
    step = decoder.step(kind, 2, 25 + SPARE, choice)
    with pytest.warns(UserWarning, match="one by one"):
        assert torch.equal(generated(step), tokens)
    assert step.graph is None


def test_what_makes_a_graph_stale(make_model, compiled):
    model = make_model(num_hidden_layers=1)
    weights = compilation_of(compiled(model, "fp8")).weights
    decoder, attention = Decoder(model, weights), model.model.layers[0].self_attn
    step = decoder.step(Step, 1, 8, GREEDY)
    kept = []  # so that no address is used again

    def stale():
        kept.append(weights.copies_of([[attention.o_proj.weight]], training=False))  # what running a layer does
        step.graph = FakeGraph()
        found = decoder.forget_stale()
        assert found == (step.graph is None)
        decoder.note_weights()
        return found

    stale()
    assert not stale()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # read where it is
        assert not stale()
        attention.o_proj.weight.mul_(2)  # its FP8 copy is another now
        assert stale()
        model.model.norm.weight.data = torch.ones_like(model.model.norm.weight)
        assert stale()
    attention.o_proj.weight.data.mul_(2)
    assert not stale()  # no trace
    weights.forget()
    assert stale()
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight.detach().clone())
    assert stale()
    assert not stale()
