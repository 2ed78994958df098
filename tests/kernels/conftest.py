"""Inputs that can fail, and oracles written from the definition rather than from the code."""

import os
import subprocess
import sys
import zlib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv3c import numerics
from dsv3c.kernels.reference import casts as reference


def pytest_addoption(parser):
    parser.addoption("--one-case", action="store_true", help="one case of each test, for compute-sanitizer")


@pytest.hookimpl(trylast=True)  # of the tests that -m and -k left
def pytest_collection_modifyitems(config, items):
    if config.getoption("one_case", default=False):  # there is no such option unless this folder was asked for
        cases: dict[str, list] = {}
        for item in items:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        items[:] = [found[len(found) // 2] for found in cases.values()]


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that must be written holds NaN before."""
    new_empty = torch.Tensor.new_empty

    def filled(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return out.view(torch.uint8).fill_(0xFF).view(out.dtype) if out.is_contiguous() and out.numel() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    if torch.cuda.is_available():
        replay = import_module("dsv3c.kernels.replay")
        empty = replay._empty

        def filled_storage(*spec):
            out = empty(*spec)
            out.untyped_storage().fill_(0xFF)
            return out

        monkeypatch.setattr(replay, "_empty", filled_storage)


@pytest.fixture(autouse=True)
def _replayed(request, monkeypatch):
    """On a GPU a result is that of the third call with a signature: replayed, if the launcher can be. The first two are
    on copies, since an operator may write to its arguments."""
    if not request.node.get_closest_marker("gpu") or not torch.cuda.is_available():
        return
    replay = import_module("dsv3c.kernels.replay").Replay
    call, asked = replay.__call__, set()

    def third(self, *args):
        if self not in asked:  # what another test patched is forgotten
            asked.add(self)
            self.ways.clear()
        if sum(x.nbytes for x in args if isinstance(x, Tensor)) < 1 << 30:
            for _ in range(2):
                call(self, *[x.clone() if isinstance(x, Tensor) else x for x in args])
        return call(self, *args)

    monkeypatch.setattr(replay, "__call__", third)


def varied(rows: int, columns: int, dtype=torch.float32, device="cpu") -> Tensor:
    """Normal numbers; each 128×128 block and each row has its own magnitude, or an index error could go unseen."""
    x = torch.randn(rows, columns, device=device)
    x *= torch.exp2(torch.randint(-3, 4, (rows, 1), device=device))
    blocks = torch.exp2(torch.randint(-4, 5, (-(-rows // 128), -(-columns // 128)), device=device).float())
    return (x * blocks.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]).to(dtype)


def ends(sizes: list[int], device="cpu") -> Tensor:
    return torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)


def wide(scale_inv: Tensor, rows: int, columns: int) -> Tensor:
    """Scales, one for each element, in float64; of tiles if there are as many scale rows as rows, else of blocks."""
    x = scale_inv.double().repeat_interleave(128, 1)[:, :columns]
    return x if len(scale_inv) == rows else x.repeat_interleave(128, 0)[:rows]


def product(x: Tensor, x_scale_inv: Tensor, w: Tensor, w_scale_inv: Tensor) -> tuple[Tensor, Tensor]:
    """x wᵀ in float64, and sqrt(Σ x²w²) (`norm` in numerics.py)."""
    x = x.double() * wide(x_scale_inv, *x.shape)
    w = w.double() * wide(w_scale_inv, *w.shape)
    return x @ w.T, (x.square() @ w.square().T).sqrt()


def assert_product(out: Tensor, reference: Tensor, norm: Tensor, contraction: int) -> None:
    element, rms = numerics.gemm_bounds(reference, norm, out.dtype, contraction)
    error = (out.double() - reference).abs()
    assert bool((error <= element).all()), f"worst {float((error / element).nan_to_num(torch.inf).max()):.3g} × bound"
    found = float((error / norm).square()[norm > 0].mean().sqrt())
    assert found <= rms, f"RMS {found:.3g}, bound {rms:.3g}"


def assert_tiles_between(
    found: tuple[Tensor, Tensor], low: Tensor, high: Tensor, amax_floor: float, pow2: bool, certain: float = 0.98
) -> None:
    """1×128 tiles of some x between BF16 low and high, its scale_inv between those of the tile's least and largest
    amax, and each value between low and high divided by that scale_inv: equal to the definition where there is but one
    choice, which is so for the share `certain` of the values at least, or the test would say little."""
    q, scale_inv = found
    low, high = low.float(), high.float()
    smallest = torch.where((low < 0) & (high > 0), 0.0, torch.minimum(low.abs(), high.abs()))
    least, largest = (
        reference._quantize_rows(magnitude, amax_floor, pow2)[1]
        for magnitude in (smallest, torch.maximum(low.abs(), high.abs()))
    )
    assert bool(((least <= scale_inv) & (scale_inv <= largest)).all()), "scale_inv is out of its bounds"
    each = scale_inv.repeat_interleave(128, 1)[:, : q.shape[1]]
    least, largest = (reference._to_fp8(x, each).float() for x in (low, high))
    wrong = ~((least <= q.float()) & (q.float() <= largest))
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} values are out of their bounds"
    assert float((least == largest).float().mean()) >= certain


def near_ties() -> list[tuple[float, float, float]]:
    """Dividend, divisor from 1 to 2, tie of E4M3 from 1 to 2: all float32 quotients that come within 2^-43 of where
    rounding to float32 begins to give the tie.

    With 24 bits of divisor and dividend, and a tie t of T/16, t·(1 ± 2^-24)·divisor is a multiple of 2^20 units plus or
    minus the divisor's bits: as close to a number of 24 bits as the divisor is to a multiple of 2^20 units, at best.
    """
    found = []
    for bits in range(1 << 23, (1 << 24) + 1, 1 << 20):
        for divisor in range(max(bits - 64, 1 << 23), min(bits + 65, 1 << 24)):
            for odd in range(1, 32, 2):
                for below in (0, 1):
                    shift = 24 + (below and odd == 1)  # the spacing below a power of two is half as wide
                    edge = ((odd << shift - odd.bit_length() + 1) + (-1 if below else 1)) * divisor
                    unit = 1 << edge.bit_length() - 24
                    if min(edge % unit, -edge % unit) << 24 <= unit << 7:
                        tie = odd / (1 << odd.bit_length() - 1)
                        dividends = (edge // unit * unit, edge // unit * unit + unit)
                        found += [(x * 2.0 ** -(shift + 23), divisor * 2.0**-23, tie) for x in dividends]
    return found


def e5m6_ties(device="cpu") -> Tensor:
    """Every number of E5M6, every tie of two, and what is next to it; both signs; in tiles whose scale_inv is 1."""
    numbers = (torch.arange(0x7C0, dtype=torch.int16) << 4).view(torch.float16).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    below, above = (torch.nextafter(ties, torch.full_like(ties, end)) for end in (0.0, torch.inf))
    values = torch.cat((numbers, ties, below, above))
    values = torch.cat((values, -values, values[: -2 * len(values) % 127])).view(-1, 127)
    return torch.cat((torch.full((len(values), 1), 65024.0), values), 1).to(device)


def transposed(x: Tensor, sizes: list[int] | None) -> Tensor:
    """xᵀ with each group of rows padded to a multiple of 128, as `quantize_tile_t` lays it out."""
    R, K = x.shape
    out = x.new_zeros(K, -(-R // 128) * 128 + 128 * len(sizes or ()))
    start = first = 0
    for n in [R] if sizes is None else sizes:
        out[:, first : first + n] = x[start : start + n].T
        start, first = start + n, first - (-n // 128) * 128
    return out


# The interpreter puts its own operators into Triton's language at each call of a device function, too: once a launch
# and module will do, and takes a third of the time off.
PATCH_ONCE = """
from triton.runtime import interpreter

def patch_once(fn, patch=interpreter._patch_lang):
    if id(fn.__globals__) in patched:
        return interpreter._LangPatchScope()
    patched.add(id(fn.__globals__))
    return patch(fn)

def restore_all(scope, restore=interpreter._LangPatchScope.restore):
    patched.clear()
    restore(scope)

patched = set()
interpreter._patch_lang, interpreter._LangPatchScope.restore = patch_once, restore_all
"""


@pytest.fixture
def interpreted():
    """interpreted(program, *arguments): runs it with Triton's interpreter, chosen as Triton is imported: hence in a
    process of its own. sys.argv[1] is this folder."""
    pytest.importorskip("triton", minversion="3.7", reason="3.6's interpreter fails with numpy from 2.4 on")

    def run(program, *arguments):
        command = [sys.executable, "-P", "-c", f"{PATCH_ONCE}\n{program}", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    return run


@pytest.fixture
def check():
    """The helpers above, for test files, which cannot import a conftest."""

    class Check:
        varied = staticmethod(varied)
        ends = staticmethod(ends)
        product = staticmethod(product)
        assert_product = staticmethod(assert_product)
        assert_tiles_between = staticmethod(assert_tiles_between)
        transposed = staticmethod(transposed)
        e5m6_ties = staticmethod(e5m6_ties)
        near_ties = staticmethod(near_ties)

    return Check
