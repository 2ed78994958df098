"""Heads rotated, and gradients of heads cast as they are put together: bit for bit what the single operators give."""

import pytest
import torch

import dsv3c.operators  # noqa: F401
from dsv3c.numerics import Recipe
from dsv3c.operators import OperatorError

ops = torch.ops.dsv3c
FLOOR = Recipe().gradient_amax_floor
pytestmark = pytest.mark.usefixtures("poisoned")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROWS = [1, 128, 333]


def same_bits(found, expected) -> bool:
    """Of all results; strides too, which the products rely on."""
    pairs = list(zip(found, expected, strict=True))
    return all(f.stride() == e.stride() for f, e in pairs) and all(torch.equal(_bytes(f), _bytes(e)) for f, e in pairs)


def _bytes(x) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def some_heads(check, rows, heads, features, device):
    x = check.varied(rows, heads * features, torch.bfloat16, device)
    x[:, ::7] = -0.0
    x[rows // 2] = 0
    return x.view(rows, heads, features)


def angles(rows, pairs, device, dtype=torch.float32):
    angle = torch.rand(rows, pairs, device=device) * 100
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", ROWS)
def test_rotate_heads_is_the_one_in_place(check, rows, device):
    x, (cos, sin) = some_heads(check, rows, 5, 48, device), angles(rows, 8, device)
    for inverse in (False, True):
        expected = x.clone()
        ops.rotate_heads_(expected, cos, sin, inverse)
        before = x.clone()
        assert torch.equal(ops.rotate_heads(x, cos, sin, inverse), expected)
        assert torch.equal(x, before)
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(ops.rotate_heads(strided, cos, sin, inverse), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("heads", "nope"), [(4, 128), (3, 64), (5, 0)])
def test_queries(check, rows, heads, nope, device):
    x = some_heads(check, rows, heads, nope + 64, device)
    for dtype in (torch.float32, torch.bfloat16):
        cos, sin = angles(rows, 32, device, dtype)
        for pow2 in (False, True):
            back = ops.rotate_heads(x, cos, sin, True).flatten(1)
            expected = *ops.quantize_tile(back, FLOOR, pow2), *ops.quantize_tile_t(back, None, FLOOR, pow2)
            assert same_bits(ops.rotate_quantize_both(x, cos, sin, FLOOR, pow2), expected)
    by_head = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert same_bits(ops.rotate_quantize_both(by_head, cos, sin, FLOOR, True), expected)
    wide = torch.cat((x, x), -1)[..., : nope + 64]
    assert same_bits(ops.rotate_quantize_both(wide, cos, sin, FLOOR, True), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("heads", "nope", "rope", "value"), [(4, 128, 64, 128), (3, 64, 16, 128), (5, 64, 0, 64)])
def test_keys_and_values(check, rows, heads, nope, rope, value, device):
    dk = some_heads(check, rows, heads, nope + rope, device)
    dv = some_heads(check, heads, rows, value, device).transpose(0, 1)
    joined = torch.cat((dk[..., :nope], dv), -1).flatten(1)
    for pow2 in (False, True):
        expected = *ops.quantize_tile(joined, FLOOR, pow2), *ops.quantize_tile_t(joined, None, FLOOR, pow2)
        assert same_bits(ops.join_quantize_both(dk, dv, nope, FLOOR, pow2), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_tiles(check, number, device):
    dk, dv = (some_heads(check, 200, 2, 128, device) for _ in range(2))
    dv[130, 1, 5] = number
    q, scale_inv, t, t_scale_inv = ops.join_quantize_both(dk, dv, 128, FLOOR, False)
    assert (~scale_inv.isfinite()).nonzero().tolist() == [[130, 3]]
    assert (~t_scale_inv.isfinite()).nonzero().tolist() == [[384 + 5, 1]]
    assert bool(q[130, 384 + 5].float().isnan())
    assert bool(t[384 + 5, 130].float().isnan())


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    x, cos = torch.empty(0, 4, 192, dtype=torch.bfloat16, device=device), torch.empty(0, 32, device=device)
    assert ops.rotate_heads(x, cos, cos, False).shape == x.shape
    assert ops.rotate_quantize_both(x, cos, cos, FLOOR, False)[0].shape == (0, 768)
    assert ops.join_quantize_both(x, x, 128, FLOOR, False)[2].shape == (4 * 320, 0)


@pytest.mark.gpu
def test_in_a_cuda_graph(check):
    x, (cos, sin) = some_heads(check, 300, 4, 192, "cuda"), angles(300, 32, "cuda")
    dv = some_heads(check, 300, 4, 128, "cuda")

    def call():
        return *ops.rotate_quantize_both(x, cos, sin, FLOOR, False), *ops.join_quantize_both(x, dv, 128, FLOOR, False)

    once = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    assert same_bits(captured, once)


@pytest.mark.gpu
def test_beyond_32_bits():
    """More than 2^31 values of dk: the last rows are those of a small call."""
    rows, heads = 87_500, 128
    dk = torch.zeros(rows, heads, 192, dtype=torch.bfloat16, device="cuda")
    dk[-300:].normal_()
    dv = dk[..., 64:]
    tail = (rows - 300) // 128 * 128
    found = ops.join_quantize_both(dk, dv, 128, FLOOR, False)
    expected = ops.join_quantize_both(dk[tail:].clone(), dv[tail:].clone(), 128, FLOOR, False)
    assert torch.equal(_bytes(found[0][tail:]), _bytes(expected[0]))
    assert torch.equal(found[1][tail:], expected[1])
    assert torch.equal(_bytes(found[2][:, tail:]), _bytes(expected[2]))
    assert torch.equal(found[3][:, tail // 128 :], expected[3])


def test_what_is_refused():
    x, cos = torch.zeros(4, 2, 192, dtype=torch.bfloat16), torch.zeros(4, 16)
    with pytest.raises(OperatorError, match="rotary features: expected 64, found 32"):
        ops.rotate_quantize_both(x, cos, cos, FLOOR, False)
    with pytest.raises(OperatorError, match="features of nope: expected a multiple of 64, found 100"):
        ops.join_quantize_both(x, x, 100, FLOOR, False)
    with pytest.raises(OperatorError, match="dtype of x"):
        ops.rotate_heads(x.float(), cos, cos, False)
