"""Rotary embedding, the latent's norm and the keys, fused: against the model's own functions and float64."""

import pytest
import torch

import dsv3c.operators  # noqa: F401
from dsv3c import layers, numerics
from dsv3c.kernels.reference import rotary as reference
from dsv3c.numerics import Recipe, rounded_between
from dsv3c.operators import OperatorError

ops = torch.ops.dsv3c
FLOOR, EPS = Recipe().amax_floor, 2.0**-20
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROWS = [1, 5, 70]


def angles(rows, pairs, device) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(rows, pairs, device=device) * 100
    return angle.cos(), angle.sin()


def rotated_between(x, cos, sin, inverse) -> tuple[torch.Tensor, torch.Tensor]:
    """Two products and a sum in float32: a rounding each of numbers no larger than |x0| + |x1|."""
    x = x.double()
    first, second = x.abs().chunk(2, -1) if inverse else (x[..., 0::2].abs(), x[..., 1::2].abs())
    size = torch.stack((first + second,) * 2, -1).flatten(-2) if inverse else torch.cat((first + second,) * 2, -1)
    value = reference.rotate(x, cos.double(), sin.double(), inverse)
    return rounded_between(value, 3 * numerics.unit_roundoff(torch.float32) * size)


def between(found, bounds) -> bool:
    return bool(((bounds[0] <= found) & (found <= bounds[1])).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("heads", "nope", "pairs"), [(128, 128, 32), (3, 16, 4), (70, 0, 8)])
def test_rotate_heads(check, rows, heads, nope, pairs, device):
    x = check.varied(rows, heads * (nope + 2 * pairs), torch.bfloat16, device).view(rows, heads, -1)
    cos, sin = angles(rows, pairs, device)
    for inverse in (False, True):
        found = x.clone()
        ops.rotate_heads_(found, cos, sin, inverse)
        assert torch.equal(found[..., :nope], x[..., :nope])
        bounds = rotated_between(x[..., nope:], cos[:, None], sin[:, None], inverse)
        assert between(found[..., nope:], bounds)
        wide = torch.cat((x, x), 1)
        ops.rotate_heads_(wide[:, heads:], cos, sin, inverse)  # strided, in place: what lies beside stays
        assert torch.equal(wide, torch.cat((x, found), 1))


def test_rotation_is_the_model_s():
    """Forward dsv3c.layers', bit for bit; and the inverse undoes it."""
    x, (cos, sin) = torch.randn(7, 64).bfloat16(), angles(7, 32, "cpu")
    assert torch.equal(reference.rotate(x, cos, sin).bfloat16(), layers.rotate(x, cos, sin))
    x, cos, sin = x.double(), *angles(7, 32, "cpu")
    angle = torch.rand(7, 32, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    back = reference.rotate(reference.rotate(x, cos, sin), cos, sin, inverse=True)
    assert numerics.distance(back, x)[1] <= numerics.reordered_bound(1, 4, torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [*ROWS, 5001])  # more than programs have at a time
@pytest.mark.parametrize(("width", "pairs"), [(512, 32), (128, 8), (384, 16)])
def test_latent(check, rows, width, pairs, device):
    x = check.varied(rows, width + 2 * pairs + 6, torch.bfloat16, device)[:, : width + 2 * pairs]
    weight = check.varied(1, width, torch.bfloat16, device)[0]
    cos, sin = angles(rows, pairs, device)
    latent, *pair, rstd = ops.latent_quantize(x, weight, cos, sin, EPS, FLOOR, False)
    assert between(latent[:, width:], rotated_between(x[:, width:], cos, sin, False))
    expected = (x[:, :width].double().square().mean(-1) + EPS).rsqrt()
    assert bool(((rstd - expected).abs() <= numerics.rstd_bound() * expected).all())
    normed = x[:, :width].double() * expected[:, None]
    error = (numerics.rstd_bound() + numerics.unit_roundoff(torch.float32)) * normed.abs()
    ends = [(end.double() * weight.double()).float().bfloat16() for end in rounded_between(normed, error)]
    assert between(latent[:, :width], (torch.minimum(*ends), torch.maximum(*ends)))
    again = ops.quantize_tile(latent[:, :width], FLOOR, False)
    assert torch.equal(pair[0].view(torch.uint8), again[0].view(torch.uint8))
    assert torch.equal(pair[1], again[1])
    assert pair[1].stride() == again[1].stride()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "width", "pairs", "size"), [(1, 512, 32, 64), (70, 128, 8, 4)])
def test_append(check, rows, width, pairs, size, device):
    """The bits of `latent_quantize`, returned and behind each sequence's last token; all else in the pages stays."""
    x = check.varied(rows, width + 2 * pairs + 6, torch.bfloat16, device)[:, : width + 2 * pairs]
    weight, (cos, sin) = check.varied(1, width, torch.bfloat16, device)[0], angles(rows, pairs, device)
    pages = torch.randn(3 * rows + 1, size, width + 2 * pairs, device=device).bfloat16()
    table = torch.randperm(3 * rows, device=device).int().view(rows, 3) + 1
    lengths = torch.randint(0, 3 * size, (rows,), device=device, dtype=torch.int32)
    before = pages.clone()
    latent = ops.latent_append_(pages, x, weight, cos, sin, EPS, table, lengths)
    assert torch.equal(latent, ops.latent_quantize(x, weight, cos, sin, EPS, FLOOR, False)[0])
    for row, length in enumerate(lengths.tolist()):
        before[table[row, length // size], length % size] = latent[row]
    assert torch.equal(pages, before)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    x = torch.empty(0, 4, 24, dtype=torch.bfloat16, device=device)
    cos = torch.empty(0, 4, device=device)
    ops.rotate_heads_(x, cos, cos, False)
    assert x.shape == (0, 4, 24)


@pytest.mark.gpu
def test_in_a_cuda_graph(check):
    x = check.varied(64, 4 * 24, torch.bfloat16, "cuda").view(64, 4, 24)
    cos, sin = angles(64, 4, "cuda")
    once = x.clone()
    ops.rotate_heads_(once, cos, sin, False)
    captured = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.rotate_heads_(captured, cos, sin, False)
    graph.replay()
    assert torch.equal(captured, once)


def test_what_is_refused():
    x, cos = torch.zeros(4, 2, 24, dtype=torch.bfloat16), torch.zeros(4, 3)
    with pytest.raises(OperatorError, match="columns of cos: expected a power of two, found 3"):
        ops.rotate_heads_(x, cos, cos, False)
    cos = torch.zeros(4, 4)
    with pytest.raises(OperatorError, match="strides of x"):
        ops.rotate_heads_(x.transpose(1, 2), cos, cos, False)
    with pytest.raises(OperatorError, match="columns of x"):
        ops.latent_quantize(x.flatten(1)[:, :40], torch.zeros(0, dtype=torch.bfloat16), cos, cos, EPS, FLOOR, False)
    x, weight, pages = torch.zeros(4, 136).bfloat16(), torch.zeros(128).bfloat16(), torch.zeros(9, 2, 136).bfloat16()
    table, lengths = torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    for message, wrong in {
        "columns of pages": (pages[..., :100], table, lengths),
        "dtype of pages": (pages.float(), table, lengths),
        "strides of pages": (pages.mT.contiguous().mT, table, lengths),
        "rows of table": (pages, table[:3], lengths),
        "shape of lengths": (pages, table, lengths[:3]),
        "dtypes of table and lengths": (pages, table, lengths.long()),
    }.items():
        with pytest.raises(OperatorError, match=message):
            ops.latent_append_(wrong[0], x, weight, cos, cos, EPS, *wrong[1:])
