"""CastHeads and RotateInPlace: the same bits from fewer readings, and only where nothing else reads."""

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import dsv3c.attention  # noqa: F401
from dsv3c.numerics import Recipe
from dsv3c.passes import CastHeads, RotateInPlace
from dsv3c.passes.contract import run, text

ops = torch.ops.dsv3c
CAST = (Recipe().gradient_amax_floor, False)
B, T, H, NOPE, ROPE, V = 2, 70, 2, 64, 64, 128


def rewritten(step, function, *inputs):
    gm = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    gm.graph.eliminate_dead_code()
    before = text(gm)
    sites = [run(gm, [step])[0].sites for _ in range(2)]
    return sites, before, gm


def both_casts(x, offs=None):
    x = x.reshape(B * T, -1)
    return *ops.quantize_tile(x, *CAST), *ops.quantize_tile_t(x, offs, *CAST)


def same(found, expected) -> bool:
    return all(torch.equal(f.float(), e.float()) for f, e in zip(found, expected, strict=True))


@pytest.fixture
def heads():
    q, k, v = (torch.randn(B, T, H, size).bfloat16().transpose(1, 2) for size in (NOPE + ROPE, NOPE + ROPE, V))
    angle = torch.rand(B * T, ROPE // 2)
    return q, k, v, angle.cos(), angle.sin()


def gradients(q, k, v):
    out, lse = ops.attention(q, k, v, None, 0.1, True)
    return ops.attention_backward(out, q, k, v, out, lse, None, 0.1, True)


def queries(q, k, v, cos, sin):
    dq = gradients(q, k, v)[0].transpose(1, 2).flatten(0, 1)
    return ops.rotate_heads(dq, cos, sin, True)


def keys_and_values(q, k, v, cos, sin, nope=NOPE):
    _, dk, dv = gradients(q, k, v)
    dk, dv = dk.transpose(1, 2), dv.transpose(1, 2)
    return torch.cat((dk[..., :nope], dv), -1)


@pytest.mark.parametrize(
    ("source", "fused"), [(queries, "rotate_quantize_both"), (keys_and_values, "join_quantize_both")]
)
def test_the_same_bits(source, fused, heads):
    def program(*heads):
        return both_casts(source(*heads))

    sites, before, gm = rewritten(CastHeads(), program, *heads)
    assert sites == [1, 0]
    assert fused not in before
    assert text(gm).count(f"{fused}.default") == 1
    for name in ("quantize_tile", "aten.cat", "dsv3c.rotate_heads"):
        assert name not in text(gm)
    assert same(gm(*heads), program(*heads))

    def one_operator(*heads):
        return ops.quantize_tile_both(source(*heads).reshape(B * T, -1), None, *CAST)

    sites, _, gm = rewritten(CastHeads(), one_operator, *heads)
    assert sites == [1, 0]
    assert same(gm(*heads), program(*heads))


def test_values_first_would_be_another_tensor(heads):
    """The mutant: the halves of a head exchanged."""

    def program(*heads):
        _, dk, dv = (x.transpose(1, 2) for x in gradients(*heads[:3]))
        return both_casts(torch.cat((dv, dk[..., :NOPE]), -1))

    sites, _, gm = rewritten(CastHeads(), program, *heads)
    assert sites == [0, 0]
    assert not same(gm(*heads), both_casts(keys_and_values(*heads)))


@pytest.mark.parametrize(
    "program",
    [
        lambda *h: (*both_casts(x := queries(*h)), x.sum()),  # read in BF16 too
        lambda *h: ops.quantize_tile(queries(*h).flatten(1), *CAST),  # no weight gradient
        lambda *h: both_casts(ops.rotate_heads(h[0].transpose(1, 2).flatten(0, 1), *h[3:], False)),  # forward's
        lambda *h: both_casts(queries(*h), torch.tensor([30, B * T], dtype=torch.int32)),
        lambda *h: both_casts(keys_and_values(*h, nope=48)),  # half a tile is 64 features
        lambda *h: both_casts(
            torch.cat((h[1].transpose(1, 2)[..., :NOPE], h[2].transpose(1, 2)), -1)
        ),  # not attention's
        lambda *h: both_casts(torch.cat((gradients(*h[:3])[1][..., :NOPE], gradients(*h[:3])[2]), -1)),  # heads first
        lambda *h: both_casts(torch.cat([x.transpose(1, 2) for x in gradients(*h[:3])[:2]], 1)),
    ],
)
def test_casts_that_stay(program, heads):
    sites, before, gm = rewritten(CastHeads(), program, *heads)
    assert "quantize_tile" in before
    assert (sites, text(gm)) == ([0, 0], before)


def test_casts_of_two_recipes_stay(heads):
    def program(*heads):
        x = queries(*heads).flatten(1)
        return *ops.quantize_tile(x, *CAST), *ops.quantize_tile_t(x, None, CAST[0], True)

    assert rewritten(CastHeads(), program, *heads)[0] == [0, 0]


def test_rotation_in_place(heads):
    q, _, _, cos, sin = heads

    def program(q, cos, sin):
        x = q.transpose(1, 2).flatten(0, 1) * 2
        return ops.rotate_heads(x, cos, sin, False), ops.rotate_heads(x, cos, sin, True)

    sites, _, gm = rewritten(RotateInPlace(), program, q, cos, sin)
    assert sites == [2, 0]
    assert "dsv3c.rotate_heads.default" not in text(gm)
    assert same(gm(q, cos, sin), program(q, cos, sin))  # x is read twice, so it must not change

    def strided(x, cos, sin):
        return ops.rotate_heads(x.transpose(1, 2).flatten(0, 1)[:, ::2], cos, sin, False)

    sites, before, gm = rewritten(RotateInPlace(), strided, q, cos, sin)
    assert (sites, text(gm)) == ([0, 0], before)
