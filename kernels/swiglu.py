"""SwiGLU between two FP8 products, forward; `swiglu_backward.py` starts from the FP8 copy of its input that this saves.

Memory-bound: 5 bytes a pair of gate and up, 7 with the saved copy. (H200, 32768 rows of 2048 and 4096 of 18432, in the
time of a copy of as many bytes: 0.94 and 0.95, with the saved copy 0.87 and 0.89.)
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import F32, I16, I32, Variant
from dsv3c.kernels.tiles import as_words, high, low, pack, store_tiles
from dsv3c.numerics import TILE, ceil_div

ROWS, WARPS = 16, 4  # of a program


@triton.jit
def sigmoid(x):
    """1/(1 + exp(-x)) within 2^-22 + |x|·2^-23 of it, relatively."""
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 power;
        ex2.approx.ftz.f32 power, $1;
        add.rn.f32 power, power, 0f3F800000;
        rcp.approx.ftz.f32 $0, power;
        }""",
        "=f,f",
        [x * -1.4426950408889634],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@launched
@triton.jit(do_not_specialize=["R"])
def _swiglu_kernel(
    h_ptr, weight_ptr, a_ptr, a_scale_inv_ptr, h_fp8_ptr, h_scale_inv_ptr, R, width, amax_floor, POW2: tl.constexpr,
    WEIGHTED: tl.constexpr, SAVE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tile * 64 + tl.arange(0, 64)[None, :]  # in words: half of the columns
    row_64 = row[:, None].to(tl.int64)
    at = row_64 * width + column
    inside = row < R
    gate = tl.load(h_ptr + at, mask=inside[:, None], other=0)
    up = tl.load(h_ptr + at + width // 2, mask=inside[:, None], other=0)
    a_0 = low(gate) * sigmoid(low(gate)) * low(up)
    a_1 = high(gate) * sigmoid(high(gate)) * high(up)
    if WEIGHTED:
        weight = tl.load(weight_ptr + row, mask=inside, other=0.0)[:, None]
        a_0 *= weight
        a_1 *= weight
    scale_at = tile.to(tl.int64) * R + row
    a_ptr += row_64 * (width // 2) + column
    store_tiles(pack(a_0, a_1), a_ptr, a_scale_inv_ptr + scale_at, inside, amax_floor, POW2)
    if SAVE:
        store_tiles(gate, h_fp8_ptr + at, h_scale_inv_ptr + scale_at, inside, amax_floor, POW2)
        scale_at += (width // 128).to(tl.int64) * R
        store_tiles(up, h_fp8_ptr + at + width // 2, h_scale_inv_ptr + scale_at, inside, amax_floor, POW2)


def swiglu_quantize(h_RN: Tensor, weight_R: Tensor | None, amax_floor: float, pow2: bool, out: tuple) -> None:
    """Launcher of `dsv3c::swiglu_quantize`."""
    _forward(h_RN, weight_R, amax_floor, pow2, *out, None, None)


def swiglu_quantize_save(h_RN: Tensor, weight_R: Tensor | None, amax_floor: float, pow2: bool, out: tuple) -> None:
    """Launcher of `dsv3c::swiglu_quantize_save`."""
    _forward(h_RN, weight_R, amax_floor, pow2, *out)


def _forward(h_RN, weight_R, amax_floor, pow2, a_fp8, a_scale_inv, h_fp8, h_scale_inv) -> None:
    R, width = a_fp8.shape
    if a_fp8.numel() == 0:
        return
    weight_R = None if weight_R is None else weight_R.contiguous()
    _swiglu_kernel[(ceil_div(R, ROWS), width // TILE)](
        as_words(h_RN.contiguous()), weight_R, a_fp8.view(torch.int16), a_scale_inv,
        None if h_fp8 is None else h_fp8.view(torch.int16), h_scale_inv, R, width, amax_floor, pow2,
        weight_R is not None, h_fp8 is not None, ROWS, num_warps=WARPS,
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    for weighted in (False, True):
        weight, no_weight = ({"weight_ptr": F32}, {}) if weighted else ({}, {"weight_ptr": None})
        for save in (False, True):
            saved, unsaved = ("h_fp8_ptr", "h_scale_inv_ptr"), {"h_fp8_ptr": None, "h_scale_inv_ptr": None}
            yield Variant(
                _swiglu_kernel,
                {"h_ptr": I32, "a_ptr": I16, "a_scale_inv_ptr": F32, "amax_floor": "fp32"}
                | weight
                | (dict(zip(saved, (I16, F32), strict=True)) if save else {}),
                {"POW2": False, "WEIGHTED": weighted, "SAVE": save, "ROWS": ROWS}
                | no_weight
                | ({} if save else unsaved),
                num_warps=WARPS,
            )
