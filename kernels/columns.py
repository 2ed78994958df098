"""How a cast reads columns of a tile that came in as rows: through shared memory, transposed by the hardware.

`ldmatrix.trans` gives a thread, of each of four 8×8 matrices of 16 bits, two numbers of one column, in one register.
Which rows make up a matrix is free: with rows 16 and 32 apart from lane to lane, a thread has 16 neighbouring rows of
its column: one scale to compute for them, and 16 bytes of E4M3 at a time to store. A matrix's row of 16 bytes is half
of a tile's row and half of the row 64 below, so that eight threads have a column: they store a whole line. Pairs of
rows are one 32-bit word, so that BF16 maxima take one instruction for two (`tiles.py`); in FP8 the 16 bits are two
neighbouring columns.

Compared with a layout of bytes or words that Triton transposes through shared memory: one barrier instead of several
(of 21 in `heads.py`), and no bank conflicts, which a test counts. Whole lines instead of halves take 3 % off
`requantize_t`, by 20 fewer registers, and add up to 1 % to casts of BF16, which compute more scales.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsv3c.kernels.tiles import divide, high, larger, low, magnitude


@gluon.constexpr_function
def shared_layout(columns: int, bits: int) -> gl.SharedLinearLayout:
    """128 rows in chunks of 16 bytes, half of a row and half of the row 64 below. Chunks are exchanged so that neither
    the eight of a matrix (rows 0 or 1, plus 0, 16, 32 or 48) nor those that eight threads write, 8 or 16 columns each,
    meet in a bank."""
    half = 64 // bits
    across = [1 << i for i in range((columns - 1).bit_length())]
    inside = [[0, c] for c in across if c < half] + [[64, 0]]
    chunks = [[0, c + half * {8: 1, 16: 2}.get(c // half, 0)] for c in across if c >= half]
    return gl.SharedLinearLayout(
        inside + chunks + [[r, {1: 5, 16: 1, 32: 2}.get(r, 0) * half % columns] for r in (1, 2, 4, 8, 16, 32)]
    )


@gluon.constexpr_function
def column_layout(columns: int, warps: int) -> gl.DistributedLinearLayout:
    """16 bits of each of 128 rows × columns: 16 rows of a column a thread, 4 columns a warp at a time: whole lines."""
    rest = [[0, 1 << i] for i in range(2, (columns - 1).bit_length())]
    split = warps.bit_length() - 1
    along = [[1, 0], [2, 0], [4, 0], [8, 0]]
    lanes = [[16, 0], [32, 0], [0, 1], [0, 2], [64, 0]]
    return gl.DistributedLinearLayout(along + rest[split:], lanes, rest[:split], [], [128, columns])


@gluon.jit
def even_odd(x):
    """Rows 2i and rows 2i + 1 of x [2n, C]; nothing moves."""
    N: gl.constexpr = x.shape[0] // 2
    C: gl.constexpr = x.shape[1]
    return gl.split(gl.permute(gl.reshape(x, (N, 2, C)), (0, 2, 1)))


@triton.jit
def unpack(pair):
    """Both E4M3 numbers of 16 bits, in float32."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 a, b;
        .reg .b32 both;
        cvt.rn.f16x2.e4m3x2 both, $2;
        mov.b32 {a, b}, both;
        cvt.f32.f16 $0, a;
        cvt.f32.f16 $1, b;
        }""",
        "=f,=f,h",
        [pair],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def quarters(x):
    """Rows 4i, 4i + 1, 4i + 2 and 4i + 3 of x [128, C]; nothing moves."""
    even, odd = even_odd(x)
    x0, x2 = even_odd(even)
    x1, x3 = even_odd(odd)
    return x0, x1, x2, x3


@gluon.jit
def load_words(shared):
    """BF16 [128, C] as words of two rows, [32, C] twice: rows 4i and 4i + 1, rows 4i + 2 and 4i + 3."""
    x = shared.load(column_layout(shared.shape[1], gl.num_warps()))
    first, second = even_odd(x.to(gl.int16, bitcast=True))
    words = first.to(gl.uint16, bitcast=True).to(gl.int32) | (second.to(gl.int32) << 16)
    return even_odd(words)


@gluon.jit
def halves(x):
    """x [32, C] as [2, 16, C]: a reduction takes neighbouring lanes, and those that have a column are not."""
    return gl.reshape(x, (2, 16, x.shape[1]))


@gluon.jit
def of_columns(x, like):
    """One number for each column, laid out for use beside `like` [32, C]."""
    return gl.convert_layout(x, gl.SliceLayout(0, like.type.layout), assert_trivial=True)


@gluon.jit
def largest(words, others):
    """Of each column."""
    top = gl.reduce(gl.reduce(halves(larger(words, others)), 1, larger), 0, larger)
    return of_columns(magnitude(top), words)


@triton.jit
def pack_rows(x0, x1, x2, x3):
    """E4M3 of four numbers in one 32-bit word, the first in the lowest byte."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [x0, x1, x2, x3],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def divide_words(words, others, first, second):
    """What `load_words` gave, divided by what `first, second` are the reciprocals of (`tiles.py`), to E4M3."""
    return pack_rows(
        divide(low(words), first, second), divide(high(words), first, second),
        divide(low(others), first, second), divide(high(others), first, second),
    )  # fmt: skip


@gluon.jit
def store_columns(words, scale_inv, t_ptr, scale_inv_ptr, columns, P_words):
    """words [R/4, C], four rows of a column each, and scales, to rows of t as far as columns go."""
    LAYOUT: gl.constexpr = words.type.layout
    word = gl.arange(0, words.shape[0], gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, words.shape[1], gl.SliceLayout(0, LAYOUT))
    gl.store(t_ptr + (column[None, :] * P_words + word), words, mask=column[None, :] < columns)
    gl.store(scale_inv_ptr + column, scale_inv, mask=column < columns)
