"""What the gradient of SwiGLU says in PTX, for want of words in Triton.

Triton puts barriers of all warps between what it sees a kernel do to shared memory, up to five a turn of this one,
whose warps are to be apart. So it is not shown who writes there: the copy engine, started by one thread, and threads
that leave results or scales for others. They wait for each other through barriers in shared memory (`cluster.py`).
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Two threads of different warps lead: one looks ahead, one starts copies. The first places a program's tiles; what all
# warps are to know of one lies in 32 bytes of shared memory: rows as far as its group goes (0: there is no tile), its
# first row, the scales of its rows, its column; where in units of 16 bytes its dh and its columns go, and the scales of
# its columns, those of a and of dh.
_SCOUT = 512

_DRAW = gl.constexpr(f"""{{
    .reg .pred mine; .reg .b32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 mine, thread, {_SCOUT};
    mov.u32 $0, 0;
    @mine atom.relaxed.gpu.global.add.u32 $0, [$1], 1;
}}""")
# Tiles go band by band, and in a band down, then right.
_LOOK_UP = f"""{{
    .reg .pred out; .reg .b32 t, i, above, height, tile, column; .reg .b64 at, step;
    mov.u32 t, %tid.x;
    mov.u32 $0, 0;
    mov.u32 $1, 0;
    setp.ne.u32 out, t, {_SCOUT};
    @out bra skip;
    mul.lo.u32 t, $3, $4;
    setp.ge.u32 out, $2, t;
    @out bra skip;
    mul.lo.u32 t, $3, $5;
    div.u32 above, $2, t;
    mul.lo.u32 t, above, t;
    sub.u32 i, $2, t;
    mul.lo.u32 above, above, $5;
    sub.u32 height, $4, above;
    min.u32 height, height, $5;
    div.u32 column, i, height;
    mul.lo.u32 t, column, height;
    sub.u32 i, i, t;
    add.u32 tile, above, i;
    st.shared.v2.b32 [$6], {{tile, column}};
    ROWS
    skip:
}}"""
_LOOK_UP_ROWS = gl.constexpr(_LOOK_UP.replace("ROWS", "shl.b32 $0, tile, 7; mov.u32 $1, $7;"))
_LOOK_UP_GROUPS = gl.constexpr(
    _LOOK_UP.replace(
        "ROWS",
        """add.u32 t, tile, $7;
    mul.wide.u32 at, t, 4;
    add.s64 at, at, $8;
    ld.global.b32 $0, [at];
    mul.wide.u32 step, $7, 4;
    add.s64 at, at, step;
    ld.global.b32 $1, [at];""",
    )
)
_DESCRIBE = gl.constexpr(f"""{{
    .reg .pred out; .reg .b32 t, rows, tile, column, scale, dh, q, of_a, of_dh;
    mov.u32 t, %tid.x;
    setp.ne.u32 out, t, {_SCOUT};
    @out bra skip;
    ld.shared.v2.b32 {{tile, column}}, [$1];
    sub.u32 rows, $3, $2;
    mad.lo.u32 scale, column, $5, $2;
    shl.b32 dh, column, 3;
    mul.lo.u32 q, dh, $7;
    mad.lo.u32 q, tile, 8, q;
    shl.b32 t, $4, 4;
    mad.lo.u32 dh, $2, t, dh;
    shl.b32 of_a, column, 7;
    mul.lo.u32 t, tile, $6;
    add.u32 of_a, of_a, t;
    add.u32 of_dh, of_a, t;
    st.shared.v4.b32 [$1], {{rows, $2, scale, column}};
    st.shared.v4.b32 [$1 + 16], {{dh, q, of_a, of_dh}};
    skip:
    mov.u32 $0, 0;
}}""")
_READ = gl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")
# Descriptors as PTX calls the kernel's first two.
_COPY = gl.constexpr("""{
    .reg .pred one; .reg .b32 at, rows, start, scale, column, up, half; .reg .b64 desc;
    mov.u32 at, %tid.x;
    shfl.sync.idx.b32 at, at, 0, 31, -1;
    setp.ne.u32 one, at, 0;
    @one bra skip;
    ld.shared.v4.b32 {rows, start, scale, column}, [$3];
    setp.eq.u32 one, rows, 0;
    @one bra skip;
    elect.sync _|one, -1;
    add.u32 up, column, $4;
    shl.b32 up, up, 5;
    shl.b32 half, column, 1;
    shl.b32 column, column, 5;
    @one mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], 65536;
    mov.b64 desc, _swiglu_backward_kernel_param_0;
    cvta.param.u64 desc, desc;
    @one cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [$1], [desc, {column, start}], [$2];
    add.u32 at, $1, 16384;
    @one cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [at], [desc, {up, start}], [$2];
    mov.b64 desc, _swiglu_backward_kernel_param_5;
    cvta.param.u64 desc, desc;
    add.u32 at, $1, 32768;
    @one cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes
        [at], [desc, {0, half, start}], [$2];
    skip:
    mov.u32 $0, 0;
}""")
_BLANK = gl.constexpr("""{
    .reg .pred inside; .reg .b32 at, half, z;
    setp.lt.s32 inside, $2, $3;
    @inside bra skip;
    mov.u32 z, 0;
    shl.b32 half, $2, 7;
    add.u32 at, $1, half;
    st.shared.v4.b32 [at], {z, z, z, z};
    st.shared.v4.b32 [at + 16384], {z, z, z, z};
    add.u32 at, at, half;
    st.shared.v4.b32 [at + 32768], {z, z, z, z};
    st.shared.v4.b32 [at + 32896], {z, z, z, z};
    fence.proxy.async.shared::cta;
    skip:
    bar.warp.sync -1;
    mov.u32 $0, 0;
}""")
_STORE_WORDS = gl.constexpr("st.shared.v2.b32 [$1], {$2, $3}; mov.u32 $0, 0;")
_KEEP = gl.constexpr("st.shared.f32 [$1], $2; mov.u32 $0, 0;")
_FLUSH_ROWS = gl.constexpr("""{
    .reg .pred out; .reg .b32 t, row, at; .reg .b64 to; .reg .f32 x;
    mov.u32 t, %tid.x;
    sub.u32 t, t, 128;
    setp.ge.u32 out, t, 256;
    @out bra skip;
    and.b32 row, t, 127;
    setp.ge.s32 out, row, $4;
    @out bra skip;
    shl.b32 at, t, 2;
    add.u32 at, at, $1;
    ld.shared.f32 x, [at];
    shr.u32 t, t, 7;
    mad.lo.u32 row, t, $3, row;
    mul.wide.s32 to, row, 4;
    add.s64 to, to, $2;
    st.global.f32 [to], x;
    skip:
    mov.u32 $0, 0;
}""")
_FLUSH_COLUMNS = gl.constexpr("""{
    .reg .pred out; .reg .b32 t, a, b, c, d, at, of_a, of_dh; .reg .b64 to;
    mov.u32 t, %tid.x;
    sub.u32 t, t, 640;
    setp.ge.u32 out, t, 96;
    @out bra skip;
    ld.shared.v2.b32 {of_a, of_dh}, [$2 + 24];
    shl.b32 at, t, 4;
    add.u32 at, at, $1;
    ld.shared.v4.b32 {a, b, c, d}, [at];
    shr.u32 at, t, 5;
    and.b32 t, t, 31;
    setp.eq.u32 out, at, 2;
    mad.lo.u32 of_dh, at, $5, of_dh;
    selp.b32 of_dh, of_a, of_dh, out;
    selp.b64 to, $4, $3, out;
    shl.b32 t, t, 2;
    add.u32 t, t, of_dh;
    mad.wide.s32 to, t, 4, to;
    st.global.v4.b32 [to], {a, b, c, d};
    skip:
    mov.u32 $0, 0;
}""")
_SAME = gl.constexpr("mov.b32 $0, $1;")


@gluon.jit
def draw(counter):
    """The scout's: how many tiles were drawn before."""
    return gl.inline_asm_elementwise(
        _DRAW, "=r,l", [counter.to(gl.int64, bitcast=True)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def look_up(n, columns, of_groups, BAND: gl.constexpr, tiles_ptr, bound, R, slot, GROUPED: gl.constexpr):
    """The scout's: the first row of the n-th tile and the end of its group, which are under way; 0 and 0 if there is no
    such tile. Which it is is left at `slot` for `describe`."""
    if GROUPED:
        rows = gl.inline_asm_elementwise(
            _LOOK_UP_GROUPS, "=&r,=&r,r,r,r,r,r,r,l",
            [n, columns, of_groups, gl.to_tensor(BAND), slot, bound, tiles_ptr.to(gl.int64, bitcast=True)],
            dtype=(gl.int32, gl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        rows = gl.inline_asm_elementwise(
            _LOOK_UP_ROWS, "=&r,=&r,r,r,r,r,r,r", [n, columns, of_groups, gl.to_tensor(BAND), slot, R],
            dtype=(gl.int32, gl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    return rows


@gluon.jit
def describe(slot, start, end, columns, R, width, P):
    """The scout's: a tile's description."""
    gl.inline_asm_elementwise(
        _DESCRIBE, "=r,r,r,r,r,r,r,r", [slot, start, end, columns, R, width, P], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def read(at):
    """Half of a description."""
    return gl.inline_asm_elementwise(
        _READ, "=r,=r,=r,=r,r", [at], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.jit
def copy(target, full, slot, columns):
    """Has gate, up and da of the tile described at `slot` copied to `target` on, 64 KiB, announced at `full`."""
    gl.inline_asm_elementwise(_COPY, "=r,r,r,r,r", [target, full, slot, columns], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def blank(at, row, rows):
    """Zeros in place of rows of the next group, by the warp whose they are; at [128, 8], 16 bytes of gate, up and each
    half of da."""
    gl.inline_asm_elementwise(_BLANK, "=r,r,r,r", [at, row, rows], dtype=gl.int32, is_pure=False, pack=1)


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
def flush_rows(kept, ptr, gap, rows):
    """Stores the scales kept of gate, from `ptr` on, and of up, `gap` behind, each by a thread."""
    gl.inline_asm_elementwise(
        _FLUSH_ROWS, "=r,r,l,r,r", [kept, ptr.to(gl.int64, bitcast=True), gap, rows],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def flush_columns(kept, slot, dht_ptr, at_ptr, width):
    """Stores the scales kept of a tile's columns, of gate, of up and of the activation, each by a warp."""
    gl.inline_asm_elementwise(
        _FLUSH_COLUMNS, "=r,r,r,l,l,r",
        [kept, slot, dht_ptr.to(gl.int64, bitcast=True), at_ptr.to(gl.int64, bitcast=True), width],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def same(x):
    """x; what depends on it is computed here, and not kept in registers from before a loop."""
    return gl.inline_asm_elementwise(_SAME, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


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
