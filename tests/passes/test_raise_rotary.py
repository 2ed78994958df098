"""RaiseRotary on both families' way to write a rotation of queries, and on what it must leave alone."""

import pytest
import torch

from dsv3c.kernels.reference.rotary import rotate
from dsv3c.layers import rotate as our_rotate
from dsv3c.numerics import rounded_between, unit_roundoff
from dsv3c.passes import RaiseRotary, raise_rotary
from dsv3c.passes.contract import run, text

B, T, H, NOPE, PAIRS = 2, 5, 3, 16, 4


def captured(function, *inputs):
    """The graph that Dynamo hands to a backend before and after the pass, what the pass returned, the result."""
    graphs = []

    def backend(gm, example_inputs):
        before, sites = text(gm), [run(gm, [RaiseRotary()])[0].sites for _ in range(2)]
        graphs.append((before, text(gm), sites))
        return gm.forward

    torch._dynamo.reset()
    out = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return *graphs[0], out


def ours(q, cos, sin, rotate=our_rotate):
    nope, rope = q.view(B, T, H, -1).split((NOPE, 2 * PAIRS), dim=-1)
    return torch.cat((nope, rotate(rope, cos[:, :, None], sin[:, :, None])), dim=-1).transpose(1, 2)


def theirs(q, cos, sin, rotate=None, last=-1):
    """As transformers 5 does: heads first, cos and sin twice, products in q's dtype."""
    nope, rope = torch.split(q.view(B, T, H, -1).transpose(1, 2), [NOPE, 2 * PAIRS], dim=last)
    cos, sin = (x[..., : x.shape[-1] // 2].unsqueeze(1) for x in (cos, sin))
    even, odd = rope[..., 0::2], rope[..., 1::2]
    rotated = torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat((nope, rotated), dim=last)


def operands(dtype=torch.bfloat16, pairs=PAIRS, batch=B):
    angle = torch.rand(batch, T, pairs) * 6
    return torch.randn(B, T, H * (NOPE + 2 * PAIRS), dtype=dtype), angle.cos(), angle.sin()


def transformers_operands():
    q, cos, sin = operands(batch=1)
    return q, *(torch.cat((x, x), -1).bfloat16() for x in (cos, sin))


@pytest.mark.parametrize(("function", "inputs"), [(ours, operands()), (theirs, transformers_operands())])
def test_both_ways_of_writing_it(function, inputs):
    before, after, sites, out = captured(function, *inputs)
    assert sites == [1, 0]
    assert "rotate_heads" not in before
    for name in ("cat(", "mul(", "split("):
        assert name in before
        assert name not in after
    assert is_within(out, *inputs)


def is_within(out, *inputs) -> bool:
    """Whether it is the rotation, rounded to BF16 once."""
    q, cos, sin = (x.double() for x in inputs)
    q, cos, sin = q.view(B, T, H, -1), cos[:, :, None, :PAIRS], sin[:, :, None, :PAIRS]
    exact = rotate(q[..., NOPE:], cos, sin).transpose(1, 2)
    size = q[..., NOPE:].abs().amax(-1, keepdim=True).transpose(1, 2) * 2
    low, high = rounded_between(exact, 3 * unit_roundoff(torch.float32) * size)
    rotated = bool(((low <= out[..., NOPE:]) & (out[..., NOPE:] <= high)).all())
    return rotated and torch.equal(out[..., :NOPE], q[..., :NOPE].transpose(1, 2).bfloat16())


@pytest.mark.parametrize("mutant", [lambda x, cos, sin: (x, cos, sin.neg()), lambda x, cos, sin: (x, sin, cos),
                                    lambda x, cos, sin: (x, cos.roll(1, 0), sin.roll(1, 0))])  # fmt: skip
def test_a_mutant_breaks_the_bound(mutant, monkeypatch):
    """Rotated back, by the wrong angle, by the angle of the token before."""
    inputs, insert = operands(), raise_rotary.insert_captured

    def wrong(at, target, *args):
        if target is not torch.ops.dsv3c.rotate_heads.default:
            return insert(at, target, *args)
        return insert(at, lambda *x: target(*mutant(*x), False), *args[:3])

    monkeypatch.setattr(raise_rotary, "insert_captured", wrong)
    assert not is_within(captured(ours, *inputs)[-1], *inputs)


def test_the_gradient_is_rotated_back():
    inputs = operands()
    q = inputs[0].requires_grad_()
    *_, out = captured(ours, *inputs)
    dout = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, q, dout)
    (expected,) = torch.autograd.grad(ours(*(x.double() for x in inputs)), q, dout.double())
    # float32 products of numbers up to `size`, rounded once to BF16
    size = dout.double().abs().amax() * 2
    assert bool(((found - expected).abs() <= 2 * unit_roundoff(torch.bfloat16) * size).all())


def halves(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def other_sign(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos + odd * sin, odd * cos - even * sin), dim=-1).to(x.dtype)


def other_angle(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * sin + even * cos), dim=-1).to(x.dtype)


def twice(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    first = torch.sub(even * cos, odd * sin, alpha=2)
    return torch.cat((first, odd * cos + even * sin), dim=-1).to(x.dtype)


def wider(x, cos, sin):
    return our_rotate(x.float(), cos, sin)


@pytest.mark.parametrize(
    "rotation", [halves, other_sign, other_angle, twice, wider, lambda x, cos, sin: x * cos[..., :1]]
)
def test_leaves_other_rotations_alone(rotation):
    inputs = operands()
    before, after, sites, out = captured(lambda *inputs: ours(*inputs, rotate=rotation), *inputs)
    assert (sites, after) == ([0, 0], before)
    assert torch.equal(out, ours(*inputs, rotate=rotation))


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (ours, operands(torch.float32)),
        (lambda q, cos, sin: torch.cat((q[..., :4], our_rotate(q[..., 4:], cos, sin)), -1),
         (torch.randn(B, T, 12).bfloat16(), *operands()[1:])),
        (lambda q, cos, sin: ours(q[:, :1].repeat(1, T, 1), cos, sin)[:, :, ::2], operands(torch.float64)),
    ],
)  # fmt: skip
def test_leaves_other_queries_alone(function, inputs):
    before, after, sites, _ = captured(function, *inputs)
    assert (sites, after) == ([0, 0], before)


def test_leaves_a_single_token_alone():
    q, cos, sin = (x[:, :1] for x in operands())

    def one(q, cos, sin):
        nope, rope = q.view(B, 1, H, -1).split((NOPE, 2 * PAIRS), dim=-1)
        return torch.cat((nope, our_rotate(rope, cos[:, :, None], sin[:, :, None])), dim=-1)

    assert captured(one, q.contiguous(), cos, sin)[2] == [0, 0]
