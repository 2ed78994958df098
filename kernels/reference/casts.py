"""Casts to FP8 and back."""

from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv3c.numerics import E4M3, E4M3_MAX, E5M6_MAX, TILE, ceil_div, round_up


def _scale_inv(amax: Tensor, amax_floor: float, pow2: bool, largest: float = E4M3_MAX) -> Tensor:
    # By a tensor: CUDA divides by a number as a product with its reciprocal, which rounds differently.
    scale_inv = amax.clamp(min=amax_floor) / amax.new_full((), largest)
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


def quantize_tile_both_ref(
    x_RK: Tensor, offs: Tensor | None, amax_floor: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_tile` and `quantize_tile_t`: what backward needs of a gradient, for dx and for dw."""
    return *quantize_tile_ref(x_RK, amax_floor, pow2), *quantize_tile_t_ref(x_RK, offs, amax_floor, pow2)


def requantize_t_ref(
    x_fp8_RK: Tensor, x_scale_inv_RG: Tensor, offs: Tensor | None, amax_floor: float, pow2: bool
) -> tuple[Tensor, Tensor]:
    """`quantize_tile_t` of the dequantised x: the activation that forward saved, retiled for the weight gradient."""
    return quantize_tile_t_ref(dequantize_tile(x_fp8_RK, x_scale_inv_RG), offs, amax_floor, pow2)


def quantize_block_ref(w_NK: Tensor, amax_floor: float, pow2: bool) -> tuple[Tensor, Tensor]:
    """w_fp8 [.., N, K] and scale_inv [.., ⌈N/128⌉, ⌈K/128⌉], both contiguous: blocks of 128×128, ragged ones
    zero-padded."""
    *batch, N, K = w_NK.shape
    rows, columns = ceil_div(N, TILE), ceil_div(K, TILE)
    w = pad(w_NK.float(), (0, -K % TILE, 0, -N % TILE)).view(*batch, rows, TILE, columns, TILE)
    scale_inv = _scale_inv(w.abs().amax((-3, -1)), amax_floor, pow2)
    w_fp8 = _to_fp8(w, scale_inv[..., :, None, :, None]).view(*batch, rows * TILE, columns * TILE)[..., :N, :K]
    return w_fp8.clone(memory_format=torch.contiguous_format), scale_inv


def quantize_weights_ref(
    weights: list[Tensor], stacks: list[int], amax_floor: float, pow2: bool, transposed: bool
) -> list[Tensor]:
    """`quantize_block` of each stack, the next `stacks[i]` of `weights` one below the other: w_fp8, scale_inv, and, if
    transposed, both again with the strides of a transposed tensor. (A square block is its own transpose.)

    Weights are [N, K], or [E, N, K] alone. All of a stack but the last have a multiple of 128 rows.
    """
    copies, rest = [], iter(weights)
    for count in stacks:
        w_fp8, scale_inv = quantize_block_ref(torch.cat(list(islice(rest, count)), -2), amax_floor, pow2)
        copies += [w_fp8, scale_inv]
        if transposed:
            copies += [empty_transposed(x, x.shape, x.dtype).copy_(x) for x in (w_fp8, scale_inv)]
    return copies


def empty_transposed(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[.., N, K] with the strides of a contiguous [.., K, N]; no view of one, which autograd would take apart."""
    *batch, N, K = shape
    return like.new_empty_strided(shape, ((N * K, 1, N) if batch else (1, N)), dtype=dtype)


def dequantize_block_ref(w_fp8_NK: Tensor, w_scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """w_fp8 · scale_inv of its 128×128 block, in `dtype`; [.., N, K]. The product is float32 (float64 if that is
    dtype)."""
    N = w_fp8_NK.shape[-2]
    return dequantize_tile(w_fp8_NK, w_scale_inv.repeat_interleave(TILE, -2)[..., :N, :], dtype).to(dtype)


def dequantize_tile(x_fp8_RK: Tensor, scale_inv_RG: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    K = x_fp8_RK.shape[-1]
    return x_fp8_RK.to(compute) * scale_inv_RG.to(compute).repeat_interleave(TILE, -1)[..., :K]


def quantize_e5m6_ref(x_RK: Tensor, amax_floor: float) -> tuple[Tensor, Tensor]:
    """E5M6 in tiles of 1×128 along K: packed uint8 [R, 3K/2] and scale_inv [R, G], strides (1, R), powers of two.

    For what is cached of the input of the linear after attention (V3 report §3.3.3). A value has 12 bits: sign, 5 of
    exponent with bias 15, 6 of mantissa, that is, a float16 of 6 mantissa bits, with its subnormals and NaN. The values
    of a row stand one behind the other, the lowest bit first: two in three bytes. K is a multiple of 8.
    scale_inv = max(max|x|, amax_floor)/65024, rounded up to a power of two, so that only rounding loses anything.
    """
    R, K = x_RK.shape
    G = ceil_div(K, TILE)
    x_RG128 = pad(x_RK.float(), (0, -K % TILE)).view(R, G, TILE)
    scale_inv_RG = _scale_inv(x_RG128.abs().amax(-1), amax_floor, True, E5M6_MAX)
    x = (x_RG128 / scale_inv_RG[:, :, None]).view(R, G * TILE)[:, :K]
    bits = x.abs().view(torch.int32)
    normal = (bits + 0xFFFF + (bits >> 17 & 1) >> 17) - (112 << 6)  # to the nearest, ties to even; 112 = 127 - 15
    subnormal = (x.abs() * 2.0**20).round().to(torch.int32)
    code = torch.where(x.abs() < 2.0**-14, subnormal, normal)
    code = torch.where(x.isnan(), 0x7FF, code) | (x.signbit().to(torch.int32) << 11)
    pair = (code[:, 0::2] | code[:, 1::2] << 12).contiguous()
    return pair.view(torch.uint8).view(R, K // 2, 4)[:, :, :3].reshape(R, K // 2 * 3), _column_major(scale_inv_RG)


def dequantize_e5m6_ref(packed: Tensor, scale_inv_RG: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `quantize_e5m6` in `dtype`, [R, K]; the product is float32."""
    R, K = len(packed), packed.shape[1] // 3 * 2
    low, middle, high = packed.view(R, K // 2, 3).to(torch.int32).unbind(-1)
    code = torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], -1).view(R, K)
    half = ((code & 0x800) << 4 | (code & 0x7FF) << 4).to(torch.int16).view(torch.float16)
    return (half.float() * scale_inv_RG.repeat_interleave(TILE, 1)[:, :K]).to(dtype)
