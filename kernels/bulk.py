"""Bytes copied into shared memory by the copy engine, from an address instead of a tensor's descriptor: nothing is
fetched before the first of them, and they may be any number of 16-byte units.

Addresses in shared memory are of a kernel's largest allocation, as in `cluster.py`, whose `wait` waits for a barrier.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_SET_UP = gl.constexpr("""{
    .reg .pred first;
    .reg .b32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    @first mbarrier.init.shared::cta.b64 [$1], 1;
    @first fence.mbarrier_init.release.cluster;
    mov.u32 $0, 0;
}""")
_EXPECT = gl.constexpr("""{
    .reg .pred first;
    .reg .b32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    setp.ne.and.u32 first, $2, 0, first;
    @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;
    mov.u32 $0, 0;
}""")
_COPY = gl.constexpr("""{
    .reg .pred mine;
    setp.ne.u32 mine, $5, 0;
    @mine cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$2], $3, [$4];
    mov.u32 $0, 0;
}""")
_COPY_ONCE = gl.constexpr("""{
    .reg .pred mine;
    .reg .b64 policy;
    setp.ne.u32 mine, $5, 0;
    createpolicy.fractional.L2::evict_first.b64 policy, 1.0;
    @mine cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint
        [$1], [$2], $3, [$4], policy;
    mov.u32 $0, 0;
}""")


@gluon.jit
def set_up(barrier):
    """Before any thread uses it, all must have met."""
    gl.inline_asm_elementwise(_SET_UP, "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def expect(barrier, size):
    """The barrier's next phase ends with the last of so many bytes; 0: there is none."""
    gl.inline_asm_elementwise(_EXPECT, "=r,r,r", [barrier, size], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def copy(target, source, size, barrier, mine, ONCE: gl.constexpr = False):
    """Each thread for itself, where `mine`: `size` bytes. Target, source and size are multiples of 16. ONCE: of what
    the L2 cache holds, these bytes make room first."""
    source = source.to(gl.int64, bitcast=True)
    operands = [target, source, size, barrier, mine.to(gl.int32)]
    CODE: gl.constexpr = _COPY_ONCE if ONCE else _COPY
    gl.inline_asm_elementwise(CODE, "=r,r,l,r,r,r", operands, dtype=gl.int32, is_pure=False, pack=1)
