"""SwiGLU fused with the casts around it. I features of gate and as many of up, N = 2I, gate first."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from dsv3c.kernels.reference.casts import dequantize_tile, quantize_tile_ref, quantize_tile_t_ref


def swiglu(h_RN: Tensor, weight_R: Tensor | None) -> Tensor:
    """silu(gate)·up, times the row's weight, in float32 (float64 of a float64 h); [R, I]."""
    gate, up = h_RN.to(torch.promote_types(h_RN.dtype, torch.float32)).chunk(2, dim=-1)
    a = silu(gate) * up
    return a if weight_R is None else a * weight_R[:, None].to(a.dtype)


def swiglu_gradients(h_RN: Tensor, da_RI: Tensor, weight_R: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(dh [R, N], dweight [R]) of `swiglu`, in its precision."""
    gate, up = h_RN.to(torch.promote_types(h_RN.dtype, torch.float32)).chunk(2, dim=-1)
    da = da_RI.to(gate.dtype)
    sigmoid = gate.sigmoid()
    dweight = None if weight_R is None else (da * (gate * sigmoid * up)).sum(-1)
    da = da if weight_R is None else da * weight_R[:, None].to(da.dtype)
    dgate = da * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    return torch.cat((dgate, da * gate * sigmoid), dim=-1), dweight


def swiglu_quantize_ref(h_RN: Tensor, weight_R: Tensor | None, amax_floor: float, pow2: bool) -> tuple[Tensor, Tensor]:
    """(a_fp8 [R, I], a_scale_inv): `quantize_tile` of `swiglu`, rounded to BF16 as it would be if it were stored.

    h: BF16. weight: float32 [R], the routing weight of each row, or None.
    """
    return quantize_tile_ref(swiglu(h_RN, weight_R).bfloat16(), amax_floor, pow2)


def swiglu_quantize_save_ref(
    h_RN: Tensor, weight_R: Tensor | None, amax_floor: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`swiglu_quantize`, and the same h as (h_fp8 [R, N], h_scale_inv) for backward."""
    return *swiglu_quantize_ref(h_RN, weight_R, amax_floor, pow2), *quantize_tile_ref(h_RN, amax_floor, pow2)


def swiglu_quantize_backward_ref(
    h_fp8_RN: Tensor,
    h_scale_inv: Tensor,
    da_RI: Tensor,
    weight_R: Tensor | None,
    offs: Tensor | None,
    amax_floor: float,
    gradient_amax_floor: float,
    pow2: bool,
) -> tuple[Tensor, ...]:
    """From the saved h and the BF16 gradient da of a:

    dh_fp8 [R, N], dh_scale_inv: `quantize_tile` of dh, for the input gradient of the product before;
    dht_fp8 [N, P], dht_scale_inv: `quantize_tile_t` of dh, for its weight gradient;
    at_fp8 [I, P], at_scale_inv: `quantize_tile_t` of a, computed again, for the weight gradient of the product behind;
    dweight: float32 [R], zero for rows of no group; [0] without weight.

    dh and a are computed in float32 and rounded to BF16 once. Rows of no group have no dh.
    """
    h_RN = dequantize_tile(h_fp8_RN, h_scale_inv)
    dh, dweight = swiglu_gradients(h_RN, da_RI, weight_R)
    dh, a = dh.bfloat16(), swiglu(h_RN, weight_R).bfloat16()
    if dweight is None:
        dweight = dh.new_empty(0, dtype=torch.float32)
    elif offs is not None:
        dweight[int(offs[-1]) :] = 0
    return (
        *quantize_tile_ref(dh, gradient_amax_floor, pow2),
        *quantize_tile_t_ref(dh, offs, gradient_amax_floor, pow2),
        *quantize_tile_t_ref(a, offs, amax_floor, pow2),
        dweight,
    )
