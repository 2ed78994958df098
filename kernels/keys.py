"""The product that makes keys and values from the latent, stored where attention reads them.

Attention wants a key whole: the features of its head, then the rotary ones that all heads share. A head of the product
is 128 features of a key and 128 of a value. Stored one behind the other, all keys are copied to put the rotary part in
(at 4096 tokens of V3 470 MB, 83 us on an H200); stored with a gap between, the rotary part alone is written (67 MB).
Keys and values are both views of the result.
"""

from collections.abc import Iterator
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels import gemm, warp_specialized
from dsv3c.kernels.implementations import Choice, Problem, choose, implementations, start
from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import BF16, Variant
from dsv3c.numerics import TILE, ceil_div

HEADS, WARPS = 128, 4  # of a program


@launched
@triton.jit
def _fill_rope_kernel(
    rope_ptr, out_ptr, H, SIZE, rope_stride, row_stride, head_stride, BLOCK: tl.constexpr, HEADS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    rope = tl.load(rope_ptr + row * rope_stride + column, mask=column < SIZE)
    at = out_ptr + row * row_stride + head * head_stride + column
    tl.store(at, tl.broadcast_to(rope, (HEADS, BLOCK)), mask=(head < H) & (column < SIZE))


def gemm_keys(
    x_fp8: Tensor, x_scale_inv: Tensor, w_fp8: Tensor, w_scale_inv: Tensor, rope_BTr: Tensor, out_RHD: Tensor
) -> None:
    """Launcher of `dsv3c::gemm_keys`."""
    (R, H, D), (N, K), r = out_RHD.shape, w_fp8.shape, rope_BTr.shape[2]
    if out_RHD.numel() == 0:
        return
    pairs, problem = (x_fp8, x_scale_inv, w_fp8, w_scale_inv), Problem("gemm", R, N, K)
    if warp_specialized.takes(problem):
        start(problem, lambda _, config: warp_specialized.launch_heads(*pairs, out_RHD, **config), out_RHD, _choose, D)
    else:
        y_RHD = out_RHD.new_empty((R, H, D - r))
        gemm.gemm(*pairs, out_RHD.dtype, y_RHD.flatten(1))
        out_RHD[..., :TILE] = y_RHD[..., :TILE]
        out_RHD[..., TILE + r :] = y_RHD[..., TILE:]
    rope_Rr = (rope_BTr if rope_BTr.stride(2) == 1 else rope_BTr.contiguous()).flatten(0, 1)
    rotary = out_RHD[..., TILE:]
    _fill_rope_kernel[(R, ceil_div(H, HEADS))](
        rope_Rr, rotary, H, r, rope_Rr.stride(0), rotary.stride(0), rotary.stride(1), triton.next_power_of_2(r), HEADS,
        num_warps=WARPS,
    )  # fmt: skip


def _choose(problem: Problem) -> Choice:
    specialized = implementations("gemm")["warp_specialized"]
    choice = choose(problem)
    return choice if choice[0] is specialized else (specialized, warp_specialized.KNOWN[0])


def variants() -> Iterator[Variant]:
    pointers = {"rope_ptr": BF16, "out_ptr": BF16}
    dense = warp_specialized.variant(False, warp_specialized.KNOWN[0])
    yield replace(dense, constants=dense.constants | {"GAP": 64})
    yield Variant(_fill_rope_kernel, pointers, {"BLOCK": 64, "HEADS": HEADS}, num_warps=WARPS)
