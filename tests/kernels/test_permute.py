"""Rows to their experts and back: permute bit for bit, sums against float64, written row by row."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dsv3c.operators
from dsv3c.kernels.reference import permute as reference
from dsv3c.numerics import Recipe, gemm_bounds, rounded_sum_bound

ops = torch.ops.dsv3c
FLOOR = Recipe().amax_floor
SIZES = [(1, 1, 16), (37, 3, 200), (64, 8, 384)]  # T, K, H


def make(check, T, K, H, dtype=torch.bfloat16, device="cpu"):
    """x, y, weights, permutation, inverse; weights span magnitudes, one of them is zero."""
    permutation, inverse = ops.sort_by_expert(torch.rand(T, max(K, 16), device=device).argsort(-1)[:, :K].int(), 16)[2:]
    x, y = (check.varied(rows, H, dtype, device=device) for rows in (T, T * K))
    weights = torch.randn(T, K, device=device) * torch.exp2(torch.randint(-4, 4, (T, K), device=device))
    weights[0, 0] = 0
    return x, y, weights, permutation, inverse


def bits(x):
    return x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_permute(check, size):
    """What quantising after the gather gives, bit for bit."""
    x, _, _, permutation, inverse = make(check, *size)
    found = ops.permute(*ops.quantize_tile(x, FLOOR, False), permutation, inverse)
    rows = torch.stack([x[copy // size[1]] for copy in permutation.tolist()])
    expected = ops.quantize_tile(rows, FLOOR, False)
    for f, e in zip(found, expected, strict=True):
        assert (f.shape, f.stride(), f.dtype) == (e.shape, e.stride(), e.dtype)
        assert torch.equal(bits(f), bits(e))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("size", [*SIZES, (1000, 8, 1000)])
def test_permute_requantize_t(check, size, device):
    """What casting again after the gather gives, bit for bit: groups that are empty, short, full, and rows of none."""
    x, _, _, permutation, inverse = make(check, *size, device=device)
    rows = torch.stack([x[copy // size[1]] for copy in permutation.tolist()])
    offs = check.ends([len(rows) // 3, 0, min(128, len(rows) // 3), 0, len(rows) // 4], device)
    for pow2 in (False, True):
        pair = ops.quantize_tile(x, FLOOR, pow2)
        expected = ops.requantize_t(*ops.quantize_tile(rows, FLOOR, pow2), offs, FLOOR, pow2)
        for q, scale_inv in (pair, (torch.cat([pair[0]] * 2, 1)[:, : size[2]], pair[1].contiguous())):
            found = ops.permute_requantize_t(q, scale_inv, permutation, inverse, offs, FLOOR, pow2)
            for f, e in zip(found, expected, strict=True):
                assert (f.shape, f.stride(), f.dtype) == (e.shape, e.stride(), e.dtype)
                assert torch.equal(bits(f), bits(e))


def assert_sum(out, y, inverse, weights, *terms):
    """`out` against float64, token by token."""
    sums, magnitudes = [], []
    weights = torch.ones(inverse.shape, device=y.device) if weights is None else weights
    for rows, w in zip(inverse.long(), weights.double(), strict=True):
        each = w[:, None] * y[rows].double()
        sums.append(each.sum(0))
        magnitudes.append(each.abs().sum(0))
    expected, magnitude = torch.stack(sums), torch.stack(magnitudes)
    for term in terms:
        expected, magnitude = expected + term.double(), magnitude + term.double().abs()
    bound = rounded_sum_bound(expected, magnitude, inverse.shape[1] + len(terms), out.dtype)
    assert bool(((out.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_unpermute(check, size, dtype):
    x, y, weights, _, inverse = make(check, *size, dtype)
    shared = check.varied(*x.shape, dtype)
    assert_sum(ops.unpermute(y, inverse, weights, None, None), y, inverse, weights)
    assert_sum(ops.unpermute(y, inverse, None, None, None), y, inverse, None)
    assert_sum(ops.unpermute(y, inverse, weights, shared, x), y, inverse, weights, shared, x)


def assert_dweights(dweights, dout, y, inverse):
    products = (y.double()[inverse.long()] * dout.double()[:, None]).cpu()
    expected, norm = products.sum(-1), products.square().sum(-1).sqrt()
    element, _ = gemm_bounds(expected, norm, torch.float32, y.shape[1])  # on the CPU: a float32 sum in any order
    assert bool(((dweights.double().cpu() - expected).abs() <= element).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_unpermute_backward(check, size, dtype):
    x, y, weights, _, inverse = make(check, *size, dtype)
    dy, dweights = ops.unpermute_backward(x, y, inverse, weights)
    assert (dy.dtype, dweights.dtype) == (dtype, torch.float32)
    for t, rows in enumerate(inverse.tolist()):
        for k, row in enumerate(rows):
            assert torch.equal(dy[row], (weights[t, k] * x[t].float()).to(dtype))
    assert_dweights(dweights, x, y, inverse)


def test_unpermute_undoes_permute(check):
    x, _, _, permutation, inverse = make(check, 64, 4, 256)
    q, scale_inv = ops.permute(*ops.quantize_tile(x, FLOOR, True), permutation, inverse)
    y = q.float() * scale_inv.repeat_interleave(128, 1)
    back = ops.unpermute(y, inverse, torch.full(inverse.shape, 0.25), None, None)
    q, scale_inv = ops.quantize_tile(x, FLOOR, True)
    assert torch.equal(back, q.float() * scale_inv.repeat_interleave(128, 1))


def test_backwards_are_the_gradients(check):
    """Of the definitions in float64 arithmetic that is exact: small whole numbers."""
    _, _, _, permutation, inverse = make(check, 12, 3, 32)
    x, y, dout = (torch.randint(-8, 9, shape).float() for shape in [(12, 32), (36, 32), (12, 32)])
    weights = torch.randint(-8, 9, (12, 3)).float()
    x, y, weights = (t.requires_grad_() for t in (x, y, weights))
    out = (y[inverse.long()] * weights[..., None]).sum(1)
    dy, dweights = torch.autograd.grad(out, (y, weights), dout)
    found = ops.unpermute_backward(dout, y.detach(), inverse, weights.detach())
    assert torch.equal(found[0], dy)
    assert torch.equal(found[1], dweights)
    (dx,) = torch.autograd.grad(x[permutation.long() // 3], x, y.detach())
    assert torch.equal(ops.unpermute(y.detach(), inverse, None, None, None), dx)


class Launches(list):
    """Stands in for a kernel: what it is launched with."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.append((grid, arguments))


@pytest.mark.parametrize(
    ("T", "top_k", "groups", "K", "gap"),
    [(300, 8, 4, 640, 0), (1000, 1, 3, 1024, 64), (129, 2, 40, 128, 0), (66000, 1, 1, 384, 0)],
)
def test_what_is_brought_ahead(T, top_k, groups, K, gap, monkeypatch):
    """Of x `requantize.py` asks for each tile of columns but the first two, once, and for nothing that is not x's; of
    as many tokens as AHEAD programs have. Of the permutation for each line."""
    requantize = pytest.importorskip("dsv3c.kernels.requantize", reason="needs Triton")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from gluon_on_cpu import GL, Kernel, Pointer

    rows, cast, lines = Launches(), Launches(), []
    monkeypatch.setattr(requantize, "_rows_kernel", rows)
    monkeypatch.setattr(requantize, "_requantize_kernel", cast)
    R, P = T * top_k, (-(-T * top_k // 128) + groups) * 128
    x = torch.empty(T, K + gap, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, :K]
    permutation, offs = torch.arange(R, dtype=torch.int32), torch.full((groups,), R, dtype=torch.int32)
    out = torch.empty(K, P, dtype=torch.uint8), torch.empty(P // 128, K)
    inverse, scale_inv = permutation.view(T, top_k), torch.empty(K // 128, T).T
    requantize.permute_requantize_t(x, scale_inv, permutation, inverse, offs, FLOOR, False, out)

    def prefetch(at, mine):
        lines.extend(at.offset[mine].tolist())

    emulated = {
        "gl": SimpleNamespace(**vars(GL), uint32=torch.int64),
        "_prefetch": prefetch,
        "find_tile": lambda *arguments: (0, 0, 0),
        "gdc_launch_dependents": lambda: None,
    }
    ((grid, arguments),) = rows
    Kernel(requantize.__file__, "_rows_kernel", **emulated)[grid](*arguments, num_warps=4)
    assert sorted(lines) == [*range(0, R, 32)]

    lines.clear()
    (((tiles, columns), (words, *_, K_given, x_stride, _, _, _, tokens, first, _, _)),) = cast
    bring = Kernel(requantize.__file__, "_bring", **emulated).function
    for column in range(columns):
        for tile in range(tiles):
            bring(Pointer.to(words), tile, first, 128 * column, torch.arange(128), tokens, K_given, x_stride)
    brought = min(T, 128 * requantize.AHEAD)
    assert sorted(lines) == [
        at for token in range(brought) for at in range(token * (K + gap) // 2 + 128, (token * (K + gap) + K) // 2, 64)
    ]


@pytest.mark.parametrize("name", ["permute", "permute_requantize_t", "unpermute", "unpermute_backward"])
def test_fake_agrees_with_real(check, name):
    x, y, weights, permutation, inverse = make(check, 40, 3, 144)
    q = ops.quantize_tile(x, FLOOR, False)
    arguments = {
        "permute": (*q, permutation, inverse),
        "permute_requantize_t": (*q, permutation, inverse, check.ends([70, 50]), FLOOR, False),
        "unpermute": (y, inverse, weights, x, None),
        "unpermute_backward": (x, y, inverse, weights),
    }
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(ops, name).default, arguments[name], test_utils=tests)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = getattr(ops, name)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments[name]))
    real = getattr(ops, name)(*arguments[name])
    for f, r in zip(*(t if isinstance(t, tuple) else (t,) for t in (fake, real)), strict=True):
        assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y, i, w, x: (y[:-1], i, w, x), "numbers in inverse: expected 119, found 120"),
        (lambda y, i, w, x: (y, i.long(), w, x), "dtype of inverse: expected torch.int32"),
        (lambda y, i, w, x: (y, i, w.bfloat16(), x), "dtype of topk_weights: expected torch.float32"),
        (lambda y, i, w, x: (y, i, w, x.float()), "dtype and shape of added"),
    ],
)
def test_mismatched_operands_are_named(check, change, message):
    x, y, weights, _, inverse = make(check, 40, 3, 144)
    with pytest.raises(dsv3c.operators.OperatorError, match=message):
        ops.unpermute(*change(y, inverse, weights, x), None)


# -- the kernels' indices, without a GPU: Triton's interpreter, in whole numbers, whose sums are exact --

PROGRAM = """
import torch
import dsv3c.operators
from dsv3c.kernels import permute
from dsv3c.kernels.reference import permute as reference

ops = torch.ops.dsv3c
torch.manual_seed(0)

def whole(*shape):
    return torch.randint(-8, 9, shape).float()

for T, K, H in [(5, 3, 200), (3, 8, 1100), (1, 1, 16)]:
    *_, permutation, inverse = ops.sort_by_expert(torch.rand(T, 16).argsort(-1)[:, :K].int(), 16)
    x, y, weights = whole(T, H), whole(T * K, H), whole(T, K)
    pair = ops.quantize_tile(torch.randn(T, H), 1e-4, False)
    expected = reference.permute_ref(*pair, permutation, inverse)
    out = expected[0].clone().zero_(), torch.full_like(expected[1], torch.nan)
    permute.permute(*pair, permutation, inverse, out)
    assert torch.equal(out[0].float(), expected[0].float()) and torch.equal(out[1], expected[1])
    for optional in ((weights, None, None), (None, x, None), (weights, x, 3 * x)):
        out = torch.full_like(x, torch.nan)
        permute.unpermute(y, inverse, *optional, out)
        assert torch.equal(out, reference.unpermute_ref(y, inverse, *optional))
    out = torch.full_like(y, torch.nan), torch.full_like(weights, torch.nan)
    permute.unpermute_backward(x, y, inverse, weights, out)
    assert all(map(torch.equal, out, reference.unpermute_backward_ref(x, y, inverse, weights)))
"""


def test_indices_and_masks(interpreted):
    interpreted(PROGRAM)


# -- on a GPU --

GPU_SIZES = [*SIZES, (0, 8, 256), (1000, 8, 7168), (333, 6, 5120), (50, 2, 77)]


def launched(name, *args):
    """(what the kernel writes into memory full of NaN, the definition)."""
    kernels = pytest.importorskip("dsv3c.kernels.permute", reason="needs Triton")
    expected = getattr(reference, f"{name}_ref")(*args)
    several = isinstance(expected, tuple)
    out = tuple(torch.empty_like(e) for e in (expected if several else (expected,)))
    for x in out:
        x.view(torch.uint8 if x.element_size() == 1 else {2: torch.int16, 4: torch.int32}[x.element_size()]).fill_(-1)
    getattr(kernels, name)(*args, out if several else out[0])
    return (out if several else out[0]), expected


@pytest.mark.gpu
@pytest.mark.parametrize("size", GPU_SIZES)
def test_permute_on_gpu(check, size):
    x, _, _, permutation, inverse = make(check, *size, device="cuda") if size[0] else empty(size)
    q, scale_inv = ops.quantize_tile(x, FLOOR, False)
    for pair in ((q, scale_inv), (torch.cat([q, q], 1)[:, : size[2]], scale_inv.contiguous())):
        found, expected = launched("permute", *pair, permutation, inverse)
        for f, e in zip(found, expected, strict=True):
            assert f.stride() == e.stride()
            assert torch.equal(bits(f), bits(e))


def empty(size):
    T, K, H = size
    x = torch.empty(T, H, device="cuda", dtype=torch.bfloat16)
    numbers = torch.empty(T, K, device="cuda", dtype=torch.int32)
    return x, x.new_empty(T * K, H), numbers.float(), numbers.flatten(), numbers


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", GPU_SIZES)
def test_unpermute_on_gpu(check, size, dtype):
    if size[0] == 0:
        x, y, weights, _, inverse = empty(size)
        assert ops.unpermute(y, inverse, weights, x, x).shape == x.shape
        assert ops.unpermute_backward(x, y, inverse, weights)[0].shape == y.shape
        return
    x, y, weights, _, inverse = make(check, *size, dtype, device="cuda")
    shared = check.varied(*x.shape, dtype, device="cuda")
    for w in (weights, None):
        for terms in ((), (shared,), (shared, x)):
            out, _ = launched("unpermute", y, inverse, w, *terms, *[None] * (2 - len(terms)))
            assert_sum(out, y, inverse, w, *terms)
    strided = torch.cat([y, y], 1)[:, : size[2]]
    assert torch.equal(ops.unpermute(strided, inverse, None, shared.T.contiguous().T, x), out)
    found, expected = launched("unpermute_backward", x, y, inverse, weights)
    assert torch.equal(bits(found[0]), bits(expected[0]))
    assert_dweights(found[1], x, y, inverse)
    again = ops.unpermute_backward(x, strided, inverse, weights)
    assert torch.equal(bits(again[0]), bits(found[0]))
    assert_dweights(again[1], x, y, inverse)  # alignment decides how wide loads are, and that the order of the sum


@pytest.mark.gpu
def test_bad_numbers_stay_in_their_token(check):
    x, y, weights, _, inverse = make(check, 50, 4, 256, device="cuda")
    y[inverse[7, 2], 30], y[inverse[9, 0], 31] = torch.nan, torch.inf
    weights[9, 0] = 1
    out = ops.unpermute(y, inverse, weights, None, None)
    assert out.isnan().nonzero().tolist() == [[7, 30]]
    assert out.isinf().nonzero().tolist() == [[9, 31]]
    _, dweights = ops.unpermute_backward(x, y, inverse, weights)
    assert dweights.isnan().nonzero().tolist() == [[7, 2]]


@pytest.mark.gpu
def test_offsets_beyond_32_bits(check):
    """R·H > 2^31."""
    T, K, H = 38000, 8, 7168
    _, _, _, permutation, inverse = make(check, T, K, 16, device="cuda")
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
    q, scale_inv = ops.quantize_tile(x, FLOOR, False)
    rows, row_scale_inv = ops.permute(q, scale_inv, permutation, inverse)
    tokens = permutation[-100:].long() // K
    assert torch.equal(rows.view(torch.uint8)[-100:], q.view(torch.uint8)[tokens])
    assert torch.equal(row_scale_inv[-100:], scale_inv[tokens])
    del rows
    offs = torch.tensor([T * K - 100, T * K], dtype=torch.int32, device="cuda")
    across, across_scale_inv = ops.permute_requantize_t(q, scale_inv, permutation, inverse, offs, FLOOR, False)
    last = ops.quantize_tile(x, FLOOR, False)[0].view(torch.uint8)[tokens].view(q.dtype), scale_inv[tokens]
    expected = ops.requantize_t(*last, offs[:1] * 0 + 100, FLOOR, False)
    first = (T * K - 100 + 127) // 128 * 128
    assert torch.equal(across.view(torch.uint8)[:, first : first + 100], expected[0].view(torch.uint8)[:, :100])
    assert torch.equal(across_scale_inv[:, first // 128], expected[1][:, 0])


@pytest.mark.gpu
def test_in_a_cuda_graph(check):
    x, y, weights, permutation, inverse = make(check, 100, 4, 512, device="cuda")
    q, offs = ops.quantize_tile(x, FLOOR, False), check.ends([100, 300], "cuda")

    def call():
        return (
            *ops.permute(*q, permutation, inverse),
            *ops.permute_requantize_t(*q, permutation, inverse, offs, FLOOR, False),
            ops.unpermute(y, inverse, weights, x, None),
            *ops.unpermute_backward(x, y, inverse, weights),
        )

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    *_, other_permutation, other_inverse = make(check, 100, 4, 512, device="cuda")
    permutation.copy_(other_permutation)
    inverse.copy_(other_inverse)
    graph.replay()
    assert all(torch.equal(bits(c), bits(e)) for c, e in zip(captured, call(), strict=True))
