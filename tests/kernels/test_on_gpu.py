"""The GPU kernels against their definitions: casts bit for bit, products against float64 on the same operands."""

import random

import pytest
import torch

import dsv3c.operators  # noqa: F401
from dsv3c.kernels.reference import casts as reference
from dsv3c.kernels.reference.permute import permute_requantize_t_ref
from dsv3c.numerics import Recipe

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0"),
    pytest.mark.usefixtures("poisoned"),
]

gemm = pytest.importorskip("dsv3c.kernels.gemm", reason="needs Triton")
wgrad = pytest.importorskip("dsv3c.kernels.wgrad", reason="needs Triton")

ops = torch.ops.dsv3c
FLOOR, GRADIENT_FLOOR = Recipe().amax_floor, Recipe().gradient_amax_floor
DTYPES = [torch.bfloat16, torch.float32]
GROUPS = [[5, 0, 128, 129], [0, 0, 640, 0], [64] * 16, [300, 1, 1000, 77, 0, 513]]


def assert_same_bits(found, expected):
    for f, e in zip(found, expected, strict=True):
        assert (f.shape, f.stride(), f.dtype) == (e.shape, e.stride(), e.dtype)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[f.element_size()]
        different = int((f.view(bits) != e.view(bits)).sum())
        assert different == 0, f"{different} of {f.numel()} differ"


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (130, 257), (2500, 640)])
def test_casts(check, shape, dtype, pow2):
    x = check.varied(*shape, dtype, device="cuda")
    x[..., ::7] = -0.0
    strided = torch.cat([x, x], 1)[:, : shape[1]]
    arguments = FLOOR, pow2
    assert_same_bits(ops.quantize_tile(x, *arguments), reference.quantize_tile_ref(x, *arguments))
    assert_same_bits(ops.quantize_tile(strided, *arguments), reference.quantize_tile_ref(x, *arguments))
    assert_same_bits(ops.quantize_tile(x.T, *arguments), reference.quantize_tile_ref(x.T, *arguments))
    assert_same_bits(ops.quantize_block(x, *arguments), reference.quantize_block_ref(x, *arguments))
    stacked = torch.stack([x, 3 * x])
    q, scale_inv = ops.quantize_block(stacked, *arguments)
    assert_same_bits((q, scale_inv), reference.quantize_block_ref(stacked, *arguments))
    back = ops.dequantize_block(q, scale_inv, dtype)
    assert_same_bits((back,), (reference.dequantize_block_ref(q, scale_inv, dtype),))


@pytest.mark.parametrize("sizes", [None, *GROUPS])
@pytest.mark.parametrize("columns", [4, 130, 512])
def test_transposing_casts(check, sizes, columns):
    x = check.varied(1000 if sizes is None else sum(sizes) + 9, columns, torch.bfloat16, device="cuda")
    offs = None if sizes is None else check.ends(sizes, device="cuda")
    for pow2 in (False, True):
        expected = reference.quantize_tile_t_ref(x, offs, FLOOR, pow2)
        assert_same_bits(ops.quantize_tile_t(x, offs, FLOOR, pow2), expected)
        q, scale_inv = ops.quantize_tile(x, FLOOR, pow2)
        q.view(torch.uint8)[::9, ::3] = 0x80  # -0
        expected = reference.requantize_t_ref(q, scale_inv, offs, FLOOR, pow2)
        beside = torch.cat([q, q[:, :1]], 1)
        odd = beside.clone().flatten()[1 : 1 + q.numel()].view(q.shape).copy_(q)
        for each in (q, beside[:, :-1], odd):
            assert_same_bits(ops.requantize_t(each, scale_inv, offs, FLOOR, pow2), expected)


@pytest.mark.parametrize("groups", [1, 33, 48, 256, 300])
def test_casts_of_many_groups(check, groups):
    """Tiles are looked up among groups of which a thread has several, and loads several at once, or not."""
    sizes = random.Random(groups).choices([0, 0, 1, 31, 127, 128, 129, 200], k=groups)
    offs = check.ends([*sizes[:-1], 5], device="cuda")
    R, (T, K) = sum(sizes[:-1]) + 5 + 43, (40, 8)
    x = check.varied(R, 200, torch.bfloat16, device="cuda")
    q = ops.quantize_tile(x, FLOOR, False)
    assert_same_bits(ops.quantize_tile_t(x, offs, FLOOR, False), reference.quantize_tile_t_ref(x, offs, FLOOR, False))
    expected = reference.quantize_tile_both_ref(x, offs, FLOOR, False)
    assert_same_bits(ops.quantize_tile_both(x, offs, FLOOR, False), expected)
    assert_same_bits(ops.requantize_t(*q, offs, FLOOR, False), reference.requantize_t_ref(*q, offs, FLOOR, False))
    permutation = torch.randperm(T * K, device="cuda").int()
    inverse = permutation.argsort().int().view(T, K)
    offs = check.ends([n * T * K // (sum(sizes) + 1) for n in sizes], device="cuda")
    arguments = *(each[:T] for each in q), permutation, inverse, offs, FLOOR, False
    assert_same_bits(ops.permute_requantize_t(*arguments), permute_requantize_t_ref(*arguments))


@pytest.mark.parametrize("sizes", [None, *GROUPS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_casts_from_one_read(check, sizes, dtype):
    x = check.varied(1000 if sizes is None else sum(sizes) + 300, 640, dtype, device="cuda")[:, 2:-1]
    offs = None if sizes is None else check.ends(sizes, device="cuda")
    for pow2 in (False, True):
        expected = reference.quantize_tile_both_ref(x, offs, FLOOR, pow2)
        assert_same_bits(ops.quantize_tile_both(x, offs, FLOOR, pow2), expected)


@pytest.mark.parametrize("shape", [(1, 8), (5, 128), (77, 264), (300, 16384)])
def test_e5m6(check, shape):
    x = check.varied(*shape, device="cuda") * torch.exp2(torch.randint(-30, 20, shape, device="cuda").float())
    x[..., ::7] = -0.0
    packed, scale_inv = ops.quantize_e5m6(x, FLOOR)
    assert_same_bits((packed, scale_inv), reference.quantize_e5m6_ref(x, FLOOR))
    for dtype in DTYPES:
        back = ops.dequantize_e5m6(packed, scale_inv, dtype)
        assert_same_bits((back,), (reference.dequantize_e5m6_ref(packed, scale_inv, dtype),))


def test_every_tie_of_e5m6(check):
    x = check.e5m6_ties("cuda")
    packed, scale_inv = ops.quantize_e5m6(x, FLOOR)
    assert_same_bits((packed, scale_inv), reference.quantize_e5m6_ref(x, FLOOR))
    back = ops.dequantize_e5m6(packed, scale_inv, torch.float32)
    assert_same_bits((back,), (reference.dequantize_e5m6_ref(packed, scale_inv, torch.float32),))


def test_every_scale_near_every_tie():
    """All 2^23 significands of scale_inv, and quotients on both sides of ties of E4M3 and on them."""
    amax = (torch.arange(1 << 23, dtype=torch.int32, device="cuda") + (127 << 23)).view(torch.float32)
    scale_inv = amax / amax.new_full((), 448.0)
    x = torch.zeros(1 << 23, 16, device="cuda")
    x[:, 0] = amax
    for i, tie in enumerate((17.0, 27.0, 232.0, 2.0**-10, 3 * 2.0**-10)):
        bits = (scale_inv * tie).view(torch.int32)
        for j in range(3):
            x[:, 1 + 3 * i + j] = (bits + j - 1).view(torch.float32)
    assert_same_bits(ops.quantize_tile(x, FLOOR, False), reference.quantize_tile_ref(x, FLOOR, False))


def test_every_quotient_near_a_tie(check):
    """Where two products for a division could go wrong: a tile for each, its values the scales of rows of ones."""
    x, divisor, _ = torch.tensor(check.near_ties(), dtype=torch.float64, device="cuda").unbind(-1)
    near = (448 * divisor).float()[:, None].view(torch.int32) + torch.arange(-2, 3, device="cuda", dtype=torch.int32)
    near = near.view(torch.float32)
    right = (near / near.new_full((), 448.0)).double() == divisor[:, None]
    amax = torch.where(right, near, 0).amax(-1).double()
    assert float((amax > 0).double().mean()) > 0.9
    rows = torch.cat([amax[:, None], x[:, None] * torch.exp2(torch.arange(-10.0, 9.0, device="cuda"))], 1)
    rows = torch.nn.functional.pad(rows * (rows <= amax[:, None]), (0, 128 - rows.shape[1])).float()
    q = torch.tensor([1.0, -1.0, 0.0, -0.0], device="cuda").repeat(rows.numel(), 4).to(torch.float8_e4m3fn)
    expected = reference.requantize_t_ref(q, rows.view(-1, 1), None, FLOOR, False)
    assert_same_bits(ops.requantize_t(q, rows.view(-1, 1), None, FLOOR, False), expected)
    wide = (q.float() * rows.view(-1, 1)).contiguous()
    assert_same_bits(ops.quantize_tile_t(wide, None, FLOOR, False), expected)


def test_nan_makes_its_tile_nan():
    x = torch.ones(70, 256, device="cuda")
    x[69, 130] = torch.nan
    q, _ = ops.quantize_tile(x, FLOOR, False)
    bad = q.float().isnan()
    assert bool(bad[69, 128:].all())
    assert int(bad.sum()) == 128
    xt, xt_scale_inv = ops.quantize_tile_t(x, None, FLOOR, False)
    assert bool(xt.float().isnan()[130].all())
    assert int(xt_scale_inv.isnan().sum()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 16, 128), (5, 130, 257), (64, 576, 896), (333, 400, 1024), (1024, 2112, 1152)])
def test_gemms(check, size, dtype):
    """Sizes with and without cuBLASLt's alignments; 896 and 1152 are 7 and 9 blocks, whose scales it wants padded."""
    R, N, K = size
    x_RK, dy_RN = check.varied(R, K, device="cuda"), check.varied(R, N, device="cuda")
    x, dy = ops.quantize_tile(x_RK, FLOOR, False), ops.quantize_tile(dy_RN, GRADIENT_FLOOR, False)
    w, w_scale_inv = ops.quantize_block(check.varied(N, K, device="cuda"), FLOOR, False)
    check.assert_product(ops.gemm(*x, w, w_scale_inv, dtype), *check.product(*x, w, w_scale_inv), K)
    expected = check.product(*dy, w.T, w_scale_inv.T)
    check.assert_product(ops.gemm_dgrad(*dy, w, w_scale_inv, dtype), *expected, N)
    xt = ops.requantize_t(*x, None, FLOOR, False)
    dyt = ops.quantize_tile_t(dy_RN, None, GRADIENT_FLOOR, False)
    check.assert_product(ops.gemm_wgrad(*dyt, *xt, dtype), *check.product(*dyt, *xt), R)


def sample(implementation) -> list[dict]:
    """Configurations that fit, 16 of them, among which every value of every knob is likely."""
    configs = [c for c in implementation.configs() if c["halves"] * c["rows"] * c["num_stages"] <= 512]
    return random.Random(0).sample(configs, 16)


@pytest.mark.parametrize("size", [(1, 16, 128), (200, 130, 257), (640, 512, 2048)])
def test_configurations(check, size):
    """A configuration changes the speed, never a bit."""
    R, N, K = size
    x = ops.quantize_tile(check.varied(R, K, device="cuda"), FLOOR, False)
    w_NK = check.varied(N, K, device="cuda")
    w = ops.quantize_block(w_NK, FLOOR, False)
    configs = sample(gemm.IMPLEMENTATIONS["gemm"][0])
    products = [torch.full((R, N), torch.nan, device="cuda") for _ in configs]
    for y, config in zip(products, configs, strict=True):
        gemm.launch(*x, *w, y, **config)
        check.assert_product(y, *check.product(*x, *w), K)
    assert all(torch.equal(y, products[0]) for y in products)

    w = ops.quantize_tile(w_NK, FLOOR, False)
    first = torch.tensor([0, 0, len(x[1].T)], dtype=torch.int32, device="cuda")  # the first group has no rows
    configs = sample(wgrad.IMPLEMENTATIONS["grouped_gemm_wgrad"][0])
    products = [torch.full((2, R, N), torch.nan, device="cuda") for _ in configs]
    for y, config in zip(products, configs, strict=True):
        wgrad.launch(*x, *w, first, y, **config)
        check.assert_product(y[1], *check.product(*x, *w), K)
        assert not y[0].any()
    assert all(torch.equal(y, products[0]) for y in products)


@pytest.mark.parametrize("shape", [(3, 256, 384), (130, 257)])
def test_dgrad_takes_the_view_of_a_transposed_weight(check, shape):
    """Same bits; what it saves is the transposition."""
    w = torch.stack([check.varied(*shape[-2:], device="cuda") for _ in range(shape[0])]) if len(shape) == 3 else None
    w = check.varied(*shape, device="cuda") if w is None else w
    N = shape[-2]
    dy = ops.quantize_tile(check.varied(200, N, device="cuda"), GRADIENT_FLOOR, False)
    w_fp8, w_scale_inv = ops.quantize_block(w, FLOOR, False)
    wt_fp8, _ = ops.quantize_block(w.mT, FLOOR, False)
    assert torch.equal(wt_fp8.mT.double(), w_fp8.double())
    if len(shape) == 3:
        offs = check.ends([100, 0, 100], device="cuda")
        results = [ops.grouped_gemm_dgrad(*dy, v, w_scale_inv, offs, torch.float32) for v in (w_fp8, wt_fp8.mT)]
    else:
        results = [ops.gemm_dgrad(*dy, v, w_scale_inv, torch.float32) for v in (w_fp8, wt_fp8.mT)]
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(256, 384), (130, 272), (72, 100)])
@pytest.mark.parametrize("sizes", GROUPS)
def test_grouped(check, sizes, N, K, dtype):
    R, E = sum(sizes) + 9, len(sizes)  # 9 rows of no group
    offs = check.ends(sizes, device="cuda")
    x_RK, dy_RN = check.varied(R, K, device="cuda"), check.varied(R, N, device="cuda")
    x, dy = ops.quantize_tile(x_RK, FLOOR, False), ops.quantize_tile(dy_RN, GRADIENT_FLOOR, False)
    w, w_scale_inv = ops.quantize_block(check.varied(E * N, K, device="cuda").view(E, N, K), FLOOR, False)
    xt = ops.requantize_t(*x, offs, FLOOR, False)
    dyt = ops.quantize_tile_t(dy_RN, offs, GRADIENT_FLOOR, False)
    y = ops.grouped_gemm(*x, w, w_scale_inv, offs, dtype)
    dx = ops.grouped_gemm_dgrad(*dy, w, w_scale_inv, offs, dtype)
    dw = ops.grouped_gemm_wgrad(*dyt, *xt, offs, dtype)
    start = first = 0
    for e, n in enumerate(sizes):
        rows, tiles = slice(start, start + n), slice(first, first - (-n // 128))
        padded = slice(128 * tiles.start, 128 * tiles.stop)
        start, first = rows.stop, tiles.stop
        if n == 0:
            assert not dw[e].any()
            continue
        check.assert_product(y[rows], *check.product(x[0][rows], x[1][rows], w[e], w_scale_inv[e]), K)
        expected = check.product(dy[0][rows], dy[1][rows], w[e].T, w_scale_inv[e].T)
        check.assert_product(dx[rows], *expected, N)
        operands = dyt[0][:, padded], dyt[1][:, tiles], xt[0][:, padded], xt[1][:, tiles]
        check.assert_product(dw[e], *check.product(*operands), n)


def test_fewer_rows_than_groups(check):
    """As in decoding: most experts have none, and the launch is for few tiles; the casts' is for all padding."""
    sizes = [0] * 20 + [2] + [0] * 30 + [1, 0, 1] + [0] * 10
    offs = check.ends(sizes, device="cuda")
    x = ops.quantize_tile(check.varied(4, 512, device="cuda"), FLOOR, False)
    w, w_scale_inv = ops.quantize_block(
        check.varied(len(sizes) * 256, 512, device="cuda").view(-1, 256, 512), FLOOR, False
    )
    y = ops.grouped_gemm(*x, w, w_scale_inv, offs, torch.float32)
    for row, e in enumerate((20, 20, 51, 53)):
        mine = slice(row, row + 1)
        check.assert_product(y[mine], *check.product(x[0][mine], x[1][mine], w[e], w_scale_inv[e]), 512)
    assert_same_bits(ops.requantize_t(*x, offs, FLOOR, False), reference.requantize_t_ref(*x, offs, FLOOR, False))


def test_in_a_cuda_graph(check):
    """No host synchronisation: groups that change after the capture are the ones that count."""
    offs = check.ends([100, 28], device="cuda")
    x = ops.quantize_tile(check.varied(128, 256, device="cuda"), FLOOR, False)
    w = ops.quantize_block(check.varied(256, 256, device="cuda").view(2, 128, 256), FLOOR, False)
    ops.grouped_gemm(*x, *w, offs, torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.grouped_gemm(*x, *w, offs, torch.float32)
    offs.copy_(check.ends([3, 125], device="cuda"))
    graph.replay()
    assert torch.equal(y, ops.grouped_gemm(*x, *w, offs, torch.float32))
