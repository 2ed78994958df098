"""Weight gradients: accumulation, and the implementation with specialised warps, which shares the plain one's bits."""

from dataclasses import replace
from itertools import product

import pytest
import torch

import dsv3c.operators  # noqa: F401
from dsv3c.kernels.implementations import Problem, implementations
from dsv3c.numerics import Recipe
from dsv3c.operators.define import OperatorError

wgrad = pytest.importorskip("dsv3c.kernels.wgrad", reason="needs Triton")
specialized = pytest.importorskip("dsv3c.kernels.wgrad_specialized", reason="needs Triton")
offline = pytest.importorskip("dsv3c.kernels.offline", reason="needs Triton")

ops, FLOOR = torch.ops.dsv3c, Recipe().gradient_amax_floor
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
needs_gpu = pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0")
SIZES = [[1000], [5, 0, 128, 129], [0, 0, 640, 0], [300, 1, 1000, 77, 0, 513]]


def operands(check, sizes, N, K, device):
    offs = check.ends(sizes, device=device)
    columns = (check.varied(sum(sizes), n, device=device) for n in (N, K))
    dyt, xt = (ops.quantize_tile_t(x, offs, FLOOR, False) for x in columns)
    return (*dyt, *xt), offs


def test_accumulation_is_in_place_and_in_float32(check):
    parts, offs = operands(check, [5, 0, 130], 72, 136, "cpu")
    before = torch.randn(3, 72, 136)
    dw = before.clone()
    assert ops.grouped_gemm_wgrad_accumulate(*parts, offs, dw) is None
    assert torch.equal(dw, before + ops.grouped_gemm_wgrad(*parts, offs, torch.float32))
    assert torch.equal(dw[1], before[1])
    dw = before[0].clone()
    ops.gemm_wgrad_accumulate(*parts, dw)
    assert torch.equal(dw, before[0] + ops.gemm_wgrad(*parts, torch.float32))
    for operator in (ops.gemm_wgrad_accumulate, ops.grouped_gemm_wgrad_accumulate):
        assert operator.default._schema.is_mutable


def test_accumulation_survives_functionalization(check):
    """AOTAutograd takes mutations out of a graph and puts them back behind it."""
    parts, _ = operands(check, [128], 64, 64, "cpu")
    dw, expected = torch.zeros(64, 64), torch.zeros(64, 64)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def twice(dw, *parts):
        ops.gemm_wgrad_accumulate(*parts, dw)
        ops.gemm_wgrad_accumulate(*parts, dw)

    twice(dw, *parts)
    for _ in range(2):
        ops.gemm_wgrad_accumulate(*parts, expected)
    assert torch.equal(dw, expected)


@pytest.mark.parametrize(
    ("dw", "complaint"),
    [
        (torch.zeros(64, 64, dtype=torch.bfloat16), "dtype of dw"),
        (torch.zeros(64, 65), "shape of dw"),
        (torch.zeros(64, 128)[:, ::2], "contiguous"),
    ],
)
def test_refuses_other_gradients(check, dw, complaint):
    parts, _ = operands(check, [128], 64, 64, "cpu")
    with pytest.raises(OperatorError, match=complaint):
        ops.gemm_wgrad_accumulate(*parts, dw)


@pytest.mark.parametrize("config", list(implementations("gemm_wgrad")["warp_specialized"].configs())[::3], ids=str)
def test_specialized_compiles_without_spills(config):
    found = offline.resources(specialized.variant(config, offline.F32, True).compile())
    assert found.spills == 0
    assert found.stack_bytes == 0
    assert found.shared_bytes <= 227 * 1024


PROGRAM = """
import sys
from itertools import product
from types import FunctionType, SimpleNamespace

import torch

sys.path.insert(0, sys.argv[1])
import conftest
from gluon_on_cpu import Kernel
from dsv3c.kernels import gemm, wgrad_specialized as specialized
from test_wgrad import operands

specialized._wgrad_specialized_kernel = Kernel(
    specialized.__file__,
    "_wgrad_specialized_kernel",
    _promote=lambda product, row, column, acc: acc + product * (row[:, None] * column),
    swizzle=FunctionType(gemm.swizzle.fn.__code__, {"tl": SimpleNamespace(minimum=min)}),
)
specialized.multiprocessors = lambda: 3
for case, tiles in product(eval(sys.argv[2]), ("drawn", "dealt out")):
    print(case, tiles, file=sys.stderr)
    specialized.DRAWN = 0 if tiles == "drawn" else 1000
    sizes, N, K, dtype, accumulate, config = case
    torch.manual_seed(0)
    (dyt, dyt_scale_inv, xt, xt_scale_inv), offs = operands(conftest, sizes, N, K, "cpu")
    first = torch.tensor([0, *(-(-n // 128) for n in sizes)]).cumsum(0)
    before = torch.randn(len(sizes), N, K).to(dtype) if accumulate else torch.zeros(len(sizes), N, K, dtype=dtype)
    dw = before.clone() if accumulate else torch.full_like(before, torch.nan)
    given = dyt, dyt_scale_inv, xt, xt_scale_inv, first.to(torch.int32)
    specialized.launch(*given, dw, accumulate=accumulate, **config)
    for e, n in enumerate(sizes):
        blocks = slice(int(first[e]), int(first[e + 1]))
        rows = slice(128 * blocks.start, 128 * blocks.stop)
        parts = dyt[:, rows], dyt_scale_inv[:, blocks], xt[:, rows], xt_scale_inv[:, blocks]
        if n == 0:
            assert torch.equal(dw[e], before[e])
        else:
            reference, norm = conftest.product(*parts)
            reference, norm = reference + before[e], norm + before[e].abs().double()
            conftest.assert_product(dw[e], reference, norm, n)
"""


CASES = [
    ([5, 0, 384, 129], 256, 392, torch.bfloat16, False, specialized.KNOWN[0]),
    ([700], 196, 264, torch.float32, False, specialized.KNOWN[1]),
    ([130, 0, 300], 128, 640, torch.float32, True, specialized.KNOWN[0]),
    ([0, 0, 0, 200, 0, 0], 256, 264, torch.bfloat16, False, specialized.KNOWN[1]),
]  # fmt: skip


def test_tiles_and_barriers(interpreted):
    """Threads run the kernel, Triton's interpreter the map of tiles: chosen as Triton is imported, hence a process,
    the same for all cases, which names each as it begins."""
    interpreted(PROGRAM, repr(CASES))


def test_what_is_not_aligned_is_left_to_the_plain_kernel():
    for operator, N, K, groups in (("gemm_wgrad", 130, 256, 1), ("grouped_gemm_wgrad", 192, 256, 4)):
        assert not specialized.takes(Problem(operator, 4096, N, K, groups))


@pytest.mark.parametrize(
    ("groups", "rows", "N", "dtype", "expected", "accumulating"),
    [
        (1, 4096, 256, torch.float32, "cublaslt", "warp_specialized"),  # a library cannot add
        (4, 4096, 256, torch.float32, "warp_specialized", "warp_specialized"),
        (4, 128, 256, torch.bfloat16, "warp_specialized", "warp_specialized"),
        (4, 128, 256, torch.float32, "triton", "triton"),  # the result is the traffic, and written more slowly
        (4, 4096, 192, torch.float32, "triton", "triton"),
        (4, 4096, 256, torch.float64, "triton", "triton"),
    ],
)
def test_which_kernel_by_rule(monkeypatch, groups, rows, N, dtype, expected, accumulating):
    launched = []
    found = {
        name: replace(one, launch=lambda *_, name=name, **config: launched.append((name, config)))
        for operator in ("grouped_gemm_wgrad", "gemm_wgrad")
        for name, one in implementations(operator).items()
    }
    monkeypatch.setattr(specialized, "hopper", lambda: True)
    monkeypatch.setattr(wgrad, "wgrad_cublaslt_takes", lambda problem: True)
    monkeypatch.setattr(wgrad, "implementations", lambda operator: found)
    monkeypatch.setattr(wgrad, "choose", lambda problem: (found[wgrad.default(problem)[0]], wgrad.default(problem)[1]))
    monkeypatch.setattr(wgrad, "start", lambda problem, launch, out, pick, *_: launch(*pick(problem)))
    operator = "gemm_wgrad" if groups == 1 else "grouped_gemm_wgrad"
    dw = torch.empty(groups, N, 256, dtype=dtype)
    for accumulate in (False, True):
        wgrad._launch(Problem(operator, groups * rows, N, 256, groups), (dw.view(-1, 1024),), dw, accumulate)
    assert [name for name, _ in launched] == [expected, accumulating]
    assert "accumulate" not in launched[0][1]
    assert launched[1][1].pop("accumulate")
    assert all(found[name].holds(config) for name, config in launched)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("N", "K"), [(256, 384), (640, 272), (1024, 1024)])
@pytest.mark.parametrize("sizes", SIZES)
def test_same_bits(check, sizes, N, K, dtype, monkeypatch):
    """Every configuration of the specialised kernel, and the plain one's for few rows. Six groups of the last size have
    more tiles than there are multiprocessors."""
    parts, offs = operands(check, sizes, N, K, "cuda")
    _, first = wgrad.tile_map(offs, parts[0].shape[1], 128)
    expected = torch.full((len(sizes), N, K), torch.nan, dtype=dtype, device="cuda")
    wgrad.launch(*parts, first, expected, **wgrad.KNOWN[0])
    for accumulate in (False, True) if dtype == torch.float32 else (False,):
        before = torch.randn(len(sizes), N, K, device="cuda").to(dtype) if accumulate else torch.nan
        runs = [(specialized.launch, c) for c in implementations("gemm_wgrad")["warp_specialized"].configs()]
        runs += [(wgrad.launch, wgrad.KNOWN[1] | {"halves": h, "chunk": c}) for h, c in product((1, 2), (1, 4, 16))]
        for (launch, config), drawn in product(runs, (0, 1000)):
            monkeypatch.setattr(specialized, "DRAWN", drawn)
            dw = torch.full_like(expected, torch.nan)
            if accumulate:
                dw.copy_(before)
            launch(*parts, first, dw, accumulate=accumulate, **config)
            assert torch.equal(dw, before + expected if accumulate else expected), (launch, config)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("N", "K"), [(512, 1024), (130, 200)])
@pytest.mark.parametrize("sizes", SIZES)
def test_accumulates(check, sizes, N, K):
    parts, offs = operands(check, sizes, N, K, "cuda")
    before = torch.randn(len(sizes), N, K, device="cuda")
    dw = before.clone()
    ops.grouped_gemm_wgrad_accumulate(*parts, offs, dw)
    assert torch.equal(dw, before + ops.grouped_gemm_wgrad(*parts, offs, torch.float32))
    dw = before[0].clone()
    ops.gemm_wgrad_accumulate(*parts, dw)
    reference, norm = check.product(*parts)
    check.assert_product(dw - before[0], reference, norm + before[0].abs().double(), sum(sizes))


@pytest.mark.gpu
@needs_gpu
def test_in_a_cuda_graph(check, monkeypatch):
    """Other group sizes after the capture are the ones that count; tiles are drawn anew in each replay."""
    monkeypatch.setattr(specialized, "DRAWN", 0)
    parts, offs = operands(check, [512, 0, 128], 1024, 2048, "cuda")
    dw = torch.zeros(3, 1024, 2048, device="cuda")
    ops.grouped_gemm_wgrad_accumulate(*parts, offs, dw)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.grouped_gemm_wgrad_accumulate(*parts, offs, dw)
    offs.copy_(check.ends([128, 128, 384], device="cuda"))
    before = dw.clone()
    graph.replay()
    assert torch.equal(dw, before + ops.grouped_gemm_wgrad(*parts, offs, torch.float32))
