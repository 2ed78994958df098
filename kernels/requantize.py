"""FP8 cast again along its rows, transposed, for weight gradients: `requantize_t`, and `permute_requantize_t`, which
reads tokens' rows, an eighth as many, where `permute` would have put their copies.

Neighbouring programs take neighbouring rows of the same columns. A token's row is read once for each of its experts,
from the L2 cache if that is soon: 128 columns of 4096 tokens are half a megabyte. With neighbouring columns beside each
other, all of x went through the cache before a row was read again: 237 MB came from memory in place of 30.

What is scarce then are instructions and the L1 cache, of which shared memory is a part: both are three quarters busy.
So a quotient takes two instructions (`quantize._reciprocal_and_rest`); a loop casts a quarter of the tile's columns at
a time, two a thread, in 63 registers, which leaves room for 32 warps; four threads load half a line; and scales of rows
lie so that 16 bytes a thread are read without bank conflicts.

H200, 4096 tokens of 7168 with 8 experts each: `permute_requantize_t` takes 100 µs in 8 groups and 192 in 256, where
`permute` takes 75, and zeros alone 76 and 143; `requantize_t` has 0.88 to 0.90 of a copy's speed. No faster: a program
of several tiles, whether the next is loaded meanwhile or not; loads by `cp.async`; more of the loop unrolled.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsv3c.kernels.columns import column_layout, quarters, shared_layout, unpack
from dsv3c.kernels.groups import find_tile, groups_of
from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import F32, I16, I32, Variant
from dsv3c.kernels.quantize import column_major, dense, store_nothing, store_quarters
from dsv3c.numerics import TILE, ceil_div

WARPS = 4


@gluon.constexpr_function
def _tile_layout() -> gl.SharedLinearLayout:
    """A tile of 128 rows of 64 words, each of two columns: four parts of 16 that lie as `shared_layout` says, and have
    every other four of 32."""
    bases = [[row, word % 4 + word // 4 * 8] for row, word in shared_layout(16, 16).offset_bases]
    return gl.SharedLinearLayout([*bases, [0, 4], [0, 32]])


@gluon.constexpr_function
def _load_layout() -> gl.DistributedLinearLayout:
    """16 bytes a load, half a line of a row four threads; each writes 8 bytes to either of two parts."""
    registers = [[0, 1], [0, 2], [0, 4], [16, 0], [32, 0], [0, 32]]
    lanes = [[0, 8], [0, 16], [64, 0], [1, 0], [2, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[4, 0], [8, 0]], [], [128, 64])


@gluon.jit
def _scaled(x, scales):
    return x * gl.convert_layout(scales, gl.SliceLayout(1, x.type.layout), assert_trivial=True)[:, None]


@launched
@gluon.jit(do_not_specialize=["R", "scale_stride", "E"])
def _requantize_kernel(
    x_ptr, x_scale_inv_ptr, t_ptr, t_scale_inv_ptr, permutation_ptr, offs_ptr, R, K, x_stride, scale_stride, P_words, E,
    amax_floor, POW2: gl.constexpr, GROUPS: gl.constexpr, TOP_K: gl.constexpr,
):  # fmt: skip
    """One program: 128 rows of a group × 128 columns. x has words of two columns, x_stride times eight of them a row;
    with TOP_K, one row for each TOP_K of the permutation. Tiles that no group has are zero."""
    tile, column = gl.program_id(0), gl.program_id(1) * 128
    start = tile * 128
    rows = R - start
    if GROUPS:
        start, rows, _ = find_tile(offs_ptr, tile, E, 128, GROUPS)
    columns = K - column
    t_ptr += column.to(gl.int64) * P_words + tile * 32
    t_scale_inv_ptr += tile.to(gl.int64) * K + column
    if rows <= 0:
        store_nothing(128, t_ptr, t_scale_inv_ptr, columns, P_words, amax_floor, POW2)
        return
    LOAD: gl.constexpr = _load_layout()
    COLUMNS: gl.constexpr = column_layout(16, gl.num_warps())
    SCALES: gl.constexpr = gl.SharedLinearLayout([[1], [2], [16], [32], [64], [4], [8]])  # a load of 16 bytes is a line
    row = gl.arange(0, 128, gl.SliceLayout(1, LOAD))
    word = gl.arange(0, 64, gl.SliceLayout(0, LOAD))
    scaled = gl.arange(0, 128, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    x_row, scale_row = start + row, start + scaled
    if TOP_K:
        x_row = gl.load(permutation_ptr + x_row, mask=row < rows, other=0).to(gl.uint32) // TOP_K
        scale_row = gl.load(permutation_ptr + scale_row, mask=scaled < rows, other=0).to(gl.uint32) // TOP_K
    x_ptr += x_row.to(gl.int64)[:, None] * (x_stride * 8) + (column // 2 + word[None, :])
    x = gl.load(x_ptr, mask=row[:, None] < rows, other=0)
    x_scale_inv_ptr += (column // 128).to(gl.int64) * scale_stride + scale_row.to(gl.int64)
    x_scale_inv = gl.load(x_scale_inv_ptr, mask=scaled < rows, other=0.0)
    shared = gl.allocate_shared_memory(gl.int16, (128, 64), _tile_layout(), x)
    row_scales = gl.allocate_shared_memory(gl.float32, (128,), SCALES, x_scale_inv)
    scales02, scales13 = gl.split(gl.reshape(row_scales.load(gl.SliceLayout(1, COLUMNS)), (32, 2, 2)))
    scales0, scales2 = gl.split(scales02)
    scales1, scales3 = gl.split(scales13)
    parts = shared._reinterpret(gl.int16, (4, 128, 16), shared_layout(16, 16))
    for part in range(4):  # unrolled it is 3 % slower
        words0, words1, words2, words3 = quarters(parts.index(part).load(COLUMNS))
        x0, y0 = unpack(words0)
        x1, y1 = unpack(words1)
        x2, y2 = unpack(words2)
        x3, y3 = unpack(words3)
        at = part % 2 * 8 + part // 2 * 64  # a part has 8 columns of each 16 of 64
        store_quarters(
            _scaled(x0, scales0), _scaled(x1, scales1), _scaled(x2, scales2), _scaled(x3, scales3), True,
            t_ptr + at * P_words, t_scale_inv_ptr + at, columns - at, P_words, amax_floor, POW2, 2, 8,
        )  # fmt: skip
        store_quarters(
            _scaled(y0, scales0), _scaled(y1, scales1), _scaled(y2, scales2), _scaled(y3, scales3), True,
            t_ptr + (at + 1) * P_words, t_scale_inv_ptr + at + 1, columns - at - 1, P_words, amax_floor, POW2, 2, 8,
        )  # fmt: skip


def requantize_t(
    x_fp8_RK: Tensor,
    x_scale_inv: Tensor,
    offs: Tensor | None,
    amax_floor: float,
    pow2: bool,
    out: tuple[Tensor, Tensor],
) -> None:
    """Launcher of `dsv3c::requantize_t`."""
    _requantize(x_fp8_RK, x_scale_inv, len(x_fp8_RK), None, 0, offs, amax_floor, pow2, out)


def permute_requantize_t(
    x_fp8_TH: Tensor,
    x_scale_inv: Tensor,
    permutation_R: Tensor,
    inverse_TK: Tensor,
    offs: Tensor,
    amax_floor: float,
    pow2: bool,
    out: tuple[Tensor, Tensor],
) -> None:
    """Launcher of `dsv3c::permute_requantize_t`."""
    permutation_R, R, top_k = permutation_R.contiguous(), len(permutation_R), inverse_TK.shape[1]
    _requantize(x_fp8_TH, x_scale_inv, R, permutation_R, top_k, offs, amax_floor, pow2, out)


def _requantize(x, x_scale_inv, R, permutation_R, top_k, offs, amax_floor, pow2, out) -> None:
    t_KP, t_scale_inv = out
    K, P = t_KP.shape
    if t_KP.numel() == 0:
        return
    x, x_scale_inv = _words(x), column_major(x_scale_inv)
    E, offs = (0, None) if offs is None else (len(offs), offs.contiguous())
    _requantize_kernel[(P // TILE, ceil_div(K, TILE))](
        x, x_scale_inv, t_KP.view(torch.int32), t_scale_inv, permutation_R, offs, R, K, x.stride(0) // 8,
        x_scale_inv.stride(1), P // 4, E, amax_floor, pow2, groups_of(offs), top_k, num_warps=WARPS,
    )  # fmt: skip


def _words(x_fp8: Tensor) -> Tensor:
    """x as words of two columns; copied if its rows do not begin at 16 bytes, or end within a tile."""
    whole = x_fp8.stride(1) == 1 and x_fp8.stride(0) % 16 == 0 and x_fp8.data_ptr() % 16 == 0
    if not whole or x_fp8.shape[1] % TILE:
        x_fp8 = dense(pad(x_fp8.view(torch.uint8), (0, -x_fp8.shape[1] % TILE)))
    return x_fp8.view(torch.int16)


def variants() -> Iterator[Variant]:
    for groups, top_k in ((0, 0), (32, 0), (32, 8)):
        pointers = {"x_ptr": I16, "x_scale_inv_ptr": F32, "t_ptr": I32, "t_scale_inv_ptr": F32}
        pointers |= {"offs_ptr": I32} if groups else {}
        pointers |= {"permutation_ptr": I32} if top_k else {}
        absent = {n: None for n in _requantize_kernel.arg_names if n.endswith("_ptr") and n not in pointers}
        flags = {"POW2": False, "GROUPS": groups, "TOP_K": top_k}
        yield Variant(_requantize_kernel, pointers | {"amax_floor": "fp32"}, flags | absent, num_warps=WARPS)
