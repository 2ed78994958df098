"""FuseLatent: the same bits from one operator, in training its 1/rms too, and only where it may."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import dsv3c.operators  # noqa: F401
from dsv3c.layers import rotate
from dsv3c.numerics import Recipe
from dsv3c.passes import FuseLatent, FuseNormBackward
from dsv3c.passes.contract import run, text
from dsv3c.passes.rewrite import insert

CAST = (Recipe().amax_floor, False)
B, T, Q, K, ROPE = 3, 5, 8, 256, 16


def norm(x, weight):
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def latent(product, weight, cos, sin, turn=rotate, q=Q, cast=lambda x: torch.ops.dsv3c.quantize_tile(x, *CAST)):
    """As attention makes it of the merged product of q_a and kv_a, with what comes of it."""
    _, kv = product.view(-1, T, product.shape[1]).split([q, product.shape[1] - q], dim=-1)
    compressed, rope = kv.split([len(weight), kv.shape[-1] - len(weight)], dim=-1)
    joined = torch.cat((norm(compressed, weight), turn(rope, cos, sin)), dim=-1)
    first, second = joined.split([len(weight), joined.shape[-1] - len(weight)], dim=-1)
    return joined, second.float(), *cast(first.reshape(-1, len(weight)))


@pytest.fixture(params=[B, 1], ids=["angles of each sequence", "angles for all"])
def inputs(request):
    angle = torch.rand(request.param, T, ROPE // 2) * 9
    product = torch.randn(B * T, Q + K + ROPE, dtype=torch.bfloat16) * torch.logspace(-3, 1, B * T)[:, None].bfloat16()
    return product, torch.rand(K, dtype=torch.bfloat16), angle.cos(), angle.sin()


def traced(program, inputs):
    table = select_decomp_table()
    gm = make_fx(lambda *tensors: program(*tensors), decomposition_table=table, tracing_mode="fake")(*inputs)
    gm.graph.eliminate_dead_code()
    return gm


def same(found, expected):
    return [torch.equal(f.float(), e.float()) for f, e in zip(found, expected, strict=True)]


def test_the_bits_of_norm_rotation_and_cast(inputs):
    gm = traced(latent, inputs)
    assert [record.sites for record in (*run(gm, [FuseLatent()]), *run(gm, [FuseLatent()]))] == [1, 0]
    assert "quantize_tile" not in text(gm)
    assert not any(word in text(gm) for word in ("rsqrt", "aten.cat", "aten.sub"))
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.dsv3c.latent_quantize.default)
    assert call.args[0].target is torch.ops.aten.slice.Tensor  # of the product, in place
    assert call.args[0].args[0].op == "placeholder" or call.args[0].args[0].target is torch.ops.aten.view.default
    assert all(same(gm(*inputs), latent(*inputs)))


def appended(product, weight, cos, sin, pages, table, lengths, between=lambda x: x, half=1):
    """As a decode step makes it, which `Pages.append` puts into the cache."""
    _, kv = product.view(-1, 1, product.shape[1]).split([Q, product.shape[1] - Q], dim=-1)
    compressed, rope = kv.split([len(weight), kv.shape[-1] - len(weight)], dim=-1)
    joined = torch.cat((norm(compressed, weight), rotate(rope, cos, sin)), dim=-1)
    position_B1 = lengths[:, None].long()
    page_B1 = table.gather(1, position_B1 // (pages.shape[1] // half)).long()
    return joined, pages.index_put((page_B1, between(position_B1) % pages.shape[1]), joined)


@pytest.fixture(params=[B, 1])
def step_inputs(request):
    count = request.param
    angle, pages = torch.rand(count, 1, ROPE // 2) * 9, torch.randn(4 * count, 64, K + ROPE).bfloat16()
    table = torch.randperm(4 * count).int().view(count, 4)
    lengths = torch.tensor([70, 0, 200][:count], dtype=torch.int32)
    product = torch.randn(count, Q + K + ROPE, dtype=torch.bfloat16)
    return product, torch.rand(K, dtype=torch.bfloat16), angle.cos(), angle.sin(), pages, table, lengths


def run_graph(gm, inputs):
    """On copies: that `auto_functionalized` writes to one is up to Inductor."""
    return gm(*(x.clone() for x in inputs))


def test_a_new_token_goes_into_the_pages(step_inputs):
    gm = traced(appended, step_inputs)
    assert [record.sites for record in (*run(gm, [FuseLatent()]), *run(gm, [FuseLatent()]))] == [1, 0]
    assert not any(word in text(gm) for word in ("rsqrt", "aten.cat", "aten.sub", "index_put"))
    expected = appended(*step_inputs)
    assert all(same(run_graph(gm, step_inputs), expected))
    for operand, right in (("x", [False, False]), ("cos", [False, False]), ("lengths", [True, False])):
        (call,) = gm.graph.find_nodes(op="call_function", target=auto_functionalized)
        given = call.kwargs[operand]
        call.kwargs = call.kwargs | {operand: insert(call, torch.ops.aten.add.Tensor, given, 1)}
        gm.recompile()
        assert same(run_graph(gm, step_inputs), expected) == right
        call.kwargs = call.kwargs | {operand: given}


def test_leaves_other_writes_alone(step_inputs):
    product, weight, cos, sin, pages, *where = step_inputs
    several = torch.cat((pages, pages), -1)[..., : K + ROPE]  # with gaps
    to_all = product[:1], weight, cos[:1], sin[:1], torch.randn(12, 64, K + ROPE).bfloat16()
    for program, given in (
        (appended, (*to_all, torch.arange(12).int().view(3, 4), torch.tensor([3, 70, 9]).int())),
        (lambda *inputs: appended(*inputs, between=lambda position: position + 1), step_inputs),
        (lambda *inputs: appended(*inputs, half=2), step_inputs),
        (appended, (product, weight, cos, sin, several, *where)),
        (lambda *inputs: appended(*inputs[:4], inputs[4] + 1, *inputs[5:]), step_inputs),
        (appended, (*step_inputs[:5], where[0].long(), where[1])),
    ):
        assert run(traced(program, given), [FuseLatent()])[0].sites == 0


@pytest.mark.parametrize(("argument", "right"), [(0, []), (1, [1]), (2, [2, 3]), (3, [2, 3])])
def test_a_mutant_has_other_bits(inputs, mutant, argument, right):
    """x, weight, cos, sin of a neighbour."""
    gm = traced(latent, inputs)
    run(gm, [FuseLatent(), mutant("latent_quantize", argument)])
    assert [index for index, equal in enumerate(same(gm(*inputs), latent(*inputs))) if equal] == right


class Projected(nn.Module):
    """A linear and what is made of it; no gradient comes through the cast."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, Q + K + ROPE, bias=False, dtype=torch.bfloat16)
        self.weight = nn.Parameter(torch.rand(K, dtype=torch.bfloat16) + 0.5)
        angle = torch.rand(T, ROPE // 2) * 9
        self.register_buffer("cos", angle.cos()[None])
        self.register_buffer("sin", angle.sin()[None])

    def forward(self, x):
        joined, _, x_fp8, scale_inv = latent(self.linear(x.flatten(0, 1)), self.weight, self.cos, self.sin)
        return joined * (x_fp8.bfloat16().mean() + scale_inv.bfloat16().sum())


def test_in_training(rewritten, step):
    module, x, found = Projected(), torch.randn(B, T, 64, dtype=torch.bfloat16), Counter()
    expected = step(rewritten(module, [FuseNormBackward()]), x)
    results = step(rewritten(module, [FuseNormBackward(), FuseLatent()], found), x)
    assert found == Counter(rms_norm_backward=1, latent_quantize=1)
    assert all(same(results, expected))


def halves(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def with_itself(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, even * cos + odd * sin), dim=-1).to(x.dtype)


ALONE = {
    "pairs that are halves": lambda *inputs: latent(*inputs, turn=halves),
    "another rotation": lambda *inputs: latent(*inputs, turn=with_itself),
    "angles in BF16": lambda x, w, cos, sin: latent(x, w, cos.bfloat16(), sin.bfloat16()),
    "pairs of no power of two": lambda x, w, cos, sin: latent(x[:, :-4], w, cos[..., 2:], sin[..., 2:]),
    "no multiple of 128": lambda x, w, cos, sin: latent(x, w[:72], cos, sin, q=Q + K - 72),
    "no cast": lambda *inputs: latent(*inputs, cast=lambda x: ()),
    "a gap": lambda *inputs: latent(*inputs, turn=lambda r, c, s: rotate(r[..., 8:], c[..., 4:], s[..., 4:])),
    "another order": lambda x, w, cos, sin: latent(x, w, cos, sin, turn=lambda r, c, s: rotate(r.roll(2, -1), c, s)),
}


@pytest.mark.parametrize("program", ALONE.values(), ids=ALONE)
def test_leaves_alone(program, inputs):
    gm = traced(program, inputs)
    assert run(gm, [FuseLatent()])[0].sites == 0
