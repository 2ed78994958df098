"""Barriers and copies of two programs that run as a cluster, side by side on neighbouring multiprocessors.

Triton 3.6 has no words for them. A kernel is compiled as if each program stood alone, and started two by two
(`launch.py`); what one does to the other is inline PTX here. PTX is told addresses in shared memory, so what is shared
lies in the kernel's largest allocation, which begins where shared memory does; and it calls a descriptor by the name of
the kernel's parameter.

Triton's own barriers hold up the warps of a partition for each other; these here do not, and serve single programs too.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

EVICT_FIRST = gl.constexpr(0x12F00000)  # upper halves of what the copy engine takes as a policy for the L2 cache
EVICT_NORMAL = gl.constexpr(0x10000000)
_START = gl.constexpr("mov.u32 $0, global_smem;")
_MEET = gl.constexpr("""
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire;
    mov.u32 $0, 0;
""")
_OF_OTHER = gl.constexpr("""{
    .reg .b32 other;
    mov.u32 other, %cluster_ctarank;
    xor.b32 other, other, 1;
    mapa.shared::cluster.u32 $0, $1, other;
}""")
_ARRIVE = gl.constexpr("""{
    .reg .pred one;
    elect.sync _|one, -1;
    @one mbarrier.arrive.shared::cluster.b64 _, [$1];
    mov.u32 $0, 0;
}""")
_EXPECT = gl.constexpr("""{
    .reg .pred one;
    bar.warp.sync -1;
    elect.sync _|one, -1;
    @one mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;
    mov.u32 $0, 0;
}""")
_WAIT = gl.constexpr("""{
    .reg .pred done;
    again:
    mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2;
    @!done bra.uni again;
    mov.u32 $0, 0;
}""")


def copy_through(parameter: str) -> gl.constexpr:
    """The code of `copy_to_both` for the descriptor that is this parameter of the kernel, as PTX calls it."""
    return gl.constexpr(f"""{{
        .reg .pred one; .reg .b16 both; .reg .b64 desc;
        elect.sync _|one, -1;
        mov.b16 both, 3;
        mov.b64 desc, {parameter};
        cvta.param.u64 desc, desc;
        @one cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
            [$1], [desc, {{$4, $3}}], [$2], both;
        mov.u32 $0, 0;
    }}""")


def hinted_copy_through(parameter: str) -> gl.constexpr:
    """The code of `copy_hinted`."""
    return gl.constexpr(f"""{{
        .reg .pred one; .reg .b32 low; .reg .b64 desc, hint;
        elect.sync _|one, -1;
        mov.u32 low, 0;
        mov.b64 hint, {{low, $5}};
        mov.b64 desc, {parameter};
        cvta.param.u64 desc, desc;
        @one cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint
            [$1], [desc, {{$4, $3}}], [$2], hint;
        mov.u32 $0, 0;
    }}""")


@gluon.jit
def start_of_shared():
    """The address where shared memory begins."""
    return gl.inline_asm_elementwise(_START, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def meet():
    """Every thread of both programs waits for all others; then both have seen each other's barriers set up."""
    gl.inline_asm_elementwise(_MEET, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def of_other(barrier):
    """The other program's barrier where this one has its own."""
    return gl.inline_asm_elementwise(_OF_OTHER, "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def arrive(barrier):
    """Each warp once."""
    gl.inline_asm_elementwise(_ARRIVE, "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def expect(barrier, size):
    """By one warp: the barrier's next phase ends with the last of so many bytes. What it wrote before is seen then."""
    gl.inline_asm_elementwise(_EXPECT, "=r,r,r", [barrier, size], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait(barrier, phase):
    """Each warp for itself."""
    gl.inline_asm_elementwise(_WAIT, "=r,r,r", [barrier, phase], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def copy_to_both(CODE: gl.constexpr, row, column, target, barrier):
    """By one warp: a box of the descriptor to `target` in both programs, announced at `barrier` of each."""
    gl.inline_asm_elementwise(CODE, "=r,r,r,r,r", [target, barrier, row, column], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def copy_hinted(CODE: gl.constexpr, row, column, target, barrier, hint):
    """By one warp: a box of the descriptor to `target` in this program; `hint` is EVICT_FIRST or EVICT_NORMAL."""
    operands = [target, barrier, row, column, hint]
    gl.inline_asm_elementwise(CODE, "=r,r,r,r,r,r", operands, dtype=gl.int32, is_pure=False, pack=1)
