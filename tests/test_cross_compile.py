"""Every kernel compiles for Hopper on a machine without a GPU; what the assembler says about it."""

import re

import pytest

pytest.importorskip("triton", reason="needs Triton")

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

offline = pytest.importorskip("dsv3c.kernels.offline", reason="needs Triton")

SHARED_LIMIT = 227 * 1024  # bytes a program may have on sm_90
VARIANTS = {v.name: v for v in offline.variants()}


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_for_sm_90(name):
    compiled = VARIANTS[name].compile()
    found = offline.resources(compiled)
    assert "target sm_90a" in compiled.asm["ptx"].replace(".target", "target")
    assert found.shared_bytes <= SHARED_LIMIT
    # Two halves use all 255 registers, some compilers two more; what is accumulated into is loaded beside them. Outside
    # the loop over K, which `spills` counts, all that anybody puts on the stack is a few words of these.
    assert found.spills <= (8 if "ACCUMULATETrue" in name else 4 if "HALVES2" in name else 0)
    assert found.stack_bytes <= (72 if "ACCUMULATETrue" in name or "HALVES2" in name else 0)
    if "gemm" in name or "wgrad" in name:
        assert found.fp8_mma > 0
        assert found.bulk_loads > 0
    assert bool(barriers(compiled.asm["ptx"])) == ("mbarrier.init.shared" in compiled.asm["ptx"])
    assert not barriers(compiled.asm["ptx"]) & others(compiled.asm["ptx"])


def sizes(variant) -> list[str]:
    """Those that Triton specialises a kernel on."""
    return [
        p.name
        for p in variant.kernel.params
        if not p.do_not_specialize and p.name not in variant.arguments and p.name not in variant.constants
    ]


SIZES = {f"{v.kernel.__name__}-{size}": (v, size) for v in reversed(VARIANTS.values()) for size in sizes(v)}
SIZES.pop("_swiglu_kernel-width")  # a multiple of 128


@pytest.mark.parametrize("name", SIZES)
def test_a_size_of_one(name):
    """Triton makes it a constant, which has no methods of a tensor."""
    variant, size = SIZES[name]
    constants = variant.constants | {size: 1}
    names = variant.kernel.arg_names
    source = (offline.GluonASTSource if variant.kernel.is_gluon() else ASTSource)(
        fn=variant.kernel,
        signature={n: "constexpr" if n in constants else variant.arguments.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
    )
    target = GPUTarget("cuda", 90, 32)
    backend, context = make_backend(target), ir.context()
    options = backend.parse_options({"num_warps": variant.num_warps} | source.parse_options())
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def barriers(ptx: str) -> set[int]:
    """Where in shared memory barriers are set up.

    Nothing else may ever lie there: a GPU that interrupts a program for another process's apparently puts back the
    barriers that it knows of. Triton reuses the memory of a barrier that is not used again.
    """
    registers = set(re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]", ptx))
    return {at + i for register, at in added(ptx) if register in registers for i in range(8)}


def others(ptx: str) -> set[int]:
    """Where it is read and written, but for the bytes that tell each warp its partition: those are Triton's own."""
    at = dict(added(ptx))
    found = re.findall(r"(?:ld|st)\.shared\S*[0-9]{2} .*?\[ ?(%r\d+|global_smem)(?: ?\+ ?(\d+))? ?\]", ptx)
    return {at.get(base, 0) + int(offset or 0) for base, offset in found}


def added(ptx: str) -> list[tuple[str, int]]:
    return [(register, int(n)) for register, n in re.findall(r"add\.s32 \s*(%r\d+), %r\d+, (\d+);", ptx)]
