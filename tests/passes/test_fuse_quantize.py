"""FuseQuantize: the norms bit for bit, SwiGLU with one rounding less, and only where it may."""

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import dsv3c.operators  # noqa: F401
from dsv3c.kernels.reference.swiglu import swiglu_quantize_ref
from dsv3c.numerics import Recipe
from dsv3c.passes import FuseQuantize
from dsv3c.passes.contract import run, text

CAST = (Recipe().amax_floor, False)
B, T, K = 2, 5, 256


def quantize(x):
    return torch.ops.dsv3c.quantize_tile(x.reshape(-1, x.shape[-1]), *CAST)


def rms_norm(x, weight, mean=lambda square: square.mean(-1, keepdim=True)):
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(mean(x32.pow(2)) + 1e-6)).to(x.dtype)


def fused(function, *inputs):
    gm = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    (record,) = run(gm, [FuseQuantize()])
    assert run(gm, [FuseQuantize()])[0].sites == 0
    return record.sites, gm


def same(found, expected):
    return all(torch.equal(f.float(), e.float()) for f, e in zip(found, expected, strict=True))


@pytest.fixture
def x():
    return 1e-3 * torch.randn(B, T, K, dtype=torch.bfloat16)  # so small that eps matters


@pytest.fixture
def weight():
    return torch.rand(K, dtype=torch.bfloat16)


def test_a_norm_that_only_linears_read(x, weight):
    def program(x, weight):
        return quantize(rms_norm(x, weight))

    sites, gm = fused(program, x, weight)
    assert sites == 1
    assert "rms_norm_quantize" in text(gm)
    assert "aten" not in text(gm).replace("aten.view", "")
    assert same(gm(x, weight), program(x, weight))


@pytest.mark.parametrize("between", [1, 2])
def test_a_part_of_a_merged_product_is_read_where_it_lies(between, weight):
    """And one of a part, as the latent is; of a part of the tokens a copy is made."""

    def program(product, weight):
        x = product.view(B, -1, product.shape[-1])
        for _ in range(between):
            x = x.split([8, x.shape[-1] - 8], dim=-1)[1]
        return quantize(rms_norm(x, weight))

    def some_tokens(product, weight):
        return program(product.view(B, -1, product.shape[-1])[:, 1:], weight)

    product = torch.randn(B * T, 8 * between + K, dtype=torch.bfloat16)
    sites, gm = fused(program, product, weight)
    assert sites == 1
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.dsv3c.rms_norm_quantize.default)
    assert call.args[0].args[1:] == (1, 8 * between, 8 * between + K)
    assert "aten.clone" not in text(gm)
    assert same(gm(product, weight), program(product, weight))
    sites, gm = fused(some_tokens, product, weight)
    assert sites == 1
    assert "aten.clone" in text(gm)
    assert same(gm(product, weight), some_tokens(product, weight))


def test_a_norm_with_a_residual_and_other_readers(x, weight):
    def program(x, residual, weight):
        total = x + residual
        y = rms_norm(total, weight)
        return *quantize(y), y.float().sum(-1), total

    residual = torch.randn_like(x)
    sites, gm = fused(program, x, residual, weight)
    assert sites == 1
    assert "add_rms_norm_quantize" in text(gm)
    assert same(gm(x, residual, weight), program(x, residual, weight))


def test_a_norm_with_a_residual_that_only_linears_read(x, weight):
    """And the same in training, where the sum is saved and the norm computed again."""

    def program(x, residual, weight):
        total = x + residual
        return *quantize(rms_norm(total, weight)), total

    residual = torch.randn_like(x)
    sites, gm = fused(program, x, residual, weight)
    assert sites == 1
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.dsv3c.add_rms_norm_quantize.default)
    assert call.args[-1] is False
    assert "aten" not in text(gm).replace("aten.view", "")
    assert same(gm(x, residual, weight), program(x, residual, weight))

    gm = make_fx(program, decomposition_table=select_decomp_table(), tracing_mode="fake")(x, residual, weight)
    (rstd,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.rsqrt.default)
    with gm.graph.inserting_before(gm.graph.output_node()):
        again = gm.graph.call_function(torch.ops.aten.neg.default, (rstd,))
    again.meta = {"partitioner_tag": "is_backward", "val": rstd.meta["val"]}
    gm.graph.output_node().args = ((*gm.graph.output_node().args[0], again),)
    (record,) = run(gm, [FuseQuantize()])
    assert record.sites == 1
    assert "add_rms_norm_quantize" not in text(gm)
    assert "rms_norm_quantize" in text(gm)


def test_swiglu_of_stacked_halves():
    def program(h):
        gate, up = h.chunk(2, dim=-1)
        return torch.ops.dsv3c.quantize_tile(F.silu(gate) * up, *CAST)

    h = torch.randn(7, 2 * K, dtype=torch.bfloat16)
    sites, gm = fused(program, h)
    assert sites == 1
    assert same(gm(h), swiglu_quantize_ref(h, None, *CAST))


@pytest.mark.parametrize(
    "program",
    [
        lambda x, w: (*quantize(y := rms_norm(x, w)), y.sum()),  # read in BF16 too, and no residual to add
        lambda x, w: quantize(rms_norm(x[..., :72], w[:72])),  # no multiple of 128
        lambda x, w: quantize(w * x),
        lambda x, w: quantize(F.silu(x) * (x + 1)),
        lambda x, w: quantize(rms_norm(x, w, lambda square: square.sum(-1, keepdim=True))),
        lambda x, w: quantize(rms_norm(x, w, lambda square: square.mean(1, keepdim=True))),
    ],
)
def test_leaves_alone(program, x, weight):
    gm = make_fx(program, decomposition_table=select_decomp_table(), tracing_mode="fake")(x, weight)
    assert "quantize_tile" in text(gm)
    assert run(gm, [FuseQuantize()])[0].sites == 0
