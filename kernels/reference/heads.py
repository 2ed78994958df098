"""What the heads of multi-head latent attention are made into, and what their gradients are made of.

R rows (tokens), H heads of D = nope + 2r features, the last 2r of them rotary; V features of a value.
"""

import torch
from torch import Tensor

from dsv3c.kernels.reference.casts import quantize_tile_both_ref
from dsv3c.kernels.reference.rotary import rotate_heads_ref as rotate_heads_in_place_ref


def rotate_heads_ref(x_RHD: Tensor, cos_Rr: Tensor, sin_Rr: Tensor, inverse: bool) -> Tensor:
    """x with the last 2r features of every head rotated (see `kernels/reference/rotary.py`), contiguous."""
    out = x_RHD.clone(memory_format=torch.contiguous_format)
    rotate_heads_in_place_ref(out, cos_Rr, sin_Rr, inverse)
    return out


def rotate_quantize_both_ref(
    x_RHD: Tensor, cos_Rr: Tensor, sin_Rr: Tensor, amax_floor: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_tile_both` of `rotate_heads(x, inverse)`, [R, H·D]: the gradient of the linear behind the queries from
    that of rotated queries."""
    return quantize_tile_both_ref(rotate_heads_ref(x_RHD, cos_Rr, sin_Rr, True).flatten(1), None, amax_floor, pow2)


def join_quantize_both_ref(
    dk_RHD: Tensor, dv_RHV: Tensor, nope: int, amax_floor: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_tile_both` of [dk without its rotary features | dv], head by head, [R, H·(nope + V)]: the gradient of
    the linear behind keys and values."""
    joined = torch.cat((dk_RHD[..., :nope], dv_RHV), dim=-1)
    return quantize_tile_both_ref(joined.flatten(1), None, amax_floor, pow2)
