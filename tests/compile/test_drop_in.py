"""The compiled model is the model: class, call, parameters, gradients, cache; and the given one stays eager."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dsv3c import embedding, families
from dsv3c.cache import LatentCache
from dsv3c.capture import Units
from dsv3c.compiler import compilation_of, compile
from dsv3c.errors import CompileError, Dsv3cError
from dsv3c.generation import generate
from dsv3c.model import DeepseekV3
from dsv3c.passes import PassError, Tier
from dsv3c.passes.contract import Level

pytestmark = pytest.mark.usefixtures("without_codegen")

DENSE = {"num_hidden_layers": 2, "first_k_dense_replace": 2}  # for what has nothing to do with experts


def ids(batch, tokens):
    return torch.randint(0, 256, (batch, tokens))


def _never(*args):
    raise AssertionError("a compiled unit was asked for")


def test_class_parameters_and_state_dict(model, compiled):
    result = compiled(model)
    assert type(result) is type(model)
    assert result.config is model.config
    assert list(result.state_dict()) == list(model.state_dict())
    for (name, ours), (_, theirs) in zip(result.named_parameters(), model.named_parameters(), strict=True):
        assert ours is theirs, name


def test_the_given_model_stays_eager(dense_model, compiled, logits, units, monkeypatch):
    model, result = dense_model, compiled(dense_model)
    with torch.no_grad():
        logits(model, ids(1, 8))
        assert not units(result)  # the eager call compiled nothing
        monkeypatch.setattr(Units, "_function", _never)
        logits(model, ids(1, 8))  # and asks for no compiled unit
        with pytest.raises(AssertionError, match="a compiled unit"):
            logits(result, ids(1, 8))


def test_assigning_a_parameter_reaches_both(dense_model, compiled, logits):
    model, result = dense_model, compiled(dense_model)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    with torch.no_grad():
        assert not logits(result, ids(1, 4)).any()


def test_a_deep_copy_has_parameters_of_its_own(make_model, compiled):
    result, tokens = compiled(make_model(num_hidden_layers=1)), ids(1, 4)
    with torch.no_grad():
        before, copied = result(tokens), copy.deepcopy(result)
        for parameter in copied.model.layers.parameters():
            parameter.zero_()
        assert torch.equal(result(tokens), before)
        assert torch.equal(copied(tokens), copied.lm_head(copied.model.norm(copied.model.embed_tokens(tokens))))


@pytest.mark.parametrize(("batch", "tokens"), [(1, 9), (2, 7), (2, 1)])
def test_forward_equals_eager(shared, logits, batch, tokens, float64, close):
    (model, result), tokens = shared, ids(batch, tokens)
    with torch.no_grad():
        out, eager = logits(result, tokens), logits(model, tokens)
        assert close(out, eager, logits(float64(model), tokens))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_equal_eager(shared, logits, training, float64, close):
    (model, result), tokens, gradients = shared, ids(2, 12), []
    for candidate in (result.train(training), model, float64(model)):
        candidate.zero_grad()
        logits(candidate, tokens).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in candidate.named_parameters() if p.grad is not None})
    result.eval()
    out, eager, exact = gradients
    assert set(out) == set(eager)
    for name, gradient in out.items():
        assert gradient.dtype == model.get_parameter(name).dtype
        assert close(gradient, eager[name], exact[name]), name


def test_gradients_of_what_is_not_frozen(dense_model, compiled, logits, float64, close):
    """A frozen first layer is a unit of its own, and so is the next, whose input then has no gradient."""
    model = dense_model
    for frozen in (model.model.embed_tokens, model.model.layers[0]):
        frozen.requires_grad_(False)
    tokens, gradients = ids(2, 12), []
    for candidate in (compiled(model), model, float64(model)):
        candidate.zero_grad()
        logits(candidate, tokens).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in candidate.named_parameters() if p.grad is not None})
    out, eager, exact = gradients
    assert set(out) == set(eager)
    assert all(close(gradient, eager[name], exact[name]) for name, gradient in out.items())


def test_whether_sequences_are_packed_is_asked_of_positions_given(
    make_their_model, compiled, logits, monkeypatch, float64, close
):
    """Asking waits for the GPU."""
    from transformers import masking_utils

    asked, find = [], masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda x: asked.append(x) or find(x))
    model, tokens = make_their_model(**DENSE), ids(1, 8)
    result = compiled(model)
    with torch.no_grad():
        for candidate, positions, expected in (
            (result, None, False), (model, None, True), (result, torch.arange(8), True),
            (result, torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]), True),
        ):  # fmt: skip
            asked.clear()
            kwargs = {} if positions is None else {"position_ids": positions[None]}
            out = logits(candidate, tokens, use_cache=False, **kwargs)
            assert bool(asked) == expected
            exact = logits(float64(model), tokens, use_cache=False, **kwargs)
            assert close(out, logits(model, tokens, use_cache=False, **kwargs), exact)


def test_a_causal_mask_written_out_is_no_mask(make_their_model, compiled, logits, units, float64, close):
    """Of the caller's, bool [B, 1, T, T]; another one, one of another size, or changed since, is a mask."""
    model, tokens = make_their_model(**DENSE), ids(2, 8)
    result, exact = compiled(model), float64(model)
    causal = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    window = causal.triu(-3)

    def masked(mask):  # so far
        with torch.no_grad():
            out = logits(result, tokens, attention_mask=mask, use_cache=False)
            assert close(out, *(logits(m, tokens, attention_mask=mask, use_cache=False) for m in (model, exact)))
        return any("masked" in unit.name for unit in units(result).values())

    assert [masked(mask) for mask in (causal, causal.clone(), window)] == [False, False, True]
    causal &= window
    masked(causal)  # right, which without a mask it would not be
    with pytest.raises(RuntimeError), torch.no_grad():
        logits(result, tokens, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool).tril(), use_cache=False)


def test_who_is_asked_whether_a_mask_is_causal():
    """Each tensor once, and none after one that is not: to ask is to wait for the GPU."""
    causal, known = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril(), families._WrittenOut()
    assert known(causal, 2, 8)
    known.asks = False
    assert known(causal, 2, 8)
    assert not known(causal.clone(), 2, 8)
    once = families._WrittenOut()
    assert not once(causal.triu(-3), 2, 8)
    assert not once(causal, 2, 8)
    others = (
        causal[:0],
        causal.float(),
        causal.expand(2, 4, 8, 8),
        causal.expand(2, 1, 8, 8)[:1, 0],
        causal.to("meta"),
    )
    assert not any(families._WrittenOut()(mask, 2, 8) for mask in others)
    assert not families._WrittenOut()(causal, 3, 8)


def test_within_a_caller_s_torch_compile(dense_model, compiled, logits, float64, close):
    """Around the model: it breaks the graph at the units, whether their calls are new or seen."""
    model, result, tokens = dense_model, compiled(dense_model), ids(1, 9)
    outer = torch.compile(lambda x: logits(result, x), backend="eager")
    with torch.no_grad():
        eager, exact = logits(model, tokens), logits(float64(model), tokens)
        for call in (outer, outer, lambda x: logits(result, x), outer):
            assert close(call(tokens), eager, exact)


def test_layers_that_are_not_compiled_and_other_attention(make_their_model, compiled, logits, float64, close):
    """Both get the mask that transformers makes."""
    tokens, model = ids(1, 8), make_their_model(**DENSE)
    result = compiled(model)
    result.model.layers[1] = model.model.layers[1]
    eager = make_their_model(**DENSE)
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected, exact = logits(model, tokens, use_cache=False), logits(float64(model), tokens, use_cache=False)
        for candidate in (result, compiled(eager)):
            assert close(logits(candidate, tokens, use_cache=False), expected, exact)


def test_a_hook_that_copies_the_mask(make_their_model, compiled, logits, float64, close):
    model, tokens = make_their_model(**DENSE), ids(1, 8)
    result = compiled(model)
    for layer in result.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()},
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        out = logits(result, tokens, use_cache=False)
        assert close(out, logits(model, tokens, use_cache=False), logits(float64(model), tokens, use_cache=False))


def test_forwards_of_the_user_s_stay(make_their_model, compiled):
    model = make_their_model(num_hidden_layers=1)
    theirs = model.model.embed_tokens.forward = lambda input_ids: torch.zeros(*input_ids.shape, 256)
    model.model.forward = lambda *args, **kwargs: None
    result = compiled(model)
    assert result.model.embed_tokens.forward is theirs
    assert result.model.forward is model.model.forward


def test_the_embedding_s_gradient_is_ours(shared, logits, monkeypatch):
    asked, apply = [], embedding._Embedding.apply
    monkeypatch.setattr(embedding._Embedding, "apply", lambda *args: asked.append(args) or apply(*args))
    logits(shared[1], ids(2, 8))
    assert len(asked) == 1


def test_left_padding_equals_eager(shared, logits, float64, close):
    (model, result), tokens, mask = shared, ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        out, eager = (logits(m, tokens, attention_mask=mask)[mask.bool()] for m in (result, model))
        exact = logits(float64(model), tokens, attention_mask=mask)[mask.bool()]
    assert close(out, eager, exact)


def test_cache_is_updated_in_place(our_shared, float64, close):
    (model, result), tokens, outs = our_shared, ids(2, 9), []
    for candidate in (result, model):
        cache = LatentCache(model.config, 2, 16)
        with torch.no_grad():
            steps = [candidate(chunk, cache=cache) for chunk in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:])]
        assert cache.length == 9
        outs.append(torch.cat(steps, dim=1))
    with torch.no_grad():
        assert close(outs[0], outs[1], float64(model)(tokens))


def test_mtp_layer_is_compiled(make_model, compiled, units, float64, close):
    config = make_model().config
    model = DeepseekV3(config, mtp=True).eval()
    if not model.mtp:
        pytest.skip("the preset has no MTP layer")
    result, tokens = compiled(model), ids(1, 8)
    with torch.no_grad():
        _, out = result(tokens, return_mtp=True)
        _, eager = model(tokens, return_mtp=True)
        _, exact = float64(model)(tokens, return_mtp=True)
        with pytest.raises(Dsv3cError, match="return_routing: expected gradients"):
            result(tokens, return_routing=True)
    assert close(out, eager, exact)
    assert {unit.kind.name for unit in units(result).values()} == {
        "rotary", "dense_layer", "moe_layer", "mtp_layer", "final_norm", "head",
    }  # fmt: skip


def test_another_head_runs_eagerly(make_model, compiled, units, float64, close):
    model = make_model(num_hidden_layers=1)
    model.lm_head = torch.nn.Identity()
    result, tokens = compiled(model), ids(1, 6)
    with torch.no_grad():
        assert close(result(tokens), model(tokens), float64(model)(tokens))
    assert {unit.kind.name for unit in units(result).values()} == {"rotary", "dense_layer", "final_norm"}


def test_greedy_tokens_equal_eager(our_shared):
    (model, result), prompt = our_shared, ids(2, 5)
    assert torch.equal(generate(result, prompt, max_new_tokens=6), generate(model, prompt, max_new_tokens=6))


def test_transformers_generate_works_on_the_result(their_shared):
    (model, result), prompt = their_shared, ids(2, 5)
    mask = torch.ones_like(prompt)
    arguments = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": mask,
        "eos_token_id": None,
    }
    assert torch.equal(result.generate(prompt, **arguments), model.generate(prompt, **arguments))


def test_other_caches_run_transformers_own_layers(make_their_model, compiled, units):
    model, prompt = make_their_model(), ids(1, 5)
    result = compiled(model)
    arguments = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    arguments |= {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(result.generate(prompt, **arguments), model.generate(prompt, **arguments))
    assert {unit.kind.name for unit in units(result).values()} == {"rotary", "final_norm", "head"}


def test_the_callers_tensors_keep_no_marks(make_their_model, compiled, logits):
    """What else is compiled for them, plain torch.compile above all, would be bound by ours."""
    transformers = pytest.importorskip("transformers")
    result, cache = compiled(make_their_model(**DENSE)), transformers.DynamicCache()
    with torch.no_grad():
        logits(result, ids(1, 5), past_key_values=cache)
        given = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        logits(result, ids(1, 3), past_key_values=cache)
    assert given
    assert not any(vars(tensor) for tensor in given)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [({"precision": "int4"}, "'int4'"), ({"target": "h8000"}, "'h8000'")],
)
def test_unknown_names_are_refused(make_model, arguments, found):
    with pytest.raises(CompileError) as error:
        compile(make_model(), **arguments)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_pass_suggests_the_nearest(make_model, compiled):
    with pytest.raises(PassError, match="QuantizeLinear"):
        compiled(make_model(), "fp8", skip=["QuantiseLinear"])


def test_graphs_are_dumped_where_they_can_be_written(make_model, compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("DSV3C_DUMP", str(tmp_path / "new" / "folder"))
    model = make_model(num_hidden_layers=1)
    with torch.no_grad():
        compiled(model)(ids(1, 4))
    assert list((tmp_path / "new" / "folder").glob("dense_layer*/L0/*RaiseAttention.after.txt"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSV3C_DUMP", str(tmp_path / "file" / "folder"))
    with pytest.raises(Dsv3cError, match=r"^DSV3C_DUMP: expected a folder to write to, found .*file/folder: \w+"):
        compiled(model)


@dataclass(frozen=True)
class SaysItDid:
    """Reports a site and rewrites none."""

    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm):
        return 1


def test_an_error_of_a_pass_arrives_as_it_is(make_model, compiled):
    with pytest.raises(PassError, match="SaysItDid"):
        compiled(make_model(num_hidden_layers=1), passes=[SaysItDid()])(ids(1, 4))


def test_unknown_models_are_refused():
    with pytest.raises(CompileError, match=r"torch\.nn\.modules\.linear\.Linear"):
        compile(torch.nn.Linear(2, 2))


def test_experts_that_break_the_graph_are_refused(make_their_model):
    model = make_their_model()
    model.set_experts_implementation("eager")
    with pytest.raises(CompileError, match="grouped_mm"):
        compile(model)


def test_an_eager_model_has_no_compilation(make_model):
    with pytest.raises(CompileError, match=r"dsv3c\.compile"):
        compilation_of(make_model())
