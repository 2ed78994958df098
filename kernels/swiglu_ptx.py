"""What the gradient of SwiGLU says in PTX, for want of words in Triton.

Triton puts barriers of all warps between what it sees a kernel do to shared memory, up to five a turn of this one,
whose warps are to be apart. So it is not shown who writes there: the copy engine, started by one thread, and threads
that leave results or scales for others. They wait for each other through barriers in shared memory (`cluster.py`).
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# By the first warp, if the last argument is not 0: descriptors as PTX calls the kernel's first two.
_COPY = gl.constexpr("""{
    .reg .pred one; .reg .b32 at, warp, half; .reg .b64 desc;
    mov.u32 warp, %tid.x;
    shfl.sync.idx.b32 warp, warp, 0, 31, -1;
    setp.eq.u32 one, warp, 0;
    setp.ne.and.b32 one, $6, 0, one;
    @!one bra skip;
    elect.sync _|one, -1;
    @one mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], 65536;
    mov.b64 desc, _swiglu_backward_kernel_param_0;
    cvta.param.u64 desc, desc;
    @one cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [desc, {$4, $3}], [$2];
    add.u32 at, $1, 16384;
    @one cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [at], [desc, {$5, $3}], [$2];
    mov.b64 desc, _swiglu_backward_kernel_param_5;
    cvta.param.u64 desc, desc;
    add.u32 at, $1, 32768;
    shr.u32 half, $4, 4;
    @one cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [at], [desc, {0, half, $3}], [$2];
    skip:
    mov.u32 $0, 0;
}""")
_STORE_WORDS = gl.constexpr("st.shared.v2.b32 [$1], {$2, $3}; mov.u32 $0, 0;")
_KEEP = gl.constexpr("st.shared.f32 [$1], $2; mov.u32 $0, 0;")
_FLUSH = gl.constexpr("""{
    .reg .pred mine; .reg .b32 thread, at; .reg .f32 x; .reg .b64 to;
    mov.u32 thread, %tid.x;
    sub.u32 thread, thread, $3;
    setp.lt.u32 mine, thread, $4;
    @!mine bra skip;
    shl.b32 at, thread, 2;
    add.u32 at, at, $1;
    ld.shared.f32 x, [at];
    mul.wide.u32 to, thread, 4;
    add.s64 to, to, $2;
    st.global.f32 [to], x;
    skip:
    mov.u32 $0, 0;
}""")
_SAME = gl.constexpr("mov.b32 $0, $1;")
_UNIFORM = gl.constexpr("shfl.sync.idx.b32 $0, $1, 0, 31, -1;")
_NOUGHT = gl.constexpr("""{
    .reg .b32 thread;
    mov.u32 thread, %tid.x;
    add.u32 thread, thread, $1;
    min.s32 $0, thread, 0;
}""")


@gluon.jit
def copy(target, full, start, column, columns, mine):
    """Has a tile's gate, up and da copied to `target` on, 64 KiB, announced at `full`, if it is `mine`."""
    gl.inline_asm_elementwise(
        _COPY, "=r,r,r,r,r,r,r", [target, full, start, column * 32, (column + columns) * 32, mine.to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def place(row, pair):
    """Where in bytes two neighbouring words of a row lie in `columns.shared_layout`."""
    chunk = pair ^ (row & 1) * 5 ^ row >> 4 & 1 ^ (row >> 5 & 1) * 2
    return (row & 63) * 512 + (chunk ^ chunk >> 3 & 3) * 16 + (row >> 6) * 8


@gluon.jit
def store_words(at, even, odd):
    """Two words each, to an address in shared memory."""
    gl.inline_asm_elementwise(_STORE_WORDS, "=r,r,r,r", [at, even, odd], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def keep(at, x):
    """Float32 numbers, each to an address in shared memory."""
    gl.inline_asm_elementwise(_KEEP, "=r,r,f", [at, x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def flush(at, ptr, FIRST: gl.constexpr, count):
    """From thread FIRST on, each of `count` threads stores one of the numbers that were kept from `at` on."""
    gl.inline_asm_elementwise(
        _FLUSH, "=r,r,l,r,r", [at, ptr.to(gl.int64, bitcast=True), FIRST, count], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def same(x):
    """x; what depends on it is computed here, and not kept in registers from before a loop."""
    return gl.inline_asm_elementwise(_SAME, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def uniform(x):
    """x, which is the same in all lanes, in a register that they share."""
    return gl.inline_asm_elementwise(_UNIFORM, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def nought(n):
    """0, if n is not negative; not known to be the same for all threads, so that what is loaded there is not moved to
    a register of all lanes, and waited for, at once."""
    return gl.inline_asm_elementwise(_NOUGHT, "=r,r", [n], dtype=gl.int32, is_pure=False, pack=1)


@triton.jit
def both(a, b):
    """The larger magnitude of each word: of a in the low half, of b in the high."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 lows, highs;
        prmt.b32 lows, $1, $2, 0x5410;
        prmt.b32 highs, $1, $2, 0x7632;
        max.NaN.xorsign.abs.bf16x2 $0, lows, highs;
        }""",
        "=r,r,r",
        [a, b],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def unpack(word):
    """The four E4M3 numbers of a word, in float32."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 a, b, c, d;
        .reg .b32 ab, cd;
        mov.b32 {a, b}, $4;
        cvt.rn.f16x2.e4m3x2 ab, a;
        cvt.rn.f16x2.e4m3x2 cd, b;
        mov.b32 {a, b}, ab;
        mov.b32 {c, d}, cd;
        cvt.f32.f16 $0, a;
        cvt.f32.f16 $1, b;
        cvt.f32.f16 $2, c;
        cvt.f32.f16 $3, d;
        }""",
        "=f,=f,=f,=f,r",
        [word],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )
