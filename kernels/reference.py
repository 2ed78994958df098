"""The definition of every dsv3c operator, in plain PyTorch. These run on the CPU and are what the GPU kernels must
equal:
casts bit for bit, products within `numerics.gemm_bounds`.

Shapes: R rows (tokens), K and N features, E experts, P rows padded to tiles of 128 (see `quantize_tile_t_ref`), G =
⌈K/128⌉. All FP8 is E4M3 and all scale_inv float32; scale_inv multiplies to dequantise. `offs` is int32 [E]: the end
row of each group, as in `torch.nn.functional.grouped_mm`. Rows from offs[-1] on belong to no group: no result depends
on them.

Scales of 1×128 tiles are stored column-major, strides (1, R): a GEMM reads one K-block of many rows at a time, which
is then contiguous, and it is the layout that cuBLASLt takes. Casts compute in float32 whatever the input; products
accumulate in float32, or in float64 when that is the output's dtype.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv3c.numerics import E4M3, E4M3_MAX, TILE, ceil_div, round_up


def _scale_inv(amax: Tensor, amax_floor: float, pow2: bool) -> Tensor:
    # By a tensor: CUDA divides by a number as a product with its reciprocal, which rounds differently.
    scale_inv = amax.clamp(min=amax_floor) / amax.new_full((), E4M3_MAX)
    if pow2:  # the next power of two: carry a nonzero mantissa into the exponent, then clear it
        bits = (scale_inv.view(torch.int32) + 0x7FFFFF) & 0x7F800000
        scale_inv = torch.where(scale_inv.isfinite(), bits.view(torch.float32), scale_inv)
    return scale_inv


def _to_fp8(x: Tensor, scale_inv: Tensor) -> Tensor:
    # Clamped first: beyond 448 the cast gives NaN in torch 2.11 and saturates in 2.13.
    return (x / scale_inv).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def _quantize_rows(x_RK: Tensor, amax_floor: float, pow2: bool) -> tuple[Tensor, Tensor]:
    """1×128 tiles along the last dimension, scales row-major."""
    R, K = x_RK.shape
    G = ceil_div(K, TILE)
    x_RG128 = pad(x_RK.float(), (0, -K % TILE)).view(R, G, TILE)
    scale_inv_RG = _scale_inv(x_RG128.abs().amax(-1), amax_floor, pow2)
    x_fp8 = _to_fp8(x_RG128, scale_inv_RG[:, :, None]).view(R, G * TILE)[:, :K]
    return x_fp8.clone(memory_format=torch.contiguous_format), scale_inv_RG


def _column_major(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[::-1]).t().copy_(x)  # contiguous() would keep the strides of a single column


def quantize_tile_ref(x_RK: Tensor, amax_floor: float, pow2: bool) -> tuple[Tensor, Tensor]:
    """x_fp8 [R, K] and scale_inv [R, G], strides (1, R): tiles of 1×128 along K.

    amax = max(max|x|, amax_floor); scale_inv = amax/448, rounded up to a power of two if pow2; q = x/scale_inv to E4M3.
    A NaN in a tile makes the whole tile NaN.
    """
    x_fp8, scale_inv = _quantize_rows(x_RK, amax_floor, pow2)
    return x_fp8, _column_major(scale_inv)


def padded_rows(rows: int, groups: int | None) -> int:
    """P: rows of the transposed, tiled layout. One bound for every routing, so that it needs no device value."""
    return round_up(rows, TILE) + TILE * (groups or 0)


def quantize_tile_t_ref(x_RK: Tensor, offs: Tensor | None, amax_floor: float, pow2: bool) -> tuple[Tensor, Tensor]:
    """xᵀ_fp8 [K, P] and scale_inv [K, P/128], strides (1, K): tiles of 128 along the rows, for weight gradients.

    Without offs, P = round_up(R, 128). With offs, every group starts at a multiple of 128: group e at
    Σ_{i<e} round_up(n_i, 128), and P = round_up(R, 128) + 128·E. The rest is zero.
    """
    R, K = x_RK.shape
    x_KP = x_RK.new_zeros(K, padded_rows(R, None if offs is None else len(offs)))
    if offs is None:
        x_KP[:, :R] = x_RK.t()
    else:
        start = first = 0
        for end in offs.tolist():
            x_KP[:, first : first + end - start] = x_RK[start:end].t()
            first += round_up(end - start, TILE)
            start = end
    xt_fp8, scale_inv = _quantize_rows(x_KP, amax_floor, pow2)
    return xt_fp8, _column_major(scale_inv)


def requantize_t_ref(
    x_fp8_RK: Tensor, x_scale_inv_RG: Tensor, offs: Tensor | None, amax_floor: float, pow2: bool
) -> tuple[Tensor, Tensor]:
    """`quantize_tile_t` of the dequantised x: the activation that forward saved, retiled for the weight gradient."""
    return quantize_tile_t_ref(_dequantize(x_fp8_RK, x_scale_inv_RG), offs, amax_floor, pow2)


def quantize_block_ref(w_NK: Tensor, amax_floor: float, pow2: bool) -> tuple[Tensor, Tensor]:
    """w_fp8 [.., N, K] and scale_inv [.., ⌈N/128⌉, ⌈K/128⌉], both contiguous: blocks of 128×128, ragged ones
    zero-padded."""
    *batch, N, K = w_NK.shape
    rows, columns = ceil_div(N, TILE), ceil_div(K, TILE)
    w = pad(w_NK.float(), (0, -K % TILE, 0, -N % TILE)).view(*batch, rows, TILE, columns, TILE)
    scale_inv = _scale_inv(w.abs().amax((-3, -1)), amax_floor, pow2)
    w_fp8 = _to_fp8(w, scale_inv[..., :, None, :, None]).view(*batch, rows * TILE, columns * TILE)[..., :N, :K]
    return w_fp8.clone(memory_format=torch.contiguous_format), scale_inv


def dequantize_block_ref(w_fp8_NK: Tensor, w_scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """w_fp8 · scale_inv of its 128×128 block, in `dtype`; [.., N, K]. The product is float32 (float64 if that is
    dtype)."""
    N = w_fp8_NK.shape[-2]
    return _dequantize(w_fp8_NK, w_scale_inv.repeat_interleave(TILE, -2)[..., :N, :], dtype).to(dtype)


def _dequantize(x_fp8_RK: Tensor, scale_inv_RG: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    K = x_fp8_RK.shape[-1]
    return x_fp8_RK.to(compute) * scale_inv_RG.to(compute).repeat_interleave(TILE, -1)[..., :K]


def gemm_ref(
    x_fp8_RK: Tensor, x_scale_inv: Tensor, w_fp8_NK: Tensor, w_scale_inv: Tensor, dtype: torch.dtype
) -> Tensor:
    """x wᵀ, [R, N]. Sums dequantised products in any order; `numerics.accumulate_rms` allows for it."""
    x_RK, w_NK = _dequantize(x_fp8_RK, x_scale_inv, dtype), _dequantize_block_wide(w_fp8_NK, w_scale_inv, dtype)
    return (x_RK @ w_NK.mT).to(dtype)


def gemm_dgrad_ref(
    dy_fp8_RN: Tensor, dy_scale_inv: Tensor, w_fp8_NK: Tensor, w_scale_inv: Tensor, dtype: torch.dtype
) -> Tensor:
    """dy w, [R, K]: the input's gradient. dy's tiles run along N."""
    dy_RN, w_NK = _dequantize(dy_fp8_RN, dy_scale_inv, dtype), _dequantize_block_wide(w_fp8_NK, w_scale_inv, dtype)
    return (dy_RN @ w_NK).to(dtype)


def gemm_wgrad_ref(
    dyt_fp8_NP: Tensor, dyt_scale_inv: Tensor, xt_fp8_KP: Tensor, xt_scale_inv: Tensor, dtype: torch.dtype
) -> Tensor:
    """dyᵀ x, [N, K]: the weight's gradient. Both operands' tiles run along the rows (tokens)."""
    dyt_NP, xt_KP = _dequantize(dyt_fp8_NP, dyt_scale_inv, dtype), _dequantize(xt_fp8_KP, xt_scale_inv, dtype)
    return (dyt_NP @ xt_KP.mT).to(dtype)


def _dequantize_block_wide(w_fp8_NK: Tensor, w_scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_block_ref(w_fp8_NK, w_scale_inv, torch.float64 if dtype == torch.float64 else torch.float32)


def _groups(offs: Tensor) -> list[slice]:
    ends = offs.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def grouped_gemm_ref(
    x_fp8_RK: Tensor, x_scale_inv: Tensor, w_fp8_ENK: Tensor, w_scale_inv: Tensor, offs: Tensor, dtype: torch.dtype
) -> Tensor:
    """`gemm` of each group's rows with its expert's weight, [R, N]; rows of no group are zero here, anything on a
    GPU."""
    y_RN = x_fp8_RK.new_zeros(len(x_fp8_RK), w_fp8_ENK.shape[1], dtype=dtype)
    for e, rows in enumerate(_groups(offs)):
        y_RN[rows] = gemm_ref(x_fp8_RK[rows], x_scale_inv[rows], w_fp8_ENK[e], w_scale_inv[e], dtype)
    return y_RN


def grouped_gemm_dgrad_ref(
    dy_fp8_RN: Tensor, dy_scale_inv: Tensor, w_fp8_ENK: Tensor, w_scale_inv: Tensor, offs: Tensor, dtype: torch.dtype
) -> Tensor:
    """`gemm_dgrad` of each group's rows with its expert's weight, [R, K]."""
    dx_RK = dy_fp8_RN.new_zeros(len(dy_fp8_RN), w_fp8_ENK.shape[2], dtype=dtype)
    for e, rows in enumerate(_groups(offs)):
        dx_RK[rows] = gemm_dgrad_ref(dy_fp8_RN[rows], dy_scale_inv[rows], w_fp8_ENK[e], w_scale_inv[e], dtype)
    return dx_RK


def grouped_gemm_wgrad_ref(
    dyt_fp8_NP: Tensor,
    dyt_scale_inv: Tensor,
    xt_fp8_KP: Tensor,
    xt_scale_inv: Tensor,
    offs: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`gemm_wgrad` over each group's rows, [E, N, K]; zero for an expert without rows."""
    dw_ENK = dyt_fp8_NP.new_zeros(len(offs), len(dyt_fp8_NP), len(xt_fp8_KP), dtype=dtype)
    first = 0
    for e, rows in enumerate(_groups(offs)):
        last = first + round_up(rows.stop - rows.start, TILE)
        tiles = slice(first // TILE, last // TILE)
        dyt, dyt_scale_inv_e = dyt_fp8_NP[:, first:last], dyt_scale_inv[:, tiles]
        dw_ENK[e] = gemm_wgrad_ref(dyt, dyt_scale_inv_e, xt_fp8_KP[:, first:last], xt_scale_inv[:, tiles], dtype)
        first = last
    return dw_ENK
