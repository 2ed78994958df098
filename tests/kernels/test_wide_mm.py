"""Logits: BF16 operands, float32 sums."""

from types import SimpleNamespace

import pytest
import torch

import dsv3c.operators  # noqa: F401
from dsv3c import numerics

wide_mm = pytest.importorskip("dsv3c.kernels.wide_mm", reason="needs Triton")
launch = pytest.importorskip("dsv3c.kernels.launch", reason="needs Triton")
offline = pytest.importorskip("dsv3c.kernels.offline", reason="needs Triton")

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
needs_gpu = pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0")

PROGRAM = """
import torch, triton
import triton.language as tl
from dsv3c.kernels import wide_mm
from dsv3c.numerics import wide_mm_bounds

@triton.jit
def nothing():
    pass

wide_mm.gdc_launch_dependents = wide_mm.gdc_wait = nothing
torch.manual_seed(0)
for multiprocessors in (1, 7, 22):
    wide_mm.multiprocessors = lambda: multiprocessors
    for M, N, K in [(1, 8, 136), (130, 40, 1160), (300, 256, 200)]:
        a, b = torch.randn(M, K + 8)[:, :K], torch.randn(N, K)  # the interpreter multiplies BF16 numbers as integers
        out = torch.full((M, N), torch.nan)
        wide_mm._launch(a, b, out)
        reference, norm = a.double() @ b.mT.double(), (a.double().square() @ b.mT.double().square()).sqrt()
        element, _ = wide_mm_bounds(reference, norm, out.dtype, K)
        assert bool(((out.double() - reference).abs() <= element).all()), (M, N, K, multiprocessors)
"""


def test_indices_and_masks(interpreted):
    """Triton's interpreter: one split, splits that the blocks do not divide into, more than are added at once."""
    interpreted(PROGRAM)


@pytest.mark.parametrize("variant", [*wide_mm.variants()], ids=lambda variant: variant.name)
def test_compiles_without_spills(variant):
    found = offline.resources(variant.compile())
    assert found.stack_bytes == 0


def test_few_rows_compile_what_many_take(monkeypatch):
    """Once for each width and device, and compute by the library."""
    launches, products = [], []
    aten = SimpleNamespace(mm=SimpleNamespace(dtype_out=lambda *args, out: products.append(len(out))))
    monkeypatch.setattr(wide_mm, "_launch", lambda a, b, out: launches.append((len(a), launch._here.compiling)))
    monkeypatch.setattr(wide_mm, "hopper", lambda: True)
    monkeypatch.setattr(wide_mm, "_compiled", set())
    monkeypatch.setattr(launch._here, "compiling", False, raising=False)
    monkeypatch.setattr(wide_mm, "torch", SimpleNamespace(float32=torch.float32, ops=SimpleNamespace(aten=aten)))
    for rows, columns in ((4, 8), (4, 8), (300, 8), (600, 8), (4, 256)):
        a, b = (torch.zeros(n, 64, dtype=torch.bfloat16) for n in (rows, columns))
        wide_mm.wide_mm(a, b.mT, torch.float32, torch.empty(rows, columns))
    assert launches == [(4, True), (600, False), (4, True)]
    assert products == [4, 4, 300, 4]


def product(M: int, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a, b = (torch.randn(rows, K + 8, device="cuda").bfloat16()[:, :K] for rows in (M, N))
    return a, b.mT


def assert_right(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    a, b = a.double(), b.double()
    reference, norm = a @ b, (a.square() @ b.square()).sqrt()
    element, rms = numerics.wide_mm_bounds(reference, norm, out.dtype, a.shape[1])
    error = (out.double() - reference).abs()
    assert bool((error <= element).all())
    assert float((error / norm).square().mean().sqrt()) <= rms


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "size",
    [
        (4096, 256, 7168),
        (4096, 8, 7168),
        (1, 256, 7168),
        (64, 72, 1032),
        (513, 72, 1032),
        (3001, 17, 136),
        (20000, 256, 512),
    ],
    ids=str,
)
def test_logits(size):
    a, b = product(*size)
    assert wide_mm._takes(a, b)
    out = torch.ops.dsv3c.wide_mm(a, b, torch.float32)
    assert_right(out, a, b)
    for _ in range(3):
        assert torch.equal(torch.ops.dsv3c.wide_mm(a, b, torch.float32), out)


@pytest.mark.gpu
@needs_gpu
def test_what_the_library_computes():
    """Many columns, a contraction off 16 bytes, operands the other way round, and nothing at all."""
    for a, b in (product(100, 300, 264), product(100, 30, 262), (product(96, 8, 64)[0].mT, product(8, 40, 96)[1])):
        assert not wide_mm._takes(a, b)
        assert_right(torch.ops.dsv3c.wide_mm(a, b, torch.float32), a, b)
    a, b = product(0, 8, 64)
    assert torch.ops.dsv3c.wide_mm(a, b, torch.float32).shape == (0, 8)


@pytest.mark.gpu
@needs_gpu
def test_in_a_cuda_graph():
    """The second kernel waits for the first in a replay too, and takes new operands."""
    a, b = product(200, 256, 4096)
    for _ in range(3):
        torch.ops.dsv3c.wide_mm(a, b, torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.dsv3c.wide_mm(a, b, torch.float32)
    for _ in range(5):
        a.normal_()
        graph.replay()
        assert_right(out, a, b)
