"""Casts to FP8 and back. What each means: `kernels/reference/casts.py`."""

import torch

from dsv3c.kernels.reference import casts
from dsv3c.numerics import E4M3, TILE, ceil_div
from dsv3c.operators.define import (
    check_blocks,
    check_floor,
    check_rank,
    check_tiles,
    count_groups,
    define,
    empty_tiles,
)


def _quantize_tile(x_RK, amax_floor, pow2):
    check_rank("x", x_RK, 2)
    check_floor(amax_floor)
    return empty_tiles(x_RK, *x_RK.shape)


def _quantize_tile_t(x_RK, offs, amax_floor, pow2):
    check_rank("x", x_RK, 2)
    check_floor(amax_floor)
    R, K = x_RK.shape
    return empty_tiles(x_RK, K, casts.padded_rows(R, None if offs is None else count_groups(offs)))


def _requantize_t(x_fp8_RK, x_scale_inv, offs, amax_floor, pow2):
    check_tiles("x", x_fp8_RK, x_scale_inv)
    return _quantize_tile_t(x_fp8_RK, offs, amax_floor, pow2)


def _quantize_block(w_NK, amax_floor, pow2):
    check_floor(amax_floor)
    *batch, N, K = w_NK.shape
    scale_inv = w_NK.new_empty((*batch, ceil_div(N, TILE), ceil_div(K, TILE)), dtype=torch.float32)
    return w_NK.new_empty(w_NK.shape, dtype=E4M3), scale_inv


def _dequantize_block(w_fp8_NK, w_scale_inv, dtype):
    check_blocks("w", w_fp8_NK, w_scale_inv)
    return w_fp8_NK.new_empty(w_fp8_NK.shape, dtype=dtype)


_CAST = "float amax_floor, bool pow2) -> (Tensor, Tensor)"

define(f"quantize_tile(Tensor x, {_CAST}", _quantize_tile, casts.quantize_tile_ref, "quantize")
define(f"quantize_tile_t(Tensor x, Tensor? offs, {_CAST}", _quantize_tile_t, casts.quantize_tile_t_ref, "quantize")
define(
    f"requantize_t(Tensor x_fp8, Tensor x_scale_inv, Tensor? offs, {_CAST}",
    _requantize_t,
    casts.requantize_t_ref,
    "quantize",
)
define(f"quantize_block(Tensor w, {_CAST}", _quantize_block, casts.quantize_block_ref, "quantize")
define(
    "dequantize_block(Tensor w_fp8, Tensor w_scale_inv, ScalarType dtype) -> Tensor",
    _dequantize_block,
    casts.dequantize_block_ref,
    "quantize",
)
