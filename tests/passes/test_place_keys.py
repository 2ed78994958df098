"""PlaceKeys: the same bits, and what attention reads are views of one product."""

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import dsv3c.attention  # noqa: F401
from dsv3c.numerics import Recipe
from dsv3c.passes import PlaceKeys
from dsv3c.passes.contract import run, text

ops = torch.ops.dsv3c
FLOOR = Recipe().amax_floor
FIRST = {ops.attention.default: 1, ops.attention_backward.default: 2}  # where keys and values are
B, T, H, K, NOPE, ROPE, V = 2, 5, 3, 256, 128, 64, 128


@pytest.fixture
def operands():
    q = torch.randn(B, T, H, NOPE + ROPE).bfloat16().transpose(1, 2)
    x = ops.quantize_tile(torch.randn(B * T, K), FLOOR, False)
    w = ops.quantize_block(torch.randn(H * (NOPE + V), K), FLOOR, False)
    return q, *x, *w, torch.randn(B, T, 40 + ROPE).bfloat16()


def ours(q, *operands, nope=NOPE, dtype=torch.bfloat16, shared=lambda rope: rope.expand(-1, -1, H, -1)):
    *pairs, latent = operands
    kv = ops.gemm(*pairs, dtype).view(B, T, H, -1)
    own, values = kv.split((nope, kv.shape[-1] - nope), -1)
    rope = latent[..., 40:].to(dtype).unsqueeze(2)
    keys = torch.cat((own, shared(rope)), -1).transpose(1, 2)
    return q, keys, values.transpose(1, 2)


def theirs(q, *operands):
    """As JoinKeys leaves transformers' keys."""
    *pairs, latent = operands
    own, values = ops.gemm(*pairs, torch.bfloat16).view(B, T, -1).view(B, T, H, -1).split((NOPE, V), -1)
    own = own.transpose(1, 2)
    rope = latent[..., 40:].reshape(B, 1, T, ROPE).expand(-1, H, -1, -1)
    keys = torch.cat((own.transpose(1, 2), rope.transpose(1, 2)), -1)
    return q, keys.transpose(1, 2), values.transpose(1, 2)


def attention(*qkv):
    return ops.attention(*qkv, None, 0.1, True)


def step(*qkv):
    out, lse = attention(*qkv)
    return out, *ops.attention_backward(out, *qkv, out, lse, None, 0.1, True)


def rewritten(program, *inputs):
    gm = make_fx(program, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    gm.graph.eliminate_dead_code()
    before = text(gm)
    return [run(gm, [PlaceKeys()])[0].sites for _ in range(2)], before, gm


@pytest.mark.parametrize("model", [ours, theirs])
@pytest.mark.parametrize("call", [attention, step])
def test_the_same_bits(model, call, operands):
    def program(*operands):
        return call(*model(*operands))

    sites, before, gm = rewritten(program, *operands)
    assert sites == [1, 0]
    assert "aten.cat" in before
    assert "aten.cat" not in text(gm)
    assert "dsv3c.gemm.default" not in text(gm)
    assert all(torch.equal(f, e) for f, e in zip(gm(*operands), program(*operands), strict=True))
    for node in gm.graph.nodes:
        if node.target in FIRST:
            held_to, _ = node.meta["eager_input_vals"]  # Inductor copies what has other strides
            keys, values = held_to[FIRST[node.target] :][:2]
            assert keys.stride() == values.stride() == (T * H * 320, 320, H * 320, 1)
            assert (keys.storage_offset(), values.storage_offset()) == (0, NOPE + ROPE)


@pytest.mark.parametrize(
    "program",
    [
        lambda *o: (*attention(*(qkv := ours(*o))), qkv[1].sum()),  # keys are read elsewhere
        lambda *o: (*attention(*(qkv := ours(*o))), qkv[2].sum()),  # values are
        lambda *o: attention(*ours(*o, nope=64)),  # other halves
        lambda *o: attention(*ours(*o, shared=lambda rope: torch.cat((rope, rope, -rope), 2))),  # a head's own
        lambda *o: attention(*ours(*o, shared=lambda rope: rope[..., :4].expand(-1, -1, H, -1))),  # not 16 bytes
        lambda *o: attention(*(x.float() for x in ours(*o)[:1]), *ours(*o, dtype=torch.float32)[1:]),
        lambda q, *o: attention(q, *(x.transpose(1, 2) for x in ours(q.transpose(1, 2), *o)[1:])),  # heads are tokens
        lambda *o: attention(ours(*o)[0], ours(*o)[1], ours(*o)[2].flip(3)),
        lambda q, x, *o: attention(*ours(q, x, *o)[:2], ours(q, x.flip(0), *o)[2]),  # values of another product
    ],
)
def test_leaves_alone(program, operands):
    sites, before, gm = rewritten(program, *operands)
    assert "aten.cat" in before
    assert (sites, text(gm)) == ([0, 0], before)
