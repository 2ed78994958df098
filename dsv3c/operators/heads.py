"""The heads of multi-head latent attention and their gradients. What each means: `kernels/reference/heads.py`."""

import torch

from dsv3c.kernels.reference import heads
from dsv3c.kernels.reference.casts import padded_rows
from dsv3c.operators.define import OperatorError, check_floor, check_rank, define, empty_tiles, expect
from dsv3c.operators.rotary import check_angles, check_head

HALF = 64  # features that the casting kernel takes at a time: half a tile


def _rotate_heads(x_RHD, cos_Rr, sin_Rr, inverse):
    _check_heads("x", x_RHD)
    check_angles(x_RHD.shape[0], cos_Rr, sin_Rr)
    check_head(x_RHD, cos_Rr)
    return x_RHD.new_empty(x_RHD.shape)


def _rotate_quantize_both(x_RHD, cos_Rr, sin_Rr, amax_floor, pow2):
    _check_heads("x", x_RHD)
    check_angles(x_RHD.shape[0], cos_Rr, sin_Rr)
    expect("rotary features", 2 * cos_Rr.shape[1], HALF)
    check_halves(x=x_RHD.shape[2])
    return _tiles(x_RHD, x_RHD.shape[2], amax_floor)


def _join_quantize_both(dk_RHD, dv_RHV, nope, amax_floor, pow2):
    _check_heads("dk", dk_RHD)
    _check_heads("dv", dv_RHV)
    expect("rows and heads of dv", tuple(dv_RHV.shape[:2]), tuple(dk_RHD.shape[:2]))
    if not 0 < nope <= dk_RHD.shape[2]:
        raise OperatorError(f"nope: expected between 1 and {dk_RHD.shape[2]}, found {nope}; try qk_nope_head_dim")
    check_halves(nope=nope, dv=dv_RHV.shape[2])
    return _tiles(dk_RHD, nope + dv_RHV.shape[2], amax_floor)


def _check_heads(name, x_RHD) -> None:
    check_rank(name, x_RHD, 3)
    expect(f"dtype of {name}", x_RHD.dtype, torch.bfloat16)


def check_halves(**sizes) -> None:
    for name, size in sizes.items():
        if size % HALF:
            raise OperatorError(f"features of {name}: expected a multiple of {HALF}, found {size}; try quantize_tile")


def _tiles(x_RHD, features, amax_floor):
    check_floor(amax_floor)
    R, K = x_RHD.shape[0], x_RHD.shape[1] * features
    return *empty_tiles(x_RHD, R, K), *empty_tiles(x_RHD, K, padded_rows(R, None))


_CAST = "float amax_floor, bool pow2) -> (Tensor, Tensor, Tensor, Tensor)"

define("rotate_heads(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
       _rotate_heads, heads.rotate_heads_ref, "heads")  # fmt: skip
define(f"rotate_quantize_both(Tensor x, Tensor cos, Tensor sin, {_CAST}",
       _rotate_quantize_both, heads.rotate_quantize_both_ref, "heads")  # fmt: skip
define(f"join_quantize_both(Tensor dk, Tensor dv, int nope, {_CAST}",
       _join_quantize_both, heads.join_quantize_both_ref, "heads")  # fmt: skip
