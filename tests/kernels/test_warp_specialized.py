"""The warp-specialised products: the same bits as the plain kernel's, which test_on_gpu.py holds against float64."""

import re

import pytest
import torch

import dsv3c.operators  # noqa: F401
from dsv3c.kernels.implementations import Problem
from dsv3c.numerics import E4M3, Recipe

ws = pytest.importorskip("dsv3c.kernels.warp_specialized", reason="needs Triton")
from dsv3c.kernels import gemm, grouped_gemm, offline  # noqa: E402

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0")]

ops, FLOOR = torch.ops.dsv3c, Recipe().amax_floor
SHARED_LIMIT = 227 * 1024  # bytes a program may have on sm_90
PLAIN = gemm.KNOWN[-1]
DENSE = [{"band": band} for band in (0, 8, 16)]
CONFIGS = [ws.Config(band, cluster)._asdict() for band, cluster in [(8, 1), (16, 1), (8, 2), (32, 2)]]
# Groups without rows, of one row, of whole tiles, of a whole half and a row more, of more tiles than a band; none with
# rows; and one that is all.
GROUPS = [[5, 0, 128, 67], [0, 320, 0, 0], [64, 65] * 4, [300, 1, 1400, 77, 0, 513], [0, 0, 8], [0, 0], [2100]]


@pytest.mark.parametrize("config", DENSE + CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
def test_main_loop_has_no_spills(config):
    grouped = "cluster" in config
    found = offline.resources(ws.variant(grouped, config).compile())
    assert found.shared_bytes <= SHARED_LIMIT
    assert found.fp8_mma == (16 if grouped else 24)  # two consumers; four products; in the loop, last, and of a part
    assert found.spills == 0
    assert found.stack_bytes == 0  # forms with one took 8 to 10 % longer: registers of the loop shared banks


@pytest.mark.parametrize("config", [DENSE[-1], *CONFIGS[1:3]], ids=lambda config: "-".join(map(str, config.values())))
def test_where_assembly_finds_things(config):
    """Barriers lie at the addresses that they are told by, so all of the first allocation does; and the descriptor of w
    is the parameter whose name the copies have."""
    ptx = ws.variant("cluster" in config, config).compile().asm["ptx"]
    added = dict(re.findall(r"add\.s32 \s*(%r\d+), %r\d+, (\d+);", ptx))
    found = {int(added[register]) for register in re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]", ptx)}
    assert found == {first.value + 8 * i for first in (ws.FULL_AT, ws.EMPTY_AT) for i in range(ws.STAGES.value)}
    parameters = re.findall(r"\.b8 (\w+)\[128\]", ptx)
    assert all(f" {parameters[1]};" in code.value for code in (ws.COPY_W, ws.COPY_W_TO_BOTH))


@pytest.mark.parametrize(("N", "taken"), [(2112, True), (8, True), (7, False), (260, False)])
def test_takes(N, taken, monkeypatch):
    monkeypatch.setattr(gemm, "hopper", lambda: True)
    assert ws.takes(Problem("gemm", 1, N, 128)) == taken


PROGRAM = """
import sys

import torch

sys.path.insert(0, sys.argv[1])
import conftest
from gluon_on_cpu import specialized_gemm
from dsv3c.kernels import gemm, warp_specialized as ws
from test_warp_specialized import GROUPS, operands

ws._warp_specialized_gemm_kernel = specialized_gemm(ws.__file__)
for case in eval(sys.argv[2]):
    print(case, file=sys.stderr)
    sizes, N, K, config, programs = case
    torch.manual_seed(0)
    gemm.multiprocessors = lambda: programs
    E = len(sizes) if isinstance(sizes, list) else None
    rows = sum(sizes) + 3 if E else sizes
    given = operands(conftest, rows, N, K, E, device="cpu")
    y = torch.full((rows, N), 7.0, dtype=torch.bfloat16)
    if E:
        ws.launch_grouped(*given, conftest.ends(sizes), y, **config)
    else:
        ws.launch(*given, y, **config)
    x, x_scale_inv, w, w_scale_inv = given
    start = 0
    for e, n in enumerate(sizes if E else [rows]):
        mine = slice(start, start + n)
        if n:
            weight = (w[e], w_scale_inv[e]) if E else (w, w_scale_inv)
            conftest.assert_product(y[mine], *conftest.product(x[mine], x_scale_inv[mine], *weight), K)
        start += n
    assert bool((y[start:] == 7.0).all()), "rows of no group are written"
"""


CASES = [
    (200, 264, 400, DENSE[1], 3),  # of four tiles, one in parts
    (140, 72, 64, DENSE[0], 3),
    (140, 576, 640, DENSE[1], 7),  # six tiles
    (500, 520, 256, DENSE[2], 9),  # of twelve tiles, three in parts
    ([5, 0, 130, 70], 264, 272, CONFIGS[1], 3),
    ([0, 200, 0, 3, 64], 256, 384, CONFIGS[3], 2),
    ([300, 1, 77, 0, 129], 136, 128, CONFIGS[2], 4),
    ([20, 0, 150, 65, 33], 328, 512, CONFIGS[0], 3),
    ([3, 1, 130, 2, 1, 1, 5], 256, 384, CONFIGS[0], 1),  # from (e, 1) to (e + 1, 0)
    ([20, 30, 150, 65, 33, 7], 392, 256, CONFIGS[0], 5),  # three of them begin with short groups
]  # fmt: skip


def test_tiles_tickets_and_barriers(interpreted):
    """Threads run the kernel, Triton's interpreter the map of tiles: chosen as Triton is imported, hence a process,
    the same for all cases, which names each as it begins."""
    interpreted(PROGRAM, repr(CASES))


@pytest.fixture(params=CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
def config(request):
    return request.param


@pytest.fixture(params=DENSE, ids=lambda config: f"{config['band']}")
def dense(request):
    return request.param


def operands(check, rows: int, N: int, K: int, experts: int | None = None, device: str = "cuda"):
    w = check.varied((experts or 1) * N, K, device=device)
    x = ops.quantize_tile(check.varied(rows, K, device=device), FLOOR, False)
    return *x, *ops.quantize_block(w if experts is None else w.view(experts, N, K), FLOOR, False)


def poisoned(rows: int, columns: int, dtype=torch.bfloat16):
    return torch.full((rows, columns), torch.nan, dtype=dtype, device="cuda")


def same_bits(a, b) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class TestOnGpu:
    pytestmark = on_gpu

    # the last has more tiles than there are multiprocessors, of any width
    @pytest.mark.parametrize(
        "size",
        [
            (1, 8, 16),
            (130, 264, 144),
            (64, 2112, 128),
            (333, 576, 896),
            (1024, 192, 257),
            (4090, 4096, 640),
            (5000, 3000, 64),
        ],
    )
    def test_gemm(self, check, size, dense):
        rows, N, K = size
        given = operands(check, rows, N, K)
        expected, found = poisoned(rows, N), poisoned(rows, N)
        gemm.launch(*given, expected, **PLAIN)
        ws.launch(*given, found, **dense)
        assert same_bits(found, expected)

    @pytest.mark.parametrize(("N", "K"), [(256, 384), (136, 272), (72, 100), (4096, 512)])
    @pytest.mark.parametrize("sizes", GROUPS)
    def test_grouped(self, check, sizes, N, K, config):
        rows = sum(sizes) + 3  # 3 rows of no group
        given = *operands(check, rows, N, K, len(sizes)), check.ends(sizes, device="cuda")
        expected, found = poisoned(rows, N), poisoned(rows, N)
        grouped_gemm.launch(*given, expected, **PLAIN)
        ws.launch_grouped(*given, found, **config)
        assert same_bits(found, expected)  # so what is of no group still holds NaN

    def test_one_program_computes_all_tiles(self, check, config, monkeypatch):
        """In order, so from the last columns of one group it goes to the first of the next."""
        rows, K = 40 * 100, 512
        given = *operands(check, rows, 256, K, 40), check.ends([100] * 40, device="cuda")
        expected, found = poisoned(rows, 256), poisoned(rows, 256)
        grouped_gemm.launch(*given, expected, **PLAIN)
        monkeypatch.setattr(gemm, "multiprocessors", lambda: 1)
        ws.launch_grouped(*given, found, **config)
        assert same_bits(found, expected)

    @pytest.mark.parametrize("K", [64, 1280, 2112])  # half a block, whole ones, whole ones and a half
    def test_against_float64(self, check, K):
        x, x_scale_inv, w, w_scale_inv = given = operands(check, 300, 392, K)
        for dtype in (torch.bfloat16, torch.float32):
            y = poisoned(300, 392, dtype)
            ws.launch(*given, y, **DENSE[-1])
            check.assert_product(y, *check.product(x, x_scale_inv, w, w_scale_inv), K)

    def test_nan_stays_in_its_row_and_column(self, check, dense):
        x, x_scale_inv, w, w_scale_inv = operands(check, 200, 264, 256)
        x.view(torch.uint8)[70, 3] = w.view(torch.uint8)[140, 200] = 0x7F
        y = poisoned(200, 264).zero_()
        ws.launch(x, x_scale_inv, w, w_scale_inv, y, **dense)
        expected = torch.zeros(200, 264, dtype=torch.bool, device="cuda")
        expected[70], expected[:, 140] = True, True
        assert torch.equal(y.isnan(), expected)

    @pytest.mark.parametrize("K", [128, 384])
    def test_operands_of_any_alignment(self, check, K, dense):
        """Rows of a larger tensor, scales that begin anywhere, a transposed weight's scales."""
        x, x_scale_inv, w, w_scale_inv = operands(check, 201, 256, K)
        expected, found = poisoned(200, 256), poisoned(200, 256)
        given = x[1:], x_scale_inv[1:], w, w_scale_inv.T.contiguous().T
        gemm.launch(*(t.clone() for t in given), expected, **PLAIN)
        ws.launch(*given, found, **dense)
        assert same_bits(found, expected)

    def test_more_elements_than_32_bits_count(self, check):
        """y has 2.3e9 elements; the last group's last tile is stored with a mask."""
        rows, N = 70_001, 32_768
        x = torch.randn(rows, 128, device="cuda").to(E4M3)
        w = torch.randn(2, N, 128, device="cuda").to(E4M3)
        x_scale_inv, w_scale_inv = torch.ones(rows, 1, device="cuda"), torch.ones(2, N // 128, 1, device="cuda")
        y = torch.empty(rows, N, dtype=torch.bfloat16, device="cuda")
        ws.launch_grouped(x, x_scale_inv, w, w_scale_inv, check.ends([7, rows - 7], "cuda"), y, **CONFIGS[-1])
        for i, e in ((6, 0), (7, 1), (rows - 130, 1), (rows - 1, 1)):
            expected = poisoned(1, N)
            gemm.launch(x[i : i + 1].clone(), x_scale_inv[i : i + 1], w[e], w_scale_inv[e], expected, **PLAIN)
            assert same_bits(y[i : i + 1], expected)

    def test_in_a_cuda_graph(self, check, config):
        """Groups that change after the capture are the ones that count."""
        offs = check.ends([100, 28], device="cuda")
        given = *operands(check, 128, 256, 256, 2), offs
        y, expected = poisoned(128, 256), poisoned(128, 256)
        ws.launch_grouped(*given, y, **config)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ws.launch_grouped(*given, y, **config)
        offs.copy_(check.ends([3, 125], device="cuda"))
        graph.replay()
        grouped_gemm.launch(*given, expected, **PLAIN)
        assert same_bits(y, expected)
