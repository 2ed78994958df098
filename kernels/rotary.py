"""What multi-head latent attention does between its products, fused: the rotation of the queries in place, and the
latent's norm and rotation, with the cast, or of a new token into its page.

Memory-bound. A pair that is rotated is one 32-bit word of two BF16 numbers, so that interleaved pairs are loaded and
stored 16 bytes at a time.

H200, 4096 tokens and 128 heads, in the time of a copy of as many bytes: queries 0.88 (42 µs), their gradient 0.79, the
latent 0.93 (10 µs).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3c.kernels.launch import launched
from dsv3c.kernels.norm import scaled, squares
from dsv3c.kernels.offline import BF16, F32, I16, I32, Variant
from dsv3c.kernels.tiles import as_words, high, low, pack, store_tiles, times
from dsv3c.numerics import TILE, ceil_div

HEADS, WARPS = 128, 4  # of a program
PAGE = 64  # tokens


@triton.jit
def _turn(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@launched
@triton.jit
def _rotate_heads_kernel(
    x_ptr, cos_ptr, sin_ptr, H, row_stride, head_stride, PAIRS: tl.constexpr, INVERSE: tl.constexpr, HEADS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = head < H
    cos = tl.load(cos_ptr + row * PAIRS + pair).to(tl.float32)
    sin = tl.load(sin_ptr + row * PAIRS + pair).to(tl.float32)
    halves = x_ptr + row * row_stride + head * head_stride + pair
    words = (x_ptr + row * row_stride).to(tl.pointer_type(tl.int32)) + head * (head_stride // 2) + pair
    if INVERSE:
        first = tl.load(halves, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(halves + PAIRS, mask=inside, other=0.0).to(tl.float32)
        tl.debug_barrier()  # every thread has read what another may overwrite
        even, odd = _turn(first, second, cos, -sin)
        tl.store(words, pack(even, odd), mask=inside)
    else:
        word = tl.load(words, mask=inside, other=0)
        tl.debug_barrier()
        first, second = _turn(low(word), high(word), cos, sin)
        tl.store(halves, first.to(tl.bfloat16), mask=inside)
        tl.store(halves + PAIRS, second.to(tl.bfloat16), mask=inside)


@launched
@triton.jit(do_not_specialize=["R"])
def _latent_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, latent_ptr, q_ptr, scale_inv_ptr, rstd_ptr, pages_ptr, table_ptr, lengths_ptr,
    R, K, x_stride, page_stride, table_stride, eps, amax_floor,
    POW2: tl.constexpr, TILES: tl.constexpr, PAIRS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """With pages, a row is a sequence's next token, and is written there too; without, it is cast."""
    row = tl.program_id(0).to(tl.int64)
    if pages_ptr is not None:
        place = tl.load(lengths_ptr + row)
        page = tl.load(table_ptr + row * table_stride + place // PAGE).to(tl.int64)
        pages_ptr += page * page_stride + place % PAGE * (K + 2 * PAIRS)
        paged_ptr = pages_ptr.to(tl.pointer_type(tl.int32))
    x_ptr += row * x_stride
    words_ptr = latent_ptr.to(tl.pointer_type(tl.int32)) + row * (K // 2 + PAIRS)
    latent_ptr += row * (K + 2 * PAIRS)
    tile = tl.arange(0, TILES)
    column = tile[:, None] * 64 + tl.arange(0, 64)[None, :]  # in words: half of the columns
    inside = column < K // 2
    x = tl.load(x_ptr + column, mask=inside, other=0)
    pair = tl.arange(0, PAIRS)
    turning = tl.load(x_ptr + K // 2 + pair)
    cos = tl.load(cos_ptr + row * PAIRS + pair).to(tl.float32)
    sin = tl.load(sin_ptr + row * PAIRS + pair).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0)
    first, second = _turn(low(turning), high(turning), cos, sin)
    tl.store(latent_ptr + K + pair, first.to(tl.bfloat16))
    tl.store(latent_ptr + K + PAIRS + pair, second.to(tl.bfloat16))
    rstd = tl.rsqrt(tl.sum(squares(x, 0.0)) / K + eps)
    y = times(scaled(x, rstd), weight)
    tl.store(words_ptr + column, y, mask=inside)
    if pages_ptr is not None:
        tl.store(paged_ptr + column, y, mask=inside)
        tl.store(pages_ptr + K + pair, first.to(tl.bfloat16))
        tl.store(pages_ptr + K + PAIRS + pair, second.to(tl.bfloat16))
    else:
        q_ptr += row * (K // 2) + column
        store_tiles(y, q_ptr, scale_inv_ptr + tile.to(tl.int64) * R + row, tile * 128 < K, amax_floor, POW2)
        tl.store(rstd_ptr + row, rstd)


def rotate_heads_(x_RHD: Tensor, cos_Rr: Tensor, sin_Rr: Tensor, inverse: bool) -> None:
    """Launcher of `dsv3c::rotate_heads_`."""
    R, H, D = x_RHD.shape
    pairs = cos_Rr.shape[1]
    if x_RHD.numel() == 0:
        return
    if x_RHD.data_ptr() % 4:  # a pair is no word
        rotated = x_RHD.clone(memory_format=torch.contiguous_format)
        rotate_heads_(rotated, cos_Rr, sin_Rr, inverse)
        x_RHD.copy_(rotated)
        return
    _rotate_heads_kernel[(R, ceil_div(H, HEADS))](
        x_RHD[..., D - 2 * pairs :], cos_Rr.contiguous(), sin_Rr.contiguous(), H, x_RHD.stride(0), x_RHD.stride(1),
        pairs, inverse, HEADS, num_warps=WARPS,
    )  # fmt: skip


def latent_quantize(
    x_RL: Tensor,
    weight_K: Tensor,
    cos_Rr: Tensor,
    sin_Rr: Tensor,
    eps: float,
    amax_floor: float,
    pow2: bool,
    out: tuple,
) -> None:
    """Launcher of `dsv3c::latent_quantize`."""
    latent, q, scale_inv, rstd = out
    R, K = q.shape
    if R == 0:
        return
    x = as_words(x_RL)
    _latent_kernel[(R,)](
        x, as_words(weight_K), cos_Rr.contiguous(), sin_Rr.contiguous(), latent, q.view(torch.int16), scale_inv, rstd,
        None, None, None, R, K, x.stride(0), 0, 0, eps, amax_floor, pow2, triton.next_power_of_2(K // TILE),
        cos_Rr.shape[1], 0, num_warps=1,
    )  # fmt: skip


def latent_append_(
    pages_NPL: Tensor,
    x_BL: Tensor,
    weight_K: Tensor,
    cos_Br: Tensor,
    sin_Br: Tensor,
    eps: float,
    table_BM: Tensor,
    lengths_B: Tensor,
    out: Tensor,
) -> None:
    """Launcher of `dsv3c::latent_append_`."""
    B, K = len(x_BL), len(weight_K)
    if B == 0:
        return
    if pages_NPL.data_ptr() % 4 or pages_NPL.stride(0) % 2:  # no words
        pages = pages_NPL.clone(memory_format=torch.contiguous_format)
        latent_append_(pages, x_BL, weight_K, cos_Br, sin_Br, eps, table_BM, lengths_B, out)
        pages_NPL.copy_(pages)
        return
    x = as_words(x_BL)
    _latent_kernel[(B,)](
        x, as_words(weight_K), cos_Br.contiguous(), sin_Br.contiguous(), out, None, None, None, pages_NPL,
        table_BM.contiguous(), lengths_B.contiguous(), B, K, x.stride(0), pages_NPL.stride(0), table_BM.shape[1], eps,
        0.0, False, triton.next_power_of_2(K // TILE), cos_Br.shape[1], pages_NPL.shape[1], num_warps=1,
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    angles = {"cos_ptr": F32, "sin_ptr": F32}
    for inverse in (False, True):
        yield Variant(
            _rotate_heads_kernel,
            {"x_ptr": BF16} | angles,
            {"PAIRS": 32, "INVERSE": inverse, "HEADS": HEADS},
            num_warps=WARPS,
        )
    latent = {"x_ptr": I32, "weight_ptr": I32, "latent_ptr": BF16, "eps": "fp32", "amax_floor": "fp32"} | angles
    cast = {"q_ptr": I16, "scale_inv_ptr": F32, "rstd_ptr": F32}
    pages = {"pages_ptr": BF16, "table_ptr": I32, "lengths_ptr": I32}
    for there, absent, size in ((cast, pages, 0), (pages, cast, PAGE)):
        constants = {"POW2": False, "TILES": 4, "PAIRS": 32, "PAGE": size} | dict.fromkeys(absent)
        yield Variant(_latent_kernel, latent | there, constants, num_warps=1)
