"""Every GPU kernel as a compilable variant, for machines without a GPU: tests look at registers and instructions, an
artifact ships the cubins. A variant has the types and the alignment that a launch with V3's sizes would have."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

FP8, BF16, F32, I32 = "*fp8e4nv", "*bf16", "*fp32", "*i32"
I16 = "*i16"
FAMILIES = (
    "groups",
    "quantize",
    "requantize",
    "quantize_weights",
    "e5m6",
    "gemm",
    "small_gemm",
    "wide_mm",
    "grouped_gemm",
    "wgrad",
    "wgrad_specialized",
    "router",
    "permute",
    "swiglu",
    "swiglu_backward",
    "norm",
    "norm_backward",
    "rotary",
    "cross_entropy",
    "embedding",
    "accumulate",
    "heads",
    "mla_decode",
    "warp_specialized",
    "keys",
)


@dataclass(frozen=True)
class Variant:
    """One kernel with types (`arguments`, in order; sizes that are left out are i32) and compile-time constants."""

    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None

    @property
    def name(self) -> str:
        """The kernel's name and what distinguishes this variant."""
        values = [t.lstrip("*").split(",NVMMA")[0] for t in self.arguments.values()]  # without Gluon's layouts
        values += [f"{k}{v}" for k, v in self.constants.items()]
        return "-".join(
            [self.kernel.__name__.strip("_"), *values, f"warps{self.num_warps}", f"stages{self.num_stages}"]
        )

    def compile(self) -> CompiledKernel:
        """For sm_90, without a driver."""
        names = self.kernel.arg_names
        signature = {n: "constexpr" if n in self.constants else self.arguments.get(n, "i32") for n in names}
        general = {p.name for p in self.kernel.params if p.do_not_specialize}
        aligned = [n for n, t in signature.items() if (t == "i32" and n not in general) or t.startswith("*")]
        source = (GluonASTSource if self.kernel.is_gluon() else ASTSource)(
            fn=self.kernel,
            signature=signature,
            constexprs={(names.index(n),): v for n, v in self.constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: per thread, per program, and how many FP8 tensor core instructions it holds."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    fp8_mma: int
    bulk_loads: int
    spills: int  # loads and stores of spilled registers within the innermost loop around the tensor core instructions


def resources(compiled: CompiledKernel) -> Resources:
    """Counts instructions in the PTX, of which the assembler makes one each. What is spilled it puts on the stack: only
    where there is one is the code disassembled, which takes half a second."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("-res-usage", cubin.name)
        registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
        spills = _spills(_cuobjdump("-sass", cubin.name)) if stack else 0
    fp8_mma, bulk_loads = (
        len(re.findall(instruction, compiled.asm["ptx"]))
        for instruction in (r"wgmma\.mma_async\S*\.e4m3", r"cp\.async\.bulk\.tensor\S*\.shared::\w+\.global")
    )
    return Resources(registers, stack, compiled.metadata.shared, fp8_mma, bulk_loads, spills)


def _cuobjdump(flag: str, path: str) -> str:
    """What the disassembler that Triton carries says."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout


def _spills(code: str) -> int:
    lines = [(int(at, 16), op) for at, op in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)]
    jumps = [(int(m[1], 16), at, op) for at, op in lines if (m := re.search(r"BRA\S* .*?(0x[0-9a-f]+)", op))]
    # those on a condition first: others often return from a wait that is written out of line
    loops = sorted((not op.startswith("@"), at - to, to, at) for to, at, op in jumps if to <= at)
    loops = [(first, last) for _, _, first, last in loops]
    around = {next(loop for loop in loops if loop[0] <= at <= loop[1]) for at, op in lines if "GMMA" in op}
    # without a loop over tiles around a product that is also written out behind its own loop
    innermost = {a for a in around if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in around)}
    spilled = [at for at, op in lines if "STL" in op or "LDL" in op]
    return sum(not innermost or any(first <= at <= last for first, last in innermost) for at in spilled)


def variants() -> Iterator[Variant]:
    """All that the launchers may launch: what each file of kernels says of its own."""
    for family in FAMILIES:
        yield from import_module(f"dsv3c.kernels.{family}").variants()
