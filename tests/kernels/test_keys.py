"""Keys and values from one product: against float64, the bits of the product stored plainly, and where the parts go."""

from dataclasses import replace

import pytest
import torch

import dsv3c.operators  # noqa: F401
from dsv3c.numerics import Recipe
from dsv3c.operators import OperatorError

ops = torch.ops.dsv3c
FLOOR = Recipe().amax_floor
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [(1, 1, 1, 128, 64), (2, 35, 3, 257, 8), (1, 300, 5, 512, 64), (3, 43, 130, 64, 24)]  # B, T, H, K, r


def operands(check, B, T, H, K, r, device):
    x = ops.quantize_tile(check.varied(B * T, K, device=device), FLOOR, False)
    w = ops.quantize_block(check.varied(H * 256, K, device=device), FLOOR, False)
    latent = check.varied(B * T, 40 + r, torch.bfloat16, device).unflatten(0, (B, T))
    return *x, *w, latent[..., 40:]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
def test_parts(check, poisoned, size, device):
    B, T, H, K, r = size
    *pairs, rope = operands(check, *size, device)
    out = ops.gemm_keys(*pairs, rope)
    assert out.shape == (B * T, H, 256 + r)
    own, shared, values = out.split((128, r, 128), dim=2)
    assert torch.equal(shared, rope.flatten(0, 1)[:, None].expand_as(shared))
    check.assert_product(torch.cat((own, values), 2).flatten(1), *check.product(*pairs), K)
    again = ops.gemm_keys(*pairs, rope.permute(0, 2, 1).contiguous().permute(0, 2, 1))  # columns that lie apart
    assert torch.equal(again, out)


PROGRAM = """
import sys

import torch

sys.path.insert(0, sys.argv[1])
import conftest
from gluon_on_cpu import specialized_gemm
from dsv3c.kernels import gemm, keys, warp_specialized as ws
from test_keys import operands, ops

ws._warp_specialized_gemm_kernel = specialized_gemm(ws.__file__)
torch.manual_seed(0)
size = eval(sys.argv[2])
gemm.multiprocessors, gemm.hopper = lambda: 3, lambda: True
keys.start = lambda problem, launch, *_: launch(None, ws.KNOWN[0])
*pairs, rope = operands(conftest, *size, "cpu")
expected = ops.gemm_keys(*pairs, rope)
found = torch.full_like(expected, torch.nan)
keys.gemm_keys(*pairs, rope, found)
own, shared, values = found.split((128, size[-1], 128), dim=2)
assert torch.equal(shared, expected[..., 128:-128])
conftest.assert_product(torch.cat((own, values), 2).flatten(1), *conftest.product(*pairs), size[3])
"""


@pytest.mark.parametrize("case", [(2, 70, 3, 272, 8), (1, 140, 2, 128, 64)], ids=str)
def test_places(interpreted, case):
    """Threads run the product's kernel, Triton's interpreter the other: chosen as Triton is imported, hence a
    process."""
    interpreted(PROGRAM, repr(case))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(130, 3, 144, 64), (333, 8, 896, 8), (4100, 16, 512, 64)])
def test_the_bits_of_the_plain_product(check, size):
    """In each configuration; what lies between is left alone."""
    from dsv3c.kernels import gemm, warp_specialized

    R, H, _, r = size
    *pairs, _ = operands(check, 1, *size, "cuda")
    plain = torch.empty(R, H, 256, dtype=torch.bfloat16, device="cuda")
    gemm.launch(*pairs, plain.flatten(1), **gemm.KNOWN[-1])
    for config in warp_specialized.KNOWN:
        found = torch.full((R, H, 256 + r), 3.0, dtype=torch.bfloat16, device="cuda")
        warp_specialized.launch_heads(*pairs, found, **config)
        own, between, values = found.split((128, r, 128), dim=2)
        assert torch.equal(torch.cat((own, values), 2), plain)
        assert bool((between == 3.0).all())


@pytest.mark.gpu
def test_without_the_specialised_kernel(check, monkeypatch):
    from dsv3c.kernels import warp_specialized

    given = operands(check, *SIZES[2], "cuda")
    expected = ops.gemm_keys(*given)
    monkeypatch.setattr(warp_specialized, "takes", lambda problem: False)
    from dsv3c.kernels import keys

    found = torch.full_like(expected, torch.nan)
    keys.gemm_keys(*given, found)
    own, shared, values = found.split((128, 64, 128), dim=2)
    assert torch.equal(shared, expected[..., 128:192])
    check.assert_product(torch.cat((own, values), 2).flatten(1), *check.product(*given[:4]), SIZES[2][3])


@pytest.mark.parametrize("gap", [0, 8, 64])
def test_no_spills(gap):
    pytest.importorskip("triton", reason="compiles kernels")
    from dsv3c.kernels import offline, warp_specialized

    for config in warp_specialized.KNOWN:
        variant = warp_specialized.variant(False, config)
        variant = replace(variant, constants=variant.constants | {"GAP": gap})
        assert offline.resources(variant.compile()).spills == 0


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(check, device):
    assert ops.gemm_keys(*operands(check, 1, 0, 2, 128, 64, device)).shape == (0, 2, 320)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, xs, w, ws, rope: (x, xs, w, ws, rope[:, :3]), "rows of rope: expected 5, found 3"),
        (lambda x, xs, w, ws, rope: (x, xs, w, ws, rope[..., :4]), "columns of rope modulo 8: expected 0, found 4"),
        (lambda x, xs, w, ws, rope: (x, xs, w, ws, rope[0]), "number of dimensions of rope: expected 3, found 2"),
        (lambda x, xs, w, ws, rope: (x, xs, w, ws, rope.float()), "dtype of rope"),
        (lambda x, xs, w, ws, rope: (x, xs, w[:128], ws[:1], rope), "rows of w modulo 256: expected 0, found 128"),
    ],
)
def test_what_is_refused(check, change, message):
    with pytest.raises(OperatorError, match=message):
        ops.gemm_keys(*change(*operands(check, 1, 5, 2, 128, 8, "cpu")))
