"""FuseSwiGLUBackward and WeighActivations: bit for bit the programs that they are to make, and only of their own."""

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import dsv3c.operators  # noqa: F401
from dsv3c.numerics import Recipe, distance, quantized_gemm_rms
from dsv3c.passes import FuseQuantize, FuseSwiGLUBackward, WeighActivations
from dsv3c.passes.contract import run, text

ops = torch.ops.dsv3c
FORWARD, GRADIENT = (Recipe().amax_floor, False), (Recipe().gradient_amax_floor, False)
FLOORS = (Recipe().amax_floor, Recipe().gradient_amax_floor, False)
T, K, E, H, INTER = 30, 4, 5, 256, 128
TWO_PRODUCTS = 2 * quantized_gemm_rms() * 2**0.5  # of casts that differ


def joint(function, *inputs):
    """Traced with its gradients; what is computed from the inputs named d… is backward's."""
    gm = make_fx(function, tracing_mode="fake", decomposition_table=select_decomp_table())(*inputs)
    gm.graph.eliminate_dead_code()
    backward = set()
    for node in gm.graph.nodes:
        if (node.op == "placeholder" and node.name.startswith("d")) or backward & set(node.all_input_nodes):
            backward.add(node)
            node.meta["partitioner_tag"] = "is_backward"
    return gm


def same(found, expected):
    return all(torch.equal(f.float(), e.float()) for f, e in zip(found, expected, strict=True))


def swiglu(h, activation=F.silu):
    gate, up = h.chunk(2, dim=-1)
    return activation(gate) * up


def swiglu_before(h, da, offs, activation=F.silu, *, read_again=False):
    h = h.detach().requires_grad_()
    shaped = h.view(*da.shape[:-1], -1)
    a = swiglu(shaped, activation)
    with torch.no_grad():
        a_pair = ops.quantize_tile(a.flatten(0, -2), *FORWARD)
    (dh,) = torch.autograd.grad(a, shaped, da)
    dh = dh.flatten(0, -2)
    a_again = ops.requantize_t(*a_pair, offs, *FORWARD)
    casts_of_dh = *ops.quantize_tile_t(dh, offs, *GRADIENT), *ops.quantize_tile(dh, *GRADIENT)
    return *a_pair, *a_again, *casts_of_dh, *([dh.sum()] if read_again else [])


def swiglu_after(h, da, offs):
    a_fp8, a_scale_inv, *h_pair = ops.swiglu_quantize_save(h, None, *FORWARD)
    da = da.view(-1, da.shape[-1])
    dh, dh_scale_inv, dht, dht_scale_inv, at, at_scale_inv, _ = ops.swiglu_quantize_backward(
        *h_pair, da, None, offs, *FLOORS
    )
    return a_fp8, a_scale_inv, at, at_scale_inv, dht, dht_scale_inv, dh, dh_scale_inv


@pytest.fixture
def offs():
    return torch.tensor([40, 40, 41, 100, T * K], dtype=torch.int32)


@pytest.mark.parametrize("shape", [(T * K, INTER), (2, 60, INTER)])
def test_swiglu_becomes_the_expected_program(shape, offs):
    """Stacked gate and up, of experts and of linears."""
    h, da = torch.randn(T * K, 2 * INTER, dtype=torch.bfloat16), torch.randn(*shape, dtype=torch.bfloat16)
    gm = joint(lambda h, da, offs: swiglu_before(h, da, offs), h, da, offs)
    passes = [FuseQuantize(), FuseSwiGLUBackward()]
    assert [record.sites for record in run(gm, passes)] == [1, 1]
    assert "aten" not in text(gm).replace("aten.view", "").replace("aten.alias", "")
    assert same(gm(h, da, offs), swiglu_after(h, da, offs))
    assert sum(record.sites for record in run(gm, passes)) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda h, da, offs: swiglu_before(h, da, offs, F.gelu),
        lambda h, da, offs: swiglu_before(h, da * h[..., :INTER], offs)[:4],  # its gradient is not cast
        lambda h, da, offs: swiglu_before(h, da, offs, read_again=True),
    ],
)
def test_leaves_other_gradients_alone(function, offs):
    h, da = torch.randn(T * K, 2 * INTER, dtype=torch.bfloat16), torch.randn(T * K, INTER, dtype=torch.bfloat16)
    gm = joint(function, h, da, offs)
    assert [record.sites for record in run(gm, [FuseQuantize(), FuseSwiGLUBackward()])][1] == 0


def experts_before(h, weights, idx, w, dout, *, read_again=False):
    _, offs, _, inverse = ops.sort_by_expert(idx, E)
    *a_pair, h_fp8, h_scale_inv = ops.swiglu_quantize_save(h, None, *FORWARD)
    w_pair = ops.quantize_block(w, *FORWARD)
    y = ops.grouped_gemm(*a_pair, *w_pair, offs, torch.bfloat16)
    out = ops.unpermute(y, inverse, weights, None, None)
    dy, dweights = ops.unpermute_backward(dout, y, inverse, weights)
    dy_pair, dyt_pair = ops.quantize_tile(dy, *GRADIENT), ops.quantize_tile_t(dy, offs, *GRADIENT)
    da = ops.grouped_gemm_dgrad(*dy_pair, *w_pair, offs, torch.bfloat16)
    dh, dh_scale_inv, dht, dht_scale_inv, *at_pair, _ = ops.swiglu_quantize_backward(
        h_fp8, h_scale_inv, da, None, offs, *FLOORS
    )
    dw = ops.grouped_gemm_wgrad(*dyt_pair, *at_pair, offs, torch.bfloat16)
    return out, dweights, dw, dh, dh_scale_inv, dht, dht_scale_inv, *([y] if read_again else [])


def experts_after(h, weights, idx, w, dout):
    _, offs, permutation, inverse = ops.sort_by_expert(idx, E)
    weight_R = weights.flatten()[permutation]
    *a_pair, h_fp8, h_scale_inv = ops.swiglu_quantize_save(h, weight_R, *FORWARD)
    w_pair = ops.quantize_block(w, *FORWARD)
    y = ops.grouped_gemm(*a_pair, *w_pair, offs, torch.bfloat16)
    out = ops.unpermute(y, inverse, None, None, None)
    dy_pair = ops.permute(*ops.quantize_tile(dout, *GRADIENT), permutation, inverse)
    da = ops.grouped_gemm_dgrad(*dy_pair, *w_pair, offs, torch.bfloat16)
    dh, dh_scale_inv, dht, dht_scale_inv, *at_pair, dweight_R = ops.swiglu_quantize_backward(
        h_fp8, h_scale_inv, da, weight_R, offs, *FLOORS
    )
    dw = ops.grouped_gemm_wgrad(*ops.requantize_t(*dy_pair, offs, *GRADIENT), *at_pair, offs, torch.bfloat16)
    return out, dweight_R[inverse], dw, dh, dh_scale_inv, dht, dht_scale_inv


@pytest.fixture
def experts():
    idx = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int()
    h, dout = torch.randn(T * K, 2 * INTER).bfloat16(), torch.randn(T, H).bfloat16()
    return h, torch.rand(T, K), idx, torch.randn(E, H, INTER).bfloat16() / 16, dout


def test_weights_move_before_the_last_product(experts):
    gm = joint(lambda h, weights, idx, w, dout: experts_before(h, weights, idx, w, dout), *experts)
    (record,) = run(gm, [WeighActivations()])
    assert record.sites == 1
    assert "unpermute_backward" not in text(gm)
    assert same(gm(*experts), experts_after(*experts))
    assert run(gm, [WeighActivations()])[0].sites == 0


def test_weighed_before_or_behind_the_numbers_are_the_same_but_for_roundings(experts):
    """Two products follow on each other."""
    assert largest_distance(experts_after(*experts), experts) <= TWO_PRODUCTS


@pytest.mark.parametrize(
    "wrong", [("swiglu_quantize_save", 1), ("unpermute", 1), ("permute", 2), ("swiglu_quantize_backward", 3)]
)
def test_a_mutant_breaks_the_bound(wrong, experts, mutant):
    """Weights and rows of the token before."""
    gm = joint(lambda h, weights, idx, w, dout: experts_before(h, weights, idx, w, dout), *experts)
    assert [record.sites for record in run(gm, [WeighActivations(), mutant(*wrong)])] == [1, 1]
    assert largest_distance(gm(*experts), experts) > TWO_PRODUCTS


def largest_distance(found, experts) -> float:
    """From `experts_before`, of the output, and the gradients of weights, w and h."""
    expected = experts_before(*experts)
    pairs = [*zip(found[:3], expected[:3], strict=True)]
    pairs.append(tuple(fp8.float() * s.repeat_interleave(128, 1) for *_, fp8, s in (found[:5], expected[:5])))
    return max(distance(result, reference)[0] for result, reference in pairs)


def test_leaves_products_with_other_readers_alone(experts):
    gm = joint(lambda *inputs: experts_before(*inputs, read_again=True), *experts)
    assert run(gm, [WeighActivations()])[0].sites == 0
