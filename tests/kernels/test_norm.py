"""RMSNorm fused with the addition in front and the cast behind: against float64, and bit for bit behind its bounds."""

import pytest
import torch
from torch.nn.functional import rms_norm

import dsv3c.operators  # noqa: F401
from dsv3c import numerics
from dsv3c.kernels.reference import norm as reference
from dsv3c.numerics import Recipe, rounded_between
from dsv3c.operators import OperatorError

ops = torch.ops.dsv3c
FLOOR, EPS = Recipe().amax_floor, 2.0**-20
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(1, 128), (37, 512), (5, 1536), (8500, 256), (1100, 1152), (600, 2048), (701, 7168), (37, 2176), (3, 10240)]


def normed_between(x, weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The least and the largest y, rounded where the definition rounds, and rstd in float64."""
    x, weight = x.double(), weight.double()
    rstd = (x.square().mean(-1) + EPS).rsqrt()
    normed = x * rstd[:, None]
    error = (numerics.rstd_bound() + numerics.unit_roundoff(torch.float32)) * normed.abs()
    ends = [(end.double() * weight).float().bfloat16() for end in rounded_between(normed, error)]
    return torch.minimum(*ends), torch.maximum(*ends), rstd


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(check, shape, device):
    x, residual = (check.varied(*shape, torch.bfloat16, device) for _ in range(2))
    x[:, ::7] = -0.0
    weight = check.varied(1, shape[1], torch.bfloat16, device)[0]
    for pow2 in (False, True):
        y_fp8, y_scale_inv, rstd = ops.rms_norm_quantize(x, weight, EPS, FLOOR, pow2)
        low, high, expected = normed_between(x, weight)
        check.assert_tiles_between((y_fp8, y_scale_inv), low, high, FLOOR, pow2)
        assert bool(((rstd - expected).abs() <= numerics.rstd_bound() * expected).all())

        total, y, y_fp8, y_scale_inv, rstd = ops.add_rms_norm_quantize(x, residual, weight, EPS, FLOOR, pow2, True)
        assert torch.equal(total, x + residual)
        low, high, expected = normed_between(total, weight)
        assert bool(((low <= y) & (y <= high)).all())
        pair = ops.quantize_tile(y, FLOOR, pow2)
        assert torch.equal(y_fp8.view(torch.uint8), pair[0].view(torch.uint8))
        assert torch.equal(y_scale_inv, pair[1])
        assert y_scale_inv.stride() == (1, len(x))
        assert bool(((rstd - expected).abs() <= numerics.rstd_bound() * expected).all())
        without = ops.add_rms_norm_quantize(x, residual, weight, EPS, FLOOR, pow2, False)
        assert without[1].shape == (0, shape[1])
        for found, same in zip(without, (total, y[:0], y_fp8, y_scale_inv, rstd), strict=True):
            assert torch.equal(found.float(), same.float())
    strided = torch.cat((x, residual), 1)[:, : shape[1]]
    first, again = (ops.rms_norm_quantize(v, weight, EPS, FLOOR, False)[0] for v in (x, strided))
    assert torch.equal(first.view(torch.uint8), again.view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 16384)])
def test_backward(check, shape, added, device):
    x, dy, dsum = (check.varied(*shape, torch.bfloat16, device) for _ in range(3))
    weight = check.varied(1, shape[1], torch.bfloat16, device)[0]
    *_, rstd = ops.rms_norm_quantize(x, weight, EPS, FLOOR, False)
    dsum = dsum if added else None
    found, dweight = ops.rms_norm_backward(dy, x, weight, rstd, dsum)
    normed, dnormed = x.double() * rstd[:, None].double(), dy.double() * weight.double()
    exact = rstd[:, None].double() * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    dx = exact if dsum is None else exact + dsum.double()
    error = numerics.norm_gradient_bound(dnormed, normed, rstd.double(), dx.abs() + exact.abs())
    low, high = rounded_between(dx, error)
    assert bool(((low <= found) & (found <= high)).all())
    terms = dy.double() * normed
    assert bool(((dweight - terms.sum(0)).abs() <= numerics.sum_bound(terms, shape[0] + 3, 0)).all())
    wide = torch.cat((x, dy, x[:, :3]), 1)  # rows that begin anywhere
    x, dy = wide[:, : shape[1]], wide[:, shape[1] : 2 * shape[1]]
    again = ops.rms_norm_backward(dy, x, weight, rstd, dsum)
    assert torch.equal(found, again[0])
    assert torch.equal(dweight, again[1])


def test_definition_is_torch_s(check):
    """Forward: dsv3c.layers', bit for bit. Backward: autograd's, in float64."""
    x, weight = check.varied(9, 256, torch.bfloat16), check.varied(1, 256, torch.bfloat16)[0]
    assert torch.equal(reference.rms_norm(x, weight, EPS)[0], weight * rms_norm(x, (256,), eps=EPS))
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    dy, dsum = torch.randn(9, 256, dtype=torch.float64), torch.randn(9, 256, dtype=torch.float64)
    expected = torch.autograd.grad(weight * rms_norm(x, (256,), eps=EPS), (x, weight), dy)
    rstd = reference.rms_norm(x, weight, EPS)[1]
    dx, dweight = reference.rms_norm_backward_ref(dy, x, weight, rstd, dsum)
    for f, e in ((dx - dsum, expected[0]), (dweight, expected[1])):
        assert numerics.distance(f, e)[1] <= numerics.reordered_bound(1, 256, torch.float64)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_row(device):
    x = torch.ones(3, 512, dtype=torch.bfloat16, device=device)
    x[1, 300] = torch.nan
    y_fp8, y_scale_inv, rstd = ops.rms_norm_quantize(x, torch.ones_like(x[0]), EPS, FLOOR, False)
    back = y_fp8.float() * y_scale_inv.repeat_interleave(128, 1)
    assert bool(back[1].isnan().all())
    assert int(back.isnan().sum()) == 512
    assert rstd.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    x = torch.empty(0, 256, dtype=torch.bfloat16, device=device)
    weight = torch.ones(256, dtype=torch.bfloat16, device=device)
    _, _, rstd = ops.rms_norm_quantize(x, weight, EPS, FLOOR, False)
    dx, dweight = ops.rms_norm_backward(x, x, weight, rstd, None)
    assert dx.shape == (0, 256)
    assert not dweight.any()


@pytest.mark.gpu
def test_what_lay_in_shared_memory_before(check):
    """Rows that do not fill their last chunk, after rows of NaN."""
    x, weight = check.varied(37, 2176, torch.bfloat16, "cuda"), check.varied(1, 7168, torch.bfloat16, "cuda")[0]
    first = ops.rms_norm_quantize(x, weight[:2176], EPS, FLOOR, False)
    ops.rms_norm_quantize(torch.full((4096, 7168), torch.nan, dtype=x.dtype, device="cuda"), weight, EPS, FLOOR, False)
    again = ops.rms_norm_quantize(x, weight[:2176], EPS, FLOOR, False)
    assert all(torch.equal(f.float(), a.float()) for f, a in zip(first, again, strict=True))


@pytest.mark.gpu
def test_in_a_cuda_graph(check):
    """Replays with other numbers of the same shapes."""
    x, dy = (check.varied(1000, 7168, torch.bfloat16, "cuda") for _ in range(2))
    weight = check.varied(1, 7168, torch.bfloat16, "cuda")[0]

    def run():
        y_fp8, y_scale_inv, rstd = ops.rms_norm_quantize(x, weight, EPS, FLOOR, False)
        return y_fp8.view(torch.uint8), y_scale_inv, rstd, *ops.rms_norm_backward(dy, x, weight, rstd, dy)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        x.copy_(x.roll(1, 0))
        expected = run()
        graph.replay()
        assert all(map(torch.equal, captured, expected))


def test_what_is_refused():
    x = torch.zeros(4, 192, dtype=torch.bfloat16)
    with pytest.raises(OperatorError, match="columns of x: expected a multiple of 128, found 192"):
        ops.rms_norm_quantize(x, x[0], EPS, FLOOR, False)
    with pytest.raises(OperatorError, match="dtype of x"):
        ops.rms_norm_quantize(x.float(), x[0], EPS, FLOOR, False)
    with pytest.raises(OperatorError, match="shape of weight"):
        ops.rms_norm_quantize(x, x[0, :128], EPS, FLOOR, False)
    x = torch.zeros(1, 16512, dtype=torch.bfloat16)
    with pytest.raises(OperatorError, match="columns of x: expected at most 16384, found 16512"):
        ops.rms_norm_backward(x, x, x[0], torch.zeros(1), None)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [512, 7168])
def test_more_than_two_to_the_31_values(check, columns):
    """The last rows of very many, as a call of those rows alone has them. The kernels of narrow and of wide rows."""
    rows, last = (1 << 31) // columns + 300, 300
    x, dy = (torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    x[-last:], dy[-last:] = (check.varied(last, columns, torch.bfloat16, "cuda") for _ in range(2))
    weight = check.varied(1, columns, torch.bfloat16, "cuda")[0]
    y_fp8, y_scale_inv, rstd = ops.rms_norm_quantize(x, weight, EPS, FLOOR, False)
    expected = ops.rms_norm_quantize(x[-last:], weight, EPS, FLOOR, False)
    for found, same in zip((y_fp8, y_scale_inv, rstd), expected, strict=True):
        assert torch.equal(found[-last:].float(), same.float())
    dx, _ = ops.rms_norm_backward(dy, x, weight, rstd, dy)
    again, _ = ops.rms_norm_backward(dy[-last:], x[-last:], weight, rstd[-last:], dy[-last:])
    assert torch.equal(dx[-last:], again)
