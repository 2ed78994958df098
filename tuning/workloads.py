"""A problem's operands on this machine, and what its result must be: float64 on the same quantised operands.

Letters: M rows, N columns of the result, K contracted; E groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import dsv3c.operators  # noqa: F401
from dsv3c.errors import TuneError
from dsv3c.kernels.implementations import Problem
from dsv3c.numerics import TILE, Recipe, gemm_bounds

ops = torch.ops.dsv3c
FLOOR = Recipe().amax_floor


@dataclass(frozen=True)
class Workload:
    """Operands of an implementation's launch, its result, and what raises AssertionError when that is wrong."""

    operands: tuple[Tensor, ...]
    out: Tensor
    check: Callable[[], None]


def flops_and_bytes(problem: Problem) -> tuple[int, int]:
    """What it costs at least: two operations a product; every operand and the result, as `make` has it, once."""
    _, rows, N, K, groups = problem
    flops = 2 * rows * N * K
    if problem.operator.endswith("wgrad"):
        return flops, rows * (N + K) + (4 if groups == 1 else 2) * groups * N * K
    return flops, rows * K + groups * N * K + 2 * rows * N


def make(problem: Problem, device: str = "cuda") -> Workload:
    """Random normal operands. Results are BF16, of a dense weight gradient float32. Groups are as equal as can be, of a
    weight gradient as a router without balance makes them, since another number of blocks is what takes time there.

    Raises:
        TuneError: an operator that has no workload.
    """
    if problem.operator not in _MAKERS:
        raise TuneError(f"operator: expected one of {', '.join(_MAKERS)}, found {problem.operator}")
    return _MAKERS[problem.operator](problem, device)


def _normal(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)


def _gemm(problem: Problem, device: str) -> Workload:
    _, M, N, K, _ = problem
    x = ops.quantize_tile(_normal(device, M, K), FLOOR, False)
    w = ops.quantize_block(_normal(device, N, K), FLOOR, False)
    out = torch.empty(M, N, dtype=torch.bfloat16, device=device)
    return Workload((*x, *w), out, Closeness([(out, (*x, *w))]))


def _grouped_gemm(problem: Problem, device: str) -> Workload:
    _, M, N, K, E = problem
    x = ops.quantize_tile(_normal(device, M, K), FLOOR, False)
    w = ops.quantize_block(_normal(device, E, N, K), FLOOR, False)
    offs, out = _ends(M, E, device), torch.empty(M, N, dtype=torch.bfloat16, device=device)
    parts, ends = [], [0, *offs.tolist()]
    for e in sorted({0, E // 2, E - 1}):
        mine = slice(ends[e], ends[e + 1])
        if mine.start < mine.stop:
            parts.append((out[mine], (x[0][mine], x[1][mine], w[0][e], w[1][e])))
    return Workload((*x, *w, offs), out, Closeness(parts))


def _gemm_wgrad(problem: Problem, device: str) -> Workload:
    _, M, N, K, _ = problem
    dyt, xt = (ops.quantize_tile_t(_normal(device, M, n), None, FLOOR, False) for n in (N, K))
    out = torch.empty(N, K, dtype=torch.float32, device=device)
    return Workload((*dyt, *xt), out, Closeness([(out, (*dyt, *xt))]))


def _grouped_gemm_wgrad(problem: Problem, device: str) -> Workload:
    _, M, N, K, E = problem
    chosen = torch.randint(E, (M,), generator=torch.Generator().manual_seed(0))
    offs = torch.bincount(chosen, minlength=E).cumsum(0).to(device, torch.int32)
    dyt, xt = (ops.quantize_tile_t(_normal(device, M, n), offs, FLOOR, False) for n in (N, K))
    out = torch.empty(E, N, K, dtype=torch.bfloat16, device=device)
    parts, ends = [], [0, *(offs.diff(prepend=offs.new_zeros(1)) + TILE - 1).div(TILE, rounding_mode="floor").cumsum(0)]
    for e in sorted({0, E // 2, E - 1}):
        tiles = slice(int(ends[e]), int(ends[e + 1]))
        mine = slice(TILE * tiles.start, TILE * tiles.stop)
        if tiles.start < tiles.stop:
            parts.append((out[e], (dyt[0][:, mine], dyt[1][:, tiles], xt[0][:, mine], xt[1][:, tiles])))
    return Workload((*dyt, *xt, offs), out, Closeness(parts))


_MAKERS = {
    "gemm": _gemm,
    "gemm_wgrad": _gemm_wgrad,
    "grouped_gemm": _grouped_gemm,
    "grouped_gemm_wgrad": _grouped_gemm_wgrad,
}


def _ends(rows: int, groups: int, device: str) -> Tensor:
    """Of groups as equal as can be."""
    return (torch.arange(1, groups + 1, device=device) * rows // groups).to(torch.int32)


class Closeness:
    """That each `out` is x wᵀ, within the bounds of `numerics.gemm_bounds`. The float64 product is computed once."""

    def __init__(self, parts: list[tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]]):
        self._parts = [(out, *_expected(out, *operands)) for out, operands in parts]

    def __call__(self) -> None:
        for out, expected, norm, element, rms in self._parts:
            error = (out.double() - expected).abs()
            found = float((error / norm).square()[norm > 0].mean().sqrt())
            if not bool((error <= element).all()) or not found <= rms:
                raise AssertionError(f"beyond the bound: RMS {found:.3g}, bound {rms:.3g}")


def close(out: Tensor, x: Tensor, x_scale_inv: Tensor, w: Tensor, w_scale_inv: Tensor) -> None:
    """`Closeness`, once."""
    Closeness([(out, (x, x_scale_inv, w, w_scale_inv))])()


def _expected(
    out: Tensor, x: Tensor, x_scale_inv: Tensor, w: Tensor, w_scale_inv: Tensor
) -> tuple[Tensor, Tensor, Tensor, float]:
    x, w = _dequantized(x, x_scale_inv), _dequantized(w, w_scale_inv)
    expected, norm = x @ w.T, (x.square() @ w.square().T).sqrt()
    return expected, norm, *gemm_bounds(expected, norm, out.dtype, x.shape[1])


def _dequantized(q: Tensor, scale_inv: Tensor) -> Tensor:
    """Of tiles if there are as many rows of scales as of values, else of blocks."""
    each = scale_inv.double().repeat_interleave(TILE, 1)[:, : q.shape[1]]
    return q.double() * (each if len(each) == len(q) else each.repeat_interleave(TILE, 0)[: len(q)])
