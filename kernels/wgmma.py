"""Tensor core products of the specialised GEMM (`warp_specialized.py`) in inline PTX: Triton's have powers of two as
sizes. Operands are told as addresses in shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language import constexpr

from dsv3c.kernels.tile_order import COLUMNS, PART


def _multiplication(columns: int) -> tuple[str, str]:
    """64 rows of x times so many of a block of w, four products one after the other, waited for: the code, and its
    operands.

    The results are those of tensors of 64 columns. What goes in are tensors too, of one number 32 times.
    """
    count = columns // 2
    results = ", ".join(f"${i}" for i in range(count))
    products = "".join(
        f"""
        wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3 {{{results}}}, x, w, {more}, 1, 1;
        add.u64 x, x, 2;
        add.u64 w, w, 2;"""
        for more in ("first", *3 * ["more"])
    )
    code = f"""{{
        .reg .b32 layout; .reg .b64 x, w; .reg .pred first, more;
        setp.ne.u32 first, 0, 0;
        setp.eq.u32 more, 0, 0;
        mov.u32 layout, 0x40000040;
        mov.b64 x, {{${count}, layout}};
        mov.b64 w, {{${count + 32}, layout}};
        wgmma.fence.sync.aligned;{products}
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
    }}"""
    return code, ",".join(["=&f"] * count + ["r"] * 64)


_MULTIPLY, _OPERANDS = map(constexpr, _multiplication(COLUMNS.value))
_MULTIPLY_PART, _PART_OPERANDS = map(constexpr, _multiplication(PART.value))
_READ = gl.constexpr("ld.shared.f32 $0, [$1];")


@gluon.jit
def multiply(x_at, w_at, L: gl.constexpr):
    """The product of 64 rows of x and a block of w at these addresses in shared memory, in parts of 64 columns."""
    x = gl.full((64, 64), x_at >> 4 & 0x3FFF, gl.int32, L)
    w = gl.full((64, 64), w_at >> 4 & 0x3FFF, gl.int32, L)
    return gl.inline_asm_elementwise(
        _MULTIPLY, _OPERANDS, [x, w], dtype=(gl.float32, gl.float32, gl.float32), is_pure=False, pack=32
    )


@gluon.jit
def multiply_part(x_at, w_at, L: gl.constexpr):
    """That with the first 64 columns alone."""
    x = gl.full((64, 64), x_at >> 4 & 0x3FFF, gl.int32, L)
    w = gl.full((64, 64), w_at >> 4 & 0x3FFF, gl.int32, L)
    return gl.inline_asm_elementwise(_MULTIPLY_PART, _PART_OPERANDS, [x, w], dtype=gl.float32, is_pure=False, pack=32)


@gluon.jit
def read(at):
    """From shared memory, without the barrier that Triton puts before it."""
    return gl.inline_asm_elementwise(_READ, "=f,r", [at], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def promote(product, scale_inv, acc):
    """acc + product · scale_inv."""
    product, scale_inv = gl.broadcast(product, gl.expand_dims(scale_inv, 1))
    return gl.fma(product, scale_inv, acc)
