"""Few rows: splits of the contraction, swapped operands."""

import pytest
import torch

import dsv3c.operators  # noqa: F401
from dsv3c.kernels.implementations import Problem, implementations
from dsv3c.numerics import Recipe

small_gemm = pytest.importorskip("dsv3c.kernels.small_gemm", reason="needs Triton")
offline = pytest.importorskip("dsv3c.kernels.offline", reason="needs Triton")

ops, FLOOR = torch.ops.dsv3c, Recipe().amax_floor
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
needs_gpu = pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0")
# Each value of each knob at least once, for x of up to 16, 32, 64 and 128 rows.
CONFIGS = [
    dict(zip(small_gemm.SPACE, values, strict=True))
    for values in [
        (16, 64, 1, 1, 4, 6),
        (16, 128, 2, 2, 4, 2),
        (32, 128, 1, 2, 8, 3),
        (64, 64, 1, 4, 4, 3),
        (64, 128, 2, 1, 8, 5),
        (64, 128, 1, 1, 4, 8),
        (128, 64, 1, 2, 4, 4),
        (128, 128, 1, 1, 8, 5),
        (64, 64, 1, 1, 8, 12),
    ]
]

PROGRAM = """
import torch, triton
import triton.language as tl
import dsv3c.operators
from dsv3c.kernels import small_gemm
from dsv3c.numerics import Recipe, accumulate_rms

@triton.jit
def promote(product, scale_inv, acc):
    return acc + product * scale_inv

@triton.jit
def nothing():
    pass

small_gemm.promote, small_gemm.gdc_launch_dependents, small_gemm.gdc_wait = promote, nothing, nothing
ops, floor = torch.ops.dsv3c, Recipe().amax_floor
torch.manual_seed(0)
for M, N, K in [(1, 130, 1168), (140, 72, 640), (16, 264, 400)]:
    x = ops.quantize_tile(torch.randn(M, K), floor, False)
    w = ops.quantize_block(torch.randn(N, K), floor, False)
    expected = ops.gemm(*x, *w, torch.float32)
    for config in CONFIGS:
        for splits in (1, 3, 4):
            y = torch.full((M, N), torch.nan)
            small_gemm.launch(*x, *w, y, splits=splits, **config)
            error = (y - expected).double().square().mean().sqrt() / expected.double().square().mean().sqrt()
            assert float(error) <= 2 * accumulate_rms(K, "cpu"), (M, N, K, splits, config, float(error))
"""


def test_indices_and_masks(interpreted):
    """Triton's interpreter, as in `test_indexing.py`: more blocks than splits divide, splits without a block."""
    interpreted(f"CONFIGS = {CONFIGS[1:8]}\n{PROGRAM}")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configurations_compile_without_spills(config):
    assert small_gemm.valid(config)
    found = offline.resources(small_gemm.variant(4, config).compile())
    assert found.spills == 0
    assert found.stack_bytes == 0
    assert found.fp8_mma > 0


def test_each_value_of_each_knob_is_tested():
    for knob, values in small_gemm.SPACE.items():
        assert {config[knob] for config in CONFIGS} == set(values)


def test_takes_few_rows_and_blocks_enough():
    found = implementations("gemm")
    assert found["split_4"].takes(Problem("gemm", 64, 7168, 2048))
    assert not found["split_16"].takes(Problem("gemm", 64, 7168, 2048))
    assert not found["split_4"].takes(Problem("gemm", 4096, 7168, 2048))


@pytest.mark.parametrize("rows", [1, 16, 17, 33, 128])
def test_rule_without_a_table(rows):
    """As many splits as there are multiprocessors for, and a configuration that suits that size."""
    found = implementations("gemm")
    for N, K, splits in [(2112, 7168, 4), (4096, 7168, 2), (7168, 16384, 1), (72, 128, 1), (130, 400, 1)]:
        problem = Problem("gemm", rows, N, K)
        name, config = small_gemm.default(problem)
        assert name == ("few_rows" if splits == 1 else f"split_{splits}")
        assert found[name].takes(problem)
        assert found[name].holds(config)
        assert config["rows"] <= max(16, 2 * rows)
        assert rows <= config["rows"] or (rows > 64 and config["rows"] == 64)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [(1, 130, 1152), (16, 256, 2048), (37, 576, 1408), (64, 2112, 7168), (128, 512, 4096)])
def test_products(check, size):
    """One split has the bits of the plain kernel; the configurations of any number of splits have the same."""
    M, N, K = size
    gemm = pytest.importorskip("dsv3c.kernels.gemm")
    x = ops.quantize_tile(check.varied(M, K, device="cuda"), FLOOR, False)
    w = ops.quantize_block(check.varied(N, K, device="cuda"), FLOOR, False)
    product = check.product(*x, *w)
    plain = torch.full((M, N), torch.nan, device="cuda")
    gemm.launch(*x, *w, plain, **gemm.KNOWN[-1])
    for splits in (1, 2, 3, 4, 7):
        if not small_gemm.takes(splits, Problem("gemm", M, N, K)):
            continue
        first = plain if splits == 1 else None
        for config in CONFIGS:
            for dtype in (torch.float32, torch.bfloat16):
                y = torch.full((M, N), torch.nan, device="cuda", dtype=dtype)
                small_gemm.launch(*x, *w, y, splits=splits, **config)
                check.assert_product(y, *product, K)
                if dtype == torch.float32:
                    first = y if first is None else first
                    assert torch.equal(y, first), (splits, config)


@pytest.mark.gpu
@needs_gpu
def test_in_a_cuda_graph(check):
    """The second kernel waits for the first in a replay too, launch after launch, and takes new operands."""
    x_RK = check.varied(64, 7168, device="cuda")
    x = ops.quantize_tile(x_RK, FLOOR, False)
    w = ops.quantize_block(check.varied(2112, 7168, device="cuda"), FLOOR, False)
    y = torch.empty(64, 2112, device="cuda")

    def run():
        small_gemm.launch(*x, *w, y, splits=4, **CONFIGS[3])

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(50):
        x[0].view(torch.uint8).copy_(x[0].view(torch.uint8).roll(1, 0))
        graph.replay()
        replayed = y.clone()
        run()
        assert torch.equal(replayed, y)
