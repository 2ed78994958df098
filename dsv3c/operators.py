"""The `torch.ops.dsv3c.*` vocabulary: schema, checked shapes, FLOPs, and who computes it on which device.

Passes match these names on every device. The CPU implementation is the definition (`kernels/reference.py`, which says
what each operator means and explains the letters); the CUDA one is a launcher, imported at its first call, so that a
machine without Triton can import, trace and run everything. Functional and opaque: the names survive AOTAutograd.
Importing this module defines the operators; nothing else does. Layouts are exact: Inductor hands over the strides
that were traced.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dsv3c.errors import Dsv3cError
from dsv3c.kernels import reference
from dsv3c.numerics import E4M3, MIN_AMAX_FLOOR, TILE, ceil_div

_LIBRARY = torch.library.Library("dsv3c", "FRAGMENT")


class OperatorError(Dsv3cError):
    """A dsv3c operator was called with tensors that do not fit together."""


def _expect(name: str, found, expected) -> None:
    if found != expected:
        raise OperatorError(f"{name}: expected {expected}, found {found}; try the shapes in kernels/reference.py")


def _rank(name: str, x: Tensor, rank: int) -> None:
    _expect(f"number of dimensions of {name}", x.dim(), rank)


def _tiles(name: str, x_RK: Tensor, scale_inv: Tensor) -> None:
    """An FP8 pair of 1×128 tiles."""
    _rank(name, x_RK, 2)
    _expect(f"dtype of {name}", x_RK.dtype, E4M3)
    _expect(f"dtype of {name}'s scale_inv", scale_inv.dtype, torch.float32)
    R, K = x_RK.shape
    _expect(f"shape of {name}'s scale_inv", tuple(scale_inv.shape), (R, ceil_div(K, TILE)))


def _blocks(name: str, w_NK: Tensor, scale_inv: Tensor) -> None:
    """An FP8 pair of 128×128 blocks."""
    _expect(f"dtype of {name}", w_NK.dtype, E4M3)
    _expect(f"dtype of {name}'s scale_inv", scale_inv.dtype, torch.float32)
    *batch, N, K = w_NK.shape
    _expect(f"shape of {name}'s scale_inv", tuple(scale_inv.shape), (*batch, ceil_div(N, TILE), ceil_div(K, TILE)))


def _groups(offs: Tensor) -> int:
    """The number of groups; a SymInt while tracing."""
    _rank("offs", offs, 1)
    _expect("dtype of offs", offs.dtype, torch.int32)
    return offs.shape[0]


def _floor(amax_floor: float) -> None:
    if not amax_floor >= MIN_AMAX_FLOOR:
        raise OperatorError(
            f"amax_floor: expected at least {MIN_AMAX_FLOOR:g}, found {amax_floor:g}; try numerics.Recipe's"
        )


def _empty_tiles(x: Tensor, rows, columns) -> tuple[Tensor, Tensor]:
    """An FP8 pair of 1×128 tiles; scale_inv column-major."""
    scale_inv = x.new_empty((ceil_div(columns, TILE), rows), dtype=torch.float32).t()
    return x.new_empty((rows, columns), dtype=E4M3), scale_inv


def _empty_wgrad(groups: tuple, dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv, dtype) -> Tensor:
    _tiles("dyt", dyt_fp8_NP, dyt_scale_inv)
    _tiles("xt", xt_fp8_KP, xt_scale_inv)
    _expect("columns of xt", xt_fp8_KP.shape[1], dyt_fp8_NP.shape[1])
    return dyt_fp8_NP.new_empty((*groups, dyt_fp8_NP.shape[0], xt_fp8_KP.shape[0]), dtype=dtype)


def _define(schema: str, allocate: Callable, module: str, flops: Callable | None = None) -> None:
    """Register an operator. Definition: `reference.<name>_ref(*args)`, which returns its results. Launcher:
    `dsv3c.kernels.<module>.<name>(*args, out)`, which fills the results that `allocate` checked and made for it."""
    name = schema.partition("(")[0]
    definition = getattr(reference, f"{name}_ref")

    def cpu(*args):
        allocate(*args)
        return definition(*args)

    def cuda(*args):
        out = allocate(*args)
        getattr(import_module(f"dsv3c.kernels.{module}"), name)(*args, out)
        return out

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"dsv3c::{name}", allocate, lib=_LIBRARY)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.dsv3c, name))(flops)


# The shape functions: check the arguments, allocate the results.


def _quantize_tile(x_RK, amax_floor, pow2):
    _rank("x", x_RK, 2)
    _floor(amax_floor)
    return _empty_tiles(x_RK, *x_RK.shape)


def _quantize_tile_t(x_RK, offs, amax_floor, pow2):
    _rank("x", x_RK, 2)
    _floor(amax_floor)
    R, K = x_RK.shape
    return _empty_tiles(x_RK, K, reference.padded_rows(R, None if offs is None else _groups(offs)))


def _requantize_t(x_fp8_RK, x_scale_inv, offs, amax_floor, pow2):
    _tiles("x", x_fp8_RK, x_scale_inv)
    return _quantize_tile_t(x_fp8_RK, offs, amax_floor, pow2)


def _quantize_block(w_NK, amax_floor, pow2):
    _floor(amax_floor)
    *batch, N, K = w_NK.shape
    scale_inv = w_NK.new_empty((*batch, ceil_div(N, TILE), ceil_div(K, TILE)), dtype=torch.float32)
    return w_NK.new_empty(w_NK.shape, dtype=E4M3), scale_inv


def _dequantize_block(w_fp8_NK, w_scale_inv, dtype):
    _blocks("w", w_fp8_NK, w_scale_inv)
    return w_fp8_NK.new_empty(w_fp8_NK.shape, dtype=dtype)


def _gemm(x_fp8_RK, x_scale_inv, w_fp8_NK, w_scale_inv, dtype):
    _tiles("x", x_fp8_RK, x_scale_inv)
    _blocks("w", w_fp8_NK, w_scale_inv)
    R, K = x_fp8_RK.shape
    *_, N, contracted = w_fp8_NK.shape
    _expect("columns of w", contracted, K)
    return x_fp8_RK.new_empty((R, N), dtype=dtype)


def _gemm_dgrad(dy_fp8_RN, dy_scale_inv, w_fp8_NK, w_scale_inv, dtype):
    _tiles("dy", dy_fp8_RN, dy_scale_inv)
    _blocks("w", w_fp8_NK, w_scale_inv)
    R, N = dy_fp8_RN.shape
    *_, contracted, K = w_fp8_NK.shape
    _expect("rows of w", contracted, N)
    return dy_fp8_RN.new_empty((R, K), dtype=dtype)


def _gemm_wgrad(dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv, dtype):
    return _empty_wgrad((), dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv, dtype)


def _grouped_gemm(x_fp8_RK, x_scale_inv, w_fp8_ENK, w_scale_inv, offs, dtype):
    _expect("number of groups", _groups(offs), w_fp8_ENK.shape[0])
    return _gemm(x_fp8_RK, x_scale_inv, w_fp8_ENK, w_scale_inv, dtype)


def _grouped_gemm_dgrad(dy_fp8_RN, dy_scale_inv, w_fp8_ENK, w_scale_inv, offs, dtype):
    _expect("number of groups", _groups(offs), w_fp8_ENK.shape[0])
    return _gemm_dgrad(dy_fp8_RN, dy_scale_inv, w_fp8_ENK, w_scale_inv, dtype)


def _grouped_gemm_wgrad(dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv, offs, dtype):
    return _empty_wgrad((_groups(offs),), dyt_fp8_NP, dyt_scale_inv, xt_fp8_KP, xt_scale_inv, dtype)


# FLOPs, from shapes: a multiplication and an addition per product.


def _gemm_flops(x_shape, x_scale_inv, w_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * w_shape[-2] * w_shape[-1]


def _gemm_wgrad_flops(dyt_shape, dyt_scale_inv, xt_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * dyt_shape[0] * xt_shape[0] * dyt_shape[1]


def _grouped_gemm_wgrad_flops(dyt_shape, dyt_scale_inv, xt_shape, xt_scale_inv, offs_shape, *args, **kwargs) -> int:
    rows = dyt_shape[1] - TILE * offs_shape[0]  # the real ones, rounded up to 128: see `padded_rows`
    return 2 * dyt_shape[0] * xt_shape[0] * rows


_CAST = "float amax_floor, bool pow2) -> (Tensor, Tensor)"
_X_W = "Tensor w_fp8, Tensor w_scale_inv"
_WGRAD = "Tensor dyt_fp8, Tensor dyt_scale_inv, Tensor xt_fp8, Tensor xt_scale_inv"

_define(f"quantize_tile(Tensor x, {_CAST}", _quantize_tile, "quantize")
_define(f"quantize_tile_t(Tensor x, Tensor? offs, {_CAST}", _quantize_tile_t, "quantize")
_define(f"requantize_t(Tensor x_fp8, Tensor x_scale_inv, Tensor? offs, {_CAST}", _requantize_t, "quantize")
_define(f"quantize_block(Tensor w, {_CAST}", _quantize_block, "quantize")
_define("dequantize_block(Tensor w_fp8, Tensor w_scale_inv, ScalarType dtype) -> Tensor", _dequantize_block, "quantize")
_define(f"gemm(Tensor x_fp8, Tensor x_scale_inv, {_X_W}, ScalarType dtype) -> Tensor", _gemm, "gemm", _gemm_flops)
_define(
    f"gemm_dgrad(Tensor dy_fp8, Tensor dy_scale_inv, {_X_W}, ScalarType dtype) -> Tensor",
    _gemm_dgrad,
    "gemm",
    _gemm_flops,
)
_define(f"gemm_wgrad({_WGRAD}, ScalarType dtype) -> Tensor", _gemm_wgrad, "wgrad", _gemm_wgrad_flops)
_define(
    f"grouped_gemm(Tensor x_fp8, Tensor x_scale_inv, {_X_W}, Tensor offs, ScalarType dtype) -> Tensor",
    _grouped_gemm,
    "grouped_gemm",
    _gemm_flops,
)
_define(
    f"grouped_gemm_dgrad(Tensor dy_fp8, Tensor dy_scale_inv, {_X_W}, Tensor offs, ScalarType dtype) -> Tensor",
    _grouped_gemm_dgrad,
    "grouped_gemm",
    _gemm_flops,
)
_define(
    f"grouped_gemm_wgrad({_WGRAD}, Tensor offs, ScalarType dtype) -> Tensor",
    _grouped_gemm_wgrad,
    "wgrad",
    _grouped_gemm_wgrad_flops,
)
