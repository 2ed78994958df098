"""Casts to FP8 and back. What each means: `kernels/reference/casts.py`."""

from itertools import islice, pairwise

import torch

from dsv3c.kernels.reference import casts
from dsv3c.numerics import E4M3, TILE, ceil_div
from dsv3c.operators.define import (
    check_blocks,
    check_floor,
    check_matrices,
    check_rank,
    check_tiles,
    check_wide,
    count_groups,
    define,
    empty_tiles,
    expect,
)


def _quantize_tile(x_RK, amax_floor, pow2):
    check_rank("x", x_RK, 2)
    check_wide("x", x_RK.dtype)
    check_floor(amax_floor)
    return empty_tiles(x_RK, *x_RK.shape)


def _quantize_tile_t(x_RK, offs, amax_floor, pow2):
    check_rank("x", x_RK, 2)
    check_wide("x", x_RK.dtype)
    return _transposed(x_RK, offs, amax_floor)


def _transposed(x_RK, offs, amax_floor):
    check_floor(amax_floor)
    R, K = x_RK.shape
    return empty_tiles(x_RK, K, casts.padded_rows(R, None if offs is None else count_groups(offs)))


def _quantize_tile_both(x_RK, offs, amax_floor, pow2):
    return *_quantize_tile(x_RK, amax_floor, pow2), *_quantize_tile_t(x_RK, offs, amax_floor, pow2)


def _requantize_t(x_fp8_RK, x_scale_inv, offs, amax_floor, pow2):
    check_tiles("x", x_fp8_RK, x_scale_inv)
    return _transposed(x_fp8_RK, offs, amax_floor)


def _quantize_block(w_NK, amax_floor, pow2):
    check_matrices("w", w_NK)
    check_wide("w", w_NK.dtype)
    check_floor(amax_floor)
    *batch, N, K = w_NK.shape
    scale_inv = w_NK.new_empty((*batch, ceil_div(N, TILE), ceil_div(K, TILE)), dtype=torch.float32)
    return w_NK.new_empty(w_NK.shape, dtype=E4M3), scale_inv


def _quantize_weights(weights, stacks, amax_floor, pow2, transposed):
    check_floor(amax_floor)
    expect("number of weights", len(weights), sum(stacks))
    expect("whether each of stacks has a weight", all(count > 0 for count in stacks), True)
    for w in weights:
        check_matrices("a weight", w)
        check_wide("a weight", w.dtype)
    copies, rest = [], iter(weights)
    for count in stacks:
        stack = list(islice(rest, count))
        *batch, N, K = stack[0].shape
        for above, w in pairwise(stack):
            expect("shape of a stacked weight, rows apart", (above.dim(), *w.shape[:-2], w.shape[-1]), (2, K))
            expect("rows beyond a multiple of 128 of a weight above another", above.shape[-2] % TILE, 0)
            N += w.shape[-2]
        shapes = ((*batch, N, K), E4M3), ((*batch, ceil_div(N, TILE), ceil_div(K, TILE)), torch.float32)
        copies += [stack[0].new_empty(shape, dtype=dtype) for shape, dtype in shapes]
        if transposed:
            copies += [casts.empty_transposed(stack[0], shape, dtype) for shape, dtype in shapes]
    return copies


def _dequantize_block(w_fp8_NK, w_scale_inv, dtype):
    check_blocks("w", w_fp8_NK, w_scale_inv)
    check_wide("the result", dtype)
    return w_fp8_NK.new_empty(w_fp8_NK.shape, dtype=dtype)


def _quantize_e5m6(x_RK, amax_floor):
    check_rank("x", x_RK, 2)
    check_wide("x", x_RK.dtype)
    check_floor(amax_floor)
    R, K = x_RK.shape
    expect("columns of x beyond a multiple of 8", K % 8, 0)
    scale_inv = x_RK.new_empty((ceil_div(K, TILE), R), dtype=torch.float32).t()
    return x_RK.new_empty((R, K // 2 * 3), dtype=torch.uint8), scale_inv


def _dequantize_e5m6(packed, scale_inv, dtype):
    check_rank("packed", packed, 2)
    expect("dtype of packed", packed.dtype, torch.uint8)
    R, size = packed.shape
    expect("columns of packed beyond a multiple of 12", size % 12, 0)
    K = size // 3 * 2
    expect("shape of scale_inv", tuple(scale_inv.shape), (R, ceil_div(K, TILE)))
    expect("dtype of scale_inv", scale_inv.dtype, torch.float32)
    check_wide("the result", dtype)
    return packed.new_empty((R, K), dtype=dtype)


_CAST = "float amax_floor, bool pow2) -> (Tensor, Tensor)"

define(f"quantize_tile(Tensor x, {_CAST}", _quantize_tile, casts.quantize_tile_ref, "quantize")
define(f"quantize_tile_t(Tensor x, Tensor? offs, {_CAST}", _quantize_tile_t, casts.quantize_tile_t_ref, "quantize")
define(
    f"quantize_tile_both(Tensor x, Tensor? offs, {_CAST.replace('Tensor)', 'Tensor, Tensor, Tensor)')}",
    _quantize_tile_both,
    casts.quantize_tile_both_ref,
    "quantize",
)
define(
    f"requantize_t(Tensor x_fp8, Tensor x_scale_inv, Tensor? offs, {_CAST}",
    _requantize_t,
    casts.requantize_t_ref,
    "requantize",
)
define(f"quantize_block(Tensor w, {_CAST}", _quantize_block, casts.quantize_block_ref, "quantize")
define(
    "quantize_weights(Tensor[] weights, int[] stacks, float amax_floor, bool pow2, bool transposed) -> Tensor[]",
    _quantize_weights,
    casts.quantize_weights_ref,
    "quantize_weights",
)
define(
    "dequantize_block(Tensor w_fp8, Tensor w_scale_inv, ScalarType dtype) -> Tensor",
    _dequantize_block,
    casts.dequantize_block_ref,
    "quantize",
)
define("quantize_e5m6(Tensor x, float amax_floor) -> (Tensor, Tensor)", _quantize_e5m6, casts.quantize_e5m6_ref, "e5m6")
define(
    "dequantize_e5m6(Tensor packed, Tensor scale_inv, ScalarType dtype) -> Tensor",
    _dequantize_e5m6,
    casts.dequantize_e5m6_ref,
    "e5m6",
)
