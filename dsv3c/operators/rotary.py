"""What multi-head latent attention does around its products. What each means: `kernels/reference/rotary.py`."""

import torch

from dsv3c.kernels.reference import rotary
from dsv3c.operators.define import OperatorError, check_floor, check_rank, check_wide, define, empty_tiles, expect
from dsv3c.operators.norm import check_norm


def check_angles(R, cos_Rr, sin_Rr) -> None:
    check_rank("cos", cos_Rr, 2)
    expect("rows of cos", cos_Rr.shape[0], R)
    expect("shape of sin", tuple(sin_Rr.shape), tuple(cos_Rr.shape))
    check_wide("cos", cos_Rr.dtype)
    expect("dtype of sin", sin_Rr.dtype, cos_Rr.dtype)
    pairs = cos_Rr.shape[1]
    if pairs & (pairs - 1):
        raise OperatorError(f"columns of cos: expected a power of two, found {pairs}; try the eager rotation")


def _rotate_heads_(x_RHD, cos_Rr, sin_Rr, inverse):
    check_rank("x", x_RHD, 3)
    expect("dtype of x", x_RHD.dtype, torch.bfloat16)
    check_angles(x_RHD.shape[0], cos_Rr, sin_Rr)
    expect(
        "strides of x modulo 2, the last one", [x_RHD.stride(0) % 2, x_RHD.stride(1) % 2, x_RHD.stride(2)], [0, 0, 1]
    )
    check_head(x_RHD, cos_Rr)


def check_head(x_RHD, cos_Rr) -> None:
    expect("size of a head modulo 2", x_RHD.shape[2] % 2, 0)
    if x_RHD.shape[2] < 2 * cos_Rr.shape[1]:
        raise OperatorError(
            f"size of a head: expected at least {2 * cos_Rr.shape[1]}, two for each column of cos, found "
            f"{x_RHD.shape[2]}; try fewer columns"
        )


def _check_latent(x_RL, weight_K, cos_Rr, sin_Rr) -> None:
    check_rank("x", x_RL, 2)
    check_norm(x_RL[:, : weight_K.shape[0]], weight_K)
    check_angles(x_RL.shape[0], cos_Rr, sin_Rr)
    expect("columns of x", x_RL.shape[1], weight_K.shape[0] + 2 * cos_Rr.shape[1])


def _latent_quantize(x_RL, weight_K, cos_Rr, sin_Rr, eps, amax_floor, pow2):
    _check_latent(x_RL, weight_K, cos_Rr, sin_Rr)
    check_floor(amax_floor)
    R, K = x_RL.shape[0], weight_K.shape[0]
    return x_RL.new_empty(x_RL.shape), *empty_tiles(x_RL, R, K), x_RL.new_empty(R, dtype=torch.float32)


def _latent_append_(pages_NPL, x_BL, weight_K, cos_Br, sin_Br, eps, table_BM, lengths_B):
    _check_latent(x_BL, weight_K, cos_Br, sin_Br)
    check_rank("pages", pages_NPL, 3)
    expect("dtype of pages", pages_NPL.dtype, x_BL.dtype)
    expect("columns of pages", pages_NPL.shape[2], x_BL.shape[1])
    expect("strides of pages", pages_NPL.stride()[1:], (x_BL.shape[1], 1))
    check_rank("table", table_BM, 2)
    expect("rows of table", table_BM.shape[0], x_BL.shape[0])
    expect("shape of lengths", tuple(lengths_B.shape), (x_BL.shape[0],))
    expect("dtypes of table and lengths", (table_BM.dtype, lengths_B.dtype), (torch.int32, torch.int32))
    return x_BL.new_empty(x_BL.shape)


_ANGLES = "Tensor cos, Tensor sin"

define(f"rotate_heads_(Tensor(a!) x, {_ANGLES}, bool inverse) -> ()",
       _rotate_heads_, rotary.rotate_heads_ref, "rotary")  # fmt: skip
define(
    f"latent_quantize(Tensor x, Tensor weight, {_ANGLES}, float eps, float amax_floor, bool pow2) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _latent_quantize,
    rotary.latent_quantize_ref,
    "rotary",
)
define(
    f"latent_append_(Tensor(a!) pages, Tensor x, Tensor weight, {_ANGLES}, float eps, Tensor table, Tensor lengths) -> "
    "Tensor",
    _latent_append_,
    rotary.latent_append_ref,
    "rotary",
)
