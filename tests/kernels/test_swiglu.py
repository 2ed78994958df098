"""SwiGLU fused with the casts around it: against float64 within the bounds of float32, bit for bit behind those."""

from itertools import product

import pytest
import torch

import dsv3c.operators  # noqa: F401
from dsv3c import numerics
from dsv3c.kernels.reference import swiglu as reference
from dsv3c.kernels.reference.casts import dequantize_tile, quantize_tile_ref
from dsv3c.numerics import Recipe, rounded_between
from dsv3c.operators import OperatorError

ops = torch.ops.dsv3c
FLOOR, GRADIENT_FLOOR = Recipe().amax_floor, Recipe().gradient_amax_floor
pytestmark = pytest.mark.usefixtures("poisoned")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [None, [5, 0, 128, 129], [0, 0, 640, 0], [300, 1, 1000, 77, 0, 513]]


def same_bits(found, expected) -> bool:
    return torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def inputs(check, rows, width, device, weighted):
    h = check.varied(rows, 2 * width, torch.bfloat16, device)
    h[:, ::11] = -0.0
    h[rows // 2] = 0
    weight = torch.rand(rows, device=device) * 2.5 if weighted else None
    return h, weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1, 128), (37, 256), (300, 384)])
def test_forward(check, shape, weighted, device):
    h, weight = inputs(check, *shape, device, weighted)
    for pow2 in (False, True):
        pair = ops.swiglu_quantize(h, weight, FLOOR, pow2)
        gate = h.double().chunk(2, -1)[0]
        a = reference.swiglu(h.double(), weight)
        check.assert_tiles_between(pair, *rounded_between(a, numerics.swiglu_bound(gate, a)), FLOOR, pow2)
        assert pair[1].stride() == (1, len(h))
        *again, h_fp8, h_scale_inv = ops.swiglu_quantize_save(h, weight, FLOOR, pow2)
        expected = ops.quantize_tile(h, FLOOR, pow2)
        assert same_bits(again[0], pair[0])
        assert same_bits(again[1], pair[1])
        assert same_bits(h_fp8, expected[0])
        assert same_bits(h_scale_inv, expected[1])
    assert same_bits(ops.swiglu_quantize(torch.cat((h, h), 1)[:, : h.shape[1]], weight, FLOOR, True)[0], pair[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", [0, 1])
def test_every_quotient(first, device):
    """All BF16 significands, at every distance of exponents that E4M3 sees, divided by the scale of all others: bit for
    bit, although the kernels do not divide. Each tile gives up one column, for its amax."""
    significand = 1 + torch.arange(128, device=device) / 128
    amax, shift, x = torch.meshgrid(significand, torch.arange(1.0, 22.0, device=device), significand, indexing="ij")
    h = (x * torch.exp2(-shift)).flatten(0, 1)
    h[:, first] = amax.flatten(0, 1)[:, first]
    h = torch.cat((h, -h), 1).bfloat16()
    for pow2 in (False, True):
        *_, found, scale_inv = ops.swiglu_quantize_save(h, None, FLOOR, pow2)
        expected = quantize_tile_ref(h, FLOOR, pow2)
        assert same_bits(found, expected[0])
        assert same_bits(scale_inv, expected[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_backward(check, sizes, weighted, device):
    rows, width = 300 if sizes is None else sum(sizes) + 9, 256  # 9 rows of no group
    h, weight = inputs(check, rows, width, device, weighted)
    da = check.varied(rows, width, torch.bfloat16, device) * 2.0**-20
    offs = None if sizes is None else check.ends(sizes, device)
    grouped = rows if sizes is None else sum(sizes)
    for pow2 in (False, True):
        h_fp8, h_scale_inv = ops.quantize_tile(h, FLOOR, pow2)
        arguments = h_fp8, h_scale_inv, da, weight, offs, FLOOR, GRADIENT_FLOOR, pow2
        dh_fp8, dh_scale_inv, dht_fp8, dht_scale_inv, at_fp8, at_scale_inv, dweight = (
            ops.swiglu_quantize_backward(*arguments)
        )  # fmt: skip
        x = dequantize_tile(h_fp8, h_scale_inv).double()
        gate, up = x.chunk(2, -1)
        a = reference.swiglu(x, weight)
        dh, expected = reference.swiglu_gradients(x, da, weight)
        factor = da.double() * up * (1 if weight is None else weight[:, None].double())
        error = torch.cat(numerics.swiglu_gradient_bound(gate, dh.chunk(2, -1)[1], factor), -1)
        bounds, bounds_a = rounded_between(dh, error), rounded_between(a, numerics.swiglu_bound(gate, a))

        rowwise = dh_fp8[:grouped], dh_scale_inv[:grouped]
        check.assert_tiles_between(rowwise, *(x[:grouped] for x in bounds), GRADIENT_FLOOR, pow2)
        across = [check.transposed(x, sizes) for x in (*bounds, *bounds_a)]
        check.assert_tiles_between((dht_fp8, dht_scale_inv), *across[:2], GRADIENT_FLOOR, pow2)
        check.assert_tiles_between((at_fp8, at_scale_inv), *across[2:], FLOOR, pow2)
        if weighted:
            terms = da.double() * a / weight[:, None]
            depth = 128 + width // 128 + 3
            bound = numerics.sum_bound(terms * (1 + numerics.sigmoid_bound(gate) * 2**24), depth)
            assert bool(((dweight - expected).abs()[:grouped] <= bound[:grouped]).all())
            assert not dweight[grouped:].any()
        else:
            assert dweight.numel() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_makes_its_tiles_nan(bad, device):
    """In the definition an infinite scale_inv and finite values; in the kernels all NaN. Both are NaN dequantised."""
    h = torch.ones(3, 512, dtype=torch.bfloat16, device=device)
    h[1, 300] = bad
    a = dequantize_tile(*ops.swiglu_quantize(h, None, FLOOR, False))
    assert bool(a[1, :128].isnan().all())
    assert int(a.isnan().sum()) == 128
    saved = dequantize_tile(*ops.swiglu_quantize_save(h, None, FLOOR, False)[2:])
    assert int(saved.isnan().sum()) == 128


def test_definition_is_autograd_s():
    """Of silu(gate)·up·weight, in float64."""
    h, da = torch.randn(7, 512, dtype=torch.float64, requires_grad=True), torch.randn(7, 256, dtype=torch.float64)
    weight = torch.rand(7, dtype=torch.float64, requires_grad=True)
    gate, up = h.chunk(2, -1)
    a = torch.nn.functional.silu(gate) * up * weight[:, None]
    expected = torch.autograd.grad(a, (h, weight), da)
    found = reference.swiglu_gradients(h.detach(), da, weight.detach())
    for f, e in zip(found, expected, strict=True):
        assert numerics.distance(f, e)[1] <= numerics.reordered_bound(1, 256, torch.float64)
    assert torch.equal(reference.swiglu(h, weight), a)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_gradient_makes_its_tiles_nan(bad, device):
    """Those of its row and those of its column; not the activation's."""
    saved = ops.quantize_tile(torch.ones(130, 512, dtype=torch.bfloat16, device=device), FLOOR, False)
    da = torch.ones(130, 256, dtype=torch.bfloat16, device=device)
    da[1, 130] = bad
    *pairs, dweight = ops.swiglu_quantize_backward(*saved, da, None, None, FLOOR, GRADIENT_FLOOR, False)
    dh, dht, at = (dequantize_tile(*pairs[i : i + 2]) for i in (0, 2, 4))
    assert int(dh.isnan().sum()) == 256
    assert bool(dh[1].view(2, 256)[:, 128:].isnan().all())
    assert int(dht.isnan().sum()) == 256
    assert bool(dht.view(2, 256, -1)[:, 130, :128].isnan().all())
    assert not at.isnan().any()
    assert dweight.numel() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_the_next_group_stay_out(device):
    """Even NaN: a tile is copied whole, and what is not its group's becomes zeros."""
    h = torch.ones(130, 512, dtype=torch.bfloat16, device=device)
    h[5:] = torch.nan
    da, offs = torch.ones(130, 256, dtype=torch.bfloat16, device=device), torch.tensor([5, 130], device=device).int()
    da[5:] = -torch.inf
    saved = ops.quantize_tile(h, FLOOR, False)
    results = ops.swiglu_quantize_backward(*saved, da, None, offs, FLOOR, GRADIENT_FLOOR, False)
    for pair in (results[2:4], results[4:6]):
        x = dequantize_tile(*pair)
        assert bool((x[:, :5] > 0).all())
        assert not pair[0].view(torch.uint8)[:, 5:128].any()
        assert bool(x[:, 128:253].isnan().all())


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_where_it_lies(check, device):
    """In wider rows, and off the copy engine's 16 bytes."""
    h, weight = inputs(check, 150, 256, device, True)
    saved = ops.quantize_tile(h, FLOOR, False)
    da = check.varied(150, 256, torch.bfloat16, device)
    off = torch.cat((da.new_zeros(1), da.flatten()))[1:].view(150, 256)
    results = [
        ops.swiglu_quantize_backward(*saved, x, weight, None, FLOOR, GRADIENT_FLOOR, False)
        for x in (da, torch.cat((da, da), 1)[:, 256:], off)
    ]
    for other in results[1:]:
        assert all(map(same_bits, other, results[0]))


@pytest.mark.gpu
def test_every_configuration(check, monkeypatch):
    """The size of a program changes the speed, never a bit; nor does how many tiles each takes."""
    kernels = pytest.importorskip("dsv3c.kernels.swiglu", reason="needs Triton")
    backward = pytest.importorskip("dsv3c.kernels.swiglu_backward", reason="needs Triton")
    h, weight = inputs(check, 300, 768, "cuda", True)
    da, offs = check.varied(300, 768, torch.bfloat16, "cuda"), check.ends([100, 0, 199], "cuda")
    results = []
    for rows, warps, band, programs in (
        (16, 4, backward.BAND, 132),
        (32, 8, backward.BAND, 2),
        (16, 4, 1, 7),
        (8, 1, 4, 5),
    ):
        monkeypatch.setattr(kernels, "ROWS", rows)
        monkeypatch.setattr(kernels, "WARPS", warps)
        monkeypatch.setattr(backward, "BAND", band)
        monkeypatch.setattr(backward, "multiprocessors", lambda programs=programs: programs)
        *a, h_fp8, h_scale_inv = ops.swiglu_quantize_save(h, weight, FLOOR, False)
        dh, dh_scale_inv, *rest = ops.swiglu_quantize_backward(
            h_fp8, h_scale_inv, da, weight, offs, FLOOR, GRADIENT_FLOOR, False
        )
        results.append((*a, h_fp8, h_scale_inv, dh[:299], dh_scale_inv[:299], *rest))
    for other in results[1:]:
        assert all(map(same_bits, other, results[0]))


@pytest.mark.gpu
def test_drawn_or_dealt_out(check, monkeypatch):
    """Without groups, few tiles are dealt out and many are drawn; the bits are the same."""
    backward = pytest.importorskip("dsv3c.kernels.swiglu_backward", reason="needs Triton")
    h, weight = inputs(check, 700, 768, "cuda", True)
    da = check.varied(700, 768, torch.bfloat16, "cuda")
    arguments = (*ops.quantize_tile(h, FLOOR, False), da, weight, None, FLOOR, GRADIENT_FLOOR, False)
    expected = ops.swiglu_quantize_backward(*arguments)
    for drawn, programs in product((0, 1000), (1, 3, 132)):
        monkeypatch.setattr(backward, "DRAWN", drawn)
        monkeypatch.setattr(backward, "multiprocessors", lambda programs=programs: programs)
        found = tuple(map(torch.empty_like, expected))
        backward.swiglu_quantize_backward(*arguments, found)
        assert all(map(same_bits, found, expected))


def test_results_are_stored_where_columns_are_read():
    """Two words at a time, each where `ldmatrix` looks for it."""
    layouts = pytest.importorskip("dsv3c.kernels.columns", reason="needs Triton")
    place = pytest.importorskip("dsv3c.kernels.swiglu_ptx", reason="needs Triton").place.fn
    bases = layouts.shared_layout.fn(64, 32).offset_bases
    for offset in range(128 * 64):
        row = column = 0
        for i, (r, c) in enumerate(bases):
            if offset >> i & 1:
                row, column = row ^ r, column ^ c
        assert place(row, column // 2) + column % 2 * 4 == offset * 4


@pytest.mark.gpu
def test_in_a_cuda_graph(check):
    """No host synchronisation: groups that change after the capture are the ones that count."""
    h, weight = inputs(check, 256, 256, "cuda", True)
    da = check.varied(256, 256, torch.bfloat16, "cuda")
    saved = ops.swiglu_quantize_save(h, weight, FLOOR, False)[2:]
    offs = check.ends([100, 28], "cuda")
    run = lambda: ops.swiglu_quantize_backward(*saved, da, weight, offs, FLOOR, GRADIENT_FLOOR, False)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    offs.copy_(check.ends([3, 253], "cuda"))
    graph.replay()
    for found, expected in zip(captured, run(), strict=True):
        assert same_bits(found, expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_values(check):
    """Offsets need 64 bits. The last rows equal those of a small call."""
    rows = (2**31 // 4096) + 200
    h = torch.empty(rows, 4096, dtype=torch.bfloat16, device="cuda").fill_(0.5)
    h[-64:] = check.varied(64, 4096, torch.bfloat16, "cuda")
    found, scale_inv = ops.swiglu_quantize(h, None, FLOOR, False)
    expected = ops.swiglu_quantize(h[-64:], None, FLOOR, False)
    assert same_bits(found[-64:], expected[0])
    assert same_bits(scale_inv[-64:], expected[1])


def test_what_is_refused():
    h = torch.zeros(4, 256, dtype=torch.bfloat16)
    with pytest.raises(OperatorError, match="columns of h: expected a multiple of 256, found 384"):
        ops.swiglu_quantize(torch.zeros(4, 384, dtype=torch.bfloat16), None, FLOOR, False)
    with pytest.raises(OperatorError, match="dtype of h"):
        ops.swiglu_quantize(h.float(), None, FLOOR, False)
    with pytest.raises(OperatorError, match="shape of weight"):
        ops.swiglu_quantize(h, torch.zeros(5), FLOOR, False)
    saved = ops.quantize_tile(h, FLOOR, False)
    with pytest.raises(OperatorError, match="shape of da"):
        ops.swiglu_quantize_backward(*saved, h, None, None, FLOOR, GRADIENT_FLOOR, False)
