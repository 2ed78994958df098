"""Calls like earlier ones go past Dynamo, and only those."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dsv3c import capture
from dsv3c.compiler import compilation_of
from dsv3c.direct import Compiled, Conditions, allowed, signature

pytestmark = pytest.mark.usefixtures("without_codegen")


@pytest.fixture
def through_dynamo(monkeypatch):
    """The calls that went through it."""
    calls, call = [], Compiled.__call__

    def counting(self, *args):
        calls.append(self)
        return call(self, *args)

    monkeypatch.setattr(Compiled, "__call__", counting)
    return calls


@pytest.fixture
def dense(make_model, compiled):
    return compiled(make_model(num_hidden_layers=4, first_k_dense_replace=4, hidden_size=32, intermediate_size=32,
                               num_attention_heads=2, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8,
                               qk_rope_head_dim=8, v_head_dim=8))  # fmt: skip


@pytest.fixture
def layer(dense):
    """layer(x): the first layer of a compiled model, in inference."""
    model = dense
    cos, sin = torch.randn(2, 1, 9, model.config.qk_rope_head_dim // 2).unbind()

    def run(x, cos=cos, sin=sin):
        with torch.no_grad():
            return model.model.layers[0](x, cos[:, : x.shape[1]].clone(), sin[:, : x.shape[1]].clone())

    run.model = model
    return run


def hidden(layer, tokens=9, batch=1):
    return torch.randn(batch, tokens, layer.model.config.hidden_size)


@pytest.mark.parametrize("gradients", [False, True])
def test_the_second_call_of_each_size(model, compiled, logits, through_dynamo, gradients):
    result = compiled(model)

    def results(ids):
        out = logits(result, ids)
        return out, *(torch.autograd.grad(out.sum(), [*model.parameters()], allow_unused=True) if gradients else ())

    with torch.set_grad_enabled(gradients):
        for tokens, expected in ((9, True), (9, False), (7, True), (9, False), (7, False)):
            ids, before = torch.randint(0, 256, (1, tokens)), len(through_dynamo)
            found = results(ids)
            assert (len(through_dynamo) > before) == expected
            seen = [(ways, dict(ways)) for ways in compilation_of(result).units.ways.values()]
            for ways, _ in seen:
                ways.clear()
            for a, b in zip(found, results(ids), strict=True):  # now through Dynamo
                assert a is b is None or torch.equal(a, b)
            for ways, before in seen:
                ways.update(before)


def test_training_and_inference_in_turns(dense, through_dynamo):
    for turn in range(3):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                dense(torch.randint(0, 256, (1, 9)))
        if not turn:
            first = len(through_dynamo)
    assert len(through_dynamo) == first


def test_equal_layers_share_what_was_seen(dense, through_dynamo):
    with torch.no_grad():
        dense(torch.randint(0, 256, (1, 9)))
    assert len(through_dynamo) == 4  # rotary angles, a layer, final norm, head


def test_parameters_are_those_of_the_call(layer, through_dynamo):
    x = hidden(layer)
    layer(x)
    o_proj = layer.model.model.layers[0].self_attn.o_proj
    o_proj.weight = nn.Parameter(torch.zeros_like(o_proj.weight))
    layer.model.model.layers[0].mlp.down_proj.weight.data.zero_()
    assert torch.equal(layer(x)[0], x)
    assert len(through_dynamo) == 1


def test_another_signature_or_state_goes_through_dynamo(layer, through_dynamo):
    x, others = hidden(layer), 0

    def again(**kwargs):
        """What differs is asked once."""
        nonlocal others
        others += 1
        for _ in range(3):
            layer(x, **kwargs)
        assert len(through_dynamo) == others

    again()
    wide = torch.randn(1, 9, 2 * layer.model.config.hidden_size)
    x = wide[..., : layer.model.config.hidden_size]  # other strides
    again()
    x = hidden(layer, batch=2)
    again()
    x = hidden(layer).requires_grad_()
    again()
    x = hidden(layer)
    layer.model.model.layers[0].requires_grad_(False)
    again()
    with torch.inference_mode():
        again()


def test_a_changed_global_state_goes_through_dynamo(layer, through_dynamo):
    x = hidden(layer)
    layer(x)
    torch.set_default_dtype(torch.float64)
    try:
        layer(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(through_dynamo) == 2


def test_subclasses_and_what_is_not_passed_on_are_not_remembered():
    class Own(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    held = torch.ones(3)
    for function, x, remembered in (
        (lambda parameters, x: x + parameters["w"], torch.ones(3), True),
        (lambda parameters, x: x + parameters["w"], torch.ones(3).as_subclass(Own), False),
        (lambda parameters, x: x + held, torch.ones(3), False),  # a tensor of the function's own
        (lambda parameters, x: (x + 1, x), torch.ones(3), False),  # an output that the graph does not make
    ):
        _, way = Compiled(function, lambda gm, inputs: gm.forward)({"w": torch.ones(3)}, x)
        assert (way is not None) == remembered


@pytest.mark.parametrize("other", ["subclass", "dtype", "modes", "stance"])
def test_what_looks_like_a_remembered_call(other):
    """The function says what it was called with, as Dynamo traced it."""
    compiled = Compiled(lambda parameters, x: x * 2, lambda gm, inputs: gm.forward)
    x = torch.ones(3)
    _, way = compiled({}, x)
    key = signature([], (x,))
    assert way is not None
    assert allowed()
    if other == "subclass":

        class Own(torch.Tensor):
            __torch_function__ = torch._C._disabled_torch_function_impl

        assert signature([], (x.as_subclass(Own),)) != key
    elif other == "dtype":
        assert signature([], (x.to(torch.float16),)) != key
        assert signature([], (x.int(),)) != key
    elif other == "modes":
        for mode in (torch.device("cpu"), FlopCounterMode(display=False)):
            with mode:
                assert not allowed()
        with torch.device("cpu"):
            assert compiled({}, x)[1] is None
        assert torch.func.vmap(lambda y: y * allowed())(x).sum() == 0
    else:
        with torch.compiler.set_stance("force_eager"):
            assert not allowed()


def test_what_looks_like_remembered_parameters():
    class Own(nn.Parameter):
        pass

    weight, bias = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    conditions = Conditions.now([weight, bias])
    assert conditions.hold([weight, bias])
    assert conditions.hold([nn.Parameter(torch.zeros(3, 3)), bias])
    others = [
        Own(torch.ones(3, 3)),
        nn.Parameter(torch.ones(3, 3).double()),
        nn.Parameter(torch.ones(3, 4)),
        nn.Parameter(torch.ones(3, 3).t()),
        nn.Parameter(torch.ones(3, 3, device="meta")),
        nn.Parameter(torch.ones(3, 3), requires_grad=False),
        torch.ones(3, 3, requires_grad=True),
    ]
    others[3].data = torch.ones(3, 6)[:, ::2]
    for other in others:
        assert not conditions.hold([other, bias])
    weight.data = weight.data.half()  # the same object
    assert not conditions.hold([weight, bias])


def test_one_tensor_in_two_places_is_not_remembered(dense, through_dynamo):
    x, angle = torch.randn(1, 9, dense.config.hidden_size), torch.randn(1, 9, dense.config.qk_rope_head_dim // 2)
    with torch.no_grad():
        for turn in range(3):
            dense.model.layers[0](x, angle, angle)
            assert len(through_dynamo) == turn + 1


def test_signatures_are_forgotten(layer, monkeypatch):
    monkeypatch.setattr(capture, "KEPT", 4)
    for tokens in range(2, 10):
        layer(hidden(layer, tokens))
    assert [len(ways) for ways in compilation_of(layer.model).units.ways.values() if ways] == [4]
