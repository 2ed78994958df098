"""The GEMM kernels' indices and masks without a GPU: Triton's interpreter runs them on the CPU, block by block.

Its FP8 products are right; casts to FP8 and inline assembly are not, so the promotion is written out here, and the
casting kernels are left to the GPU tests. The interpreter is chosen as Triton is imported: hence a process of its own.
"""

PROGRAM = """
import torch, triton
import triton.language as tl
import dsv3c.operators
from dsv3c.kernels import gemm, groups, grouped_gemm, wgrad
from dsv3c.numerics import Recipe, accumulate_rms

@triton.jit
def promote(product, scale_inv, acc):
    return acc + product * scale_inv

@triton.jit
def nothing():
    pass

gemm.promote = wgrad.promote = promote
groups.gdc_launch_dependents = nothing
gemm.multiprocessors = lambda: 3

def configs(space, valid):
    # each value of each knob, but for those that the interpreter does not know
    base = {knob: values[0] for knob, values in space.items()}
    others = {knob: values[1:] for knob, values in space.items() if knob not in ("num_warps", "num_stages")}
    found = [base, *(base | {knob: value} for knob, values in others.items() for value in values)]
    return [config for config in found if valid(config)]
ops, floor = torch.ops.dsv3c, Recipe().amax_floor
torch.manual_seed(0)

def same(name, found, expected):
    # float32 sums of the same products in another order: see accumulate_rms
    error = (found.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt()
    assert float(error) <= 2 * accumulate_rms(512, "cpu"), (name, float(error))

for sizes, N, K in [([5, 0, 130, 70], 130, 272), ([0, 200, 0, 3], 256, 128), ([64, 64, 1, 127], 72, 144)]:
    R, E = sum(sizes), len(sizes)
    offs = torch.tensor(sizes).cumsum(0).int()
    x, dy = (ops.quantize_tile(torch.randn(R, n), floor, False) for n in (K, N))
    w = ops.quantize_block(torch.randn(E, N, K), floor, False)
    xt, dyt = (ops.requantize_t(*t, offs, floor, False) for t in (x, dy))
    plain, grouped = ops.gemm(*x, w[0][1], w[1][1], torch.float32), ops.grouped_gemm(*x, *w, offs, torch.float32)
    for config in configs(gemm.SPACE, gemm.valid):
        y = torch.full((R, N), torch.nan)
        gemm.launch(*x, w[0][1], w[1][1], y, **config)
        same(("gemm", config), y, plain)
        y = torch.full((R, N), torch.nan)
        grouped_gemm.launch(*x, *w, offs, y, **config)
        same(("grouped", config), y, grouped)
    expected = ops.grouped_gemm_wgrad(*dyt, *xt, offs, torch.float32)
    tiles, first = groups.tile_map(offs, R, 128)
    assert first.tolist() == [0, *torch.tensor([-(-n // 128) for n in sizes]).cumsum(0).tolist(), 0]
    ends = offs.tolist()
    cut = [(e, row, end) for e, (n, end) in enumerate(zip(sizes, ends)) for row in range(end - n, end, 128)]
    cut.sort(key=lambda tile: sizes[tile[0]] > 128)  # short groups first, else in order
    tiles, counts = groups.tiles_by_length(offs, R, 128)
    assert tiles[:, : len(cut)].T.tolist() == [list(tile) for tile in cut]
    assert counts.tolist() == [len(cut), sum(0 < n <= 128 for n in sizes), 0, 0]
    for config in configs(wgrad.SPACE, gemm.valid):
        dw = torch.full((E, N, K), torch.nan)
        wgrad.launch(*dyt, *xt, first, dw, **config)
        same(("wgrad", config), dw, expected)
    before = torch.randn(E, N, K)
    for config in wgrad.KNOWN:
        dw = before.clone()
        wgrad.launch(*dyt, *xt, first, dw, accumulate=True, **config)
        same(("accumulate", config), dw - before, expected)
"""


def test_indices_and_masks(interpreted):
    interpreted(PROGRAM)
