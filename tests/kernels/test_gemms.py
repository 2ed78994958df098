"""Products against float64 on the same quantised operands, and the operators' shapes, fakes, FLOPs and errors."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dsv3c.operators
from dsv3c.numerics import Recipe, quantized_gemm_rms

ops = torch.ops.dsv3c
FLOOR, GRADIENT_FLOOR = Recipe().amax_floor, Recipe().gradient_amax_floor
DTYPES = [torch.bfloat16, torch.float32]
SIZES = [(1, 16, 128), (5, 130, 257), (200, 96, 384)]  # R, N, K
GROUPS = [[5, 0, 128, 67], [0, 200, 0, 0], [50, 50, 50, 50], [0, 0, 0, 10]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gemm(check, size, dtype):
    R, N, K = size
    x, w = ops.quantize_tile(check.varied(R, K), FLOOR, False), ops.quantize_block(check.varied(N, K), FLOOR, False)
    check.assert_product(ops.gemm(*x, *w, dtype), *check.product(*x, *w), K)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gemm_dgrad(check, size, dtype):
    R, N, K = size
    dy = ops.quantize_tile(check.varied(R, N), GRADIENT_FLOOR, False)
    w, w_scale_inv = ops.quantize_block(check.varied(N, K), FLOOR, False)
    expected = check.product(*dy, w.T, w_scale_inv.T)
    check.assert_product(ops.gemm_dgrad(*dy, w, w_scale_inv, dtype), *expected, N)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gemm_wgrad(check, size, dtype):
    R, N, K = size
    dy = ops.quantize_tile_t(check.varied(R, N), None, GRADIENT_FLOOR, False)
    x = ops.quantize_tile_t(check.varied(R, K), None, FLOOR, False)
    check.assert_product(ops.gemm_wgrad(*dy, *x, dtype), *check.product(*dy, *x), R)


def test_whole_product_is_as_exact_as_its_format(check):
    """Against unquantised operands: E4M3's error and nothing else."""
    x, w = torch.randn(256, 1024), torch.randn(384, 1024)
    y = ops.gemm(*ops.quantize_tile(x, FLOOR, False), *ops.quantize_block(w, FLOOR, False), torch.float32)
    norm = (x.double().square() @ w.double().square().T).sqrt()
    assert float(((y - x.double() @ w.double().T) / norm).square().mean().sqrt()) <= quantized_gemm_rms()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", GROUPS)
def test_grouped(check, sizes, dtype):
    """Each group's three products are the plain ones of its rows; an expert without rows gets a zero gradient."""
    N, K, R = 160, 272, sum(sizes) + 3  # 3 rows of no group
    offs = check.ends(sizes)
    x, dy = check.varied(R, K), check.varied(R, N)
    xq, dyq = ops.quantize_tile(x, FLOOR, False), ops.quantize_tile(dy, GRADIENT_FLOOR, False)
    w, w_scale_inv = ops.quantize_block(torch.stack([check.varied(N, K) for _ in sizes]), FLOOR, False)
    xt = ops.requantize_t(*xq, offs, FLOOR, False)
    dyt = ops.quantize_tile_t(dy, offs, GRADIENT_FLOOR, False)
    y = ops.grouped_gemm(*xq, w, w_scale_inv, offs, dtype)
    dx = ops.grouped_gemm_dgrad(*dyq, w, w_scale_inv, offs, dtype)
    dw = ops.grouped_gemm_wgrad(*dyt, *xt, offs, dtype)
    assert (y.shape, dx.shape, dw.shape) == ((R, N), (R, K), (len(sizes), N, K))
    start = first = 0
    for e, n in enumerate(sizes):
        rows, tiles = slice(start, start + n), slice(first, first - (-n // 128))
        padded = slice(128 * tiles.start, 128 * tiles.stop)
        start, first = rows.stop, tiles.stop
        if n == 0:
            assert not dw[e].any()
            continue
        x_e, dy_e = (xq[0][rows], xq[1][rows]), (dyq[0][rows], dyq[1][rows])
        check.assert_product(y[rows], *check.product(*x_e, w[e], w_scale_inv[e]), K)
        check.assert_product(dx[rows], *check.product(*dy_e, w[e].T, w_scale_inv[e].T), N)
        operands = dyt[0][:, padded], dyt[1][:, tiles], xt[0][:, padded], xt[1][:, tiles]
        check.assert_product(dw[e], *check.product(*operands), n)
        # and the layout holds that group's rows and nothing else
        back = dyt[0][:, padded].float() * dyt[1][:, tiles].repeat_interleave(128, 1)
        assert not back[:, n:].any()


def arguments(check) -> dict[str, tuple]:
    offs = check.ends([5, 0, 28])
    x = ops.quantize_tile(check.varied(40, 144), FLOOR, False)
    dy = ops.quantize_tile(check.varied(40, 288), FLOOR, False)
    w = ops.quantize_block(check.varied(288, 144), FLOOR, False)
    w3 = ops.quantize_block(check.varied(3 * 288, 144).view(3, 288, 144), FLOOR, False)
    xt, dyt = (ops.requantize_t(*t, None, FLOOR, False) for t in (x, dy))
    xg, dyg = (ops.requantize_t(*t, offs, FLOOR, False) for t in (x, dy))
    return {
        "quantize_tile": (check.varied(40, 144), FLOOR, False),
        "quantize_tile_t": (check.varied(40, 144), offs, FLOOR, True),
        "requantize_t": (*x, offs, FLOOR, False),
        "quantize_block": (check.varied(864, 144).view(3, 288, 144), FLOOR, False),
        "dequantize_block": (*w3, torch.bfloat16),
        "wide_mm": (check.varied(40, 144).bfloat16(), check.varied(288, 144).bfloat16().mT, torch.float32),
        "gemm": (*x, *w, torch.bfloat16),
        "gemm_keys": (*x, *ops.quantize_block(check.varied(512, 144), FLOOR, False), torch.rand(2, 20, 8).bfloat16()),
        "gemm_dgrad": (*dy, *w, torch.bfloat16),
        "gemm_wgrad": (*dyt, *xt, torch.float32),
        "grouped_gemm": (*x, *w3, offs, torch.bfloat16),
        "grouped_gemm_dgrad": (*dy, *w3, offs, torch.bfloat16),
        "grouped_gemm_wgrad": (*dyg, *xg, offs, torch.float32),
    }


NAMES = [
    "quantize_tile",
    "quantize_tile_t",
    "requantize_t",
    "quantize_block",
    "dequantize_block",
    "wide_mm",
    "gemm",
    "gemm_keys",
    "gemm_dgrad",
    "gemm_wgrad",
    "grouped_gemm",
    "grouped_gemm_dgrad",
    "grouped_gemm_wgrad",
]


@pytest.mark.parametrize("name", NAMES)
def test_fake_agrees_with_real(check, name):
    """Schema, fake and real agree, also under AOTAutograd with symbolic sizes; strides too."""
    op, args = getattr(ops, name), arguments(check)[name]
    # opcheck's schema test does arithmetic on the arguments, which FP8 has not: what it would find is checked by hand.
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.default, args, test_utils=tests)
    for a, b in zip(args, before, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a.double(), b.double())
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    for f, r in zip(*(t if isinstance(t, tuple) else (t,) for t in (fake, op(*args))), strict=True):
        assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("wide_mm", 40 * 288 * 144),
     ("gemm", 40 * 288 * 144), ("gemm_keys", 40 * 512 * 144),
     ("gemm_dgrad", 40 * 288 * 144), ("gemm_wgrad", 128 * 288 * 144),
     ("grouped_gemm", 40 * 288 * 144), ("grouped_gemm_dgrad", 40 * 288 * 144), ("grouped_gemm_wgrad", 128 * 288 * 144)],
)  # fmt: skip
def test_flops(check, name, expected):
    """Two a product; weight gradients contract over rows rounded up to 128."""
    args = arguments(check)[name]
    with FlopCounterMode(display=False) as counter:
        getattr(ops, name)(*args)
    assert counter.get_total_flops() == 2 * expected


def test_no_rows_and_no_groups_with_rows(check):
    x = ops.quantize_tile(torch.empty(0, 256), FLOOR, False)
    w = ops.quantize_block(check.varied(128, 256), FLOOR, False)
    w3 = tuple(t.expand(2, *t.shape).contiguous() for t in w)
    assert ops.gemm(*x, *w, torch.bfloat16).shape == (0, 128)
    offs = check.ends([0, 0])
    assert ops.grouped_gemm(*x, *w3, offs, torch.bfloat16).shape == (0, 128)
    xt = ops.requantize_t(*x, offs, FLOOR, False)
    assert xt[0].shape == (256, 256)
    assert not ops.grouped_gemm_wgrad(*xt, *xt, offs, torch.float32).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, xs, w, ws: (x, xs.T, w, ws), "shape of x's scale_inv: expected \\(40, 2\\), found \\(2, 40\\)"),
        (lambda x, xs, w, ws: (x, xs, w, ws.T), "shape of w's scale_inv"),
        (lambda x, xs, w, ws: (x, xs, w[:, :128], ws[:, :1]), "columns of w: expected 144, found 128"),
        (lambda x, xs, w, ws: (x.float(), xs, w, ws), "dtype of x: expected torch.float8_e4m3fn, found torch.float32"),
    ],
)
def test_mismatched_operands_are_named(check, change, message):
    args = change(*arguments(check)["gemm"][:4])
    with pytest.raises(dsv3c.operators.OperatorError, match=message):
        ops.gemm(*args, torch.bfloat16)


def test_a_floor_that_leaves_float32_is_refused(check):
    with pytest.raises(dsv3c.operators.OperatorError, match="amax_floor: expected at least"):
        ops.quantize_tile(check.varied(4, 128), 1e-30, False)
