"""Every GPU kernel as a compilable variant, for machines without a GPU: tests look at registers and instructions, an
artifact ships the cubins. A variant has the types and the alignment that a launch with V3's sizes would have."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from dsv3c.kernels import gemm, grouped_gemm, groups, quantize, wgrad

FP8, BF16, F32, I32 = "*fp8e4nv", "*bf16", "*fp32", "*i32"


@dataclass(frozen=True)
class Variant:
    """One kernel with types (`arguments`, in order; sizes that are left out are i32) and compile-time constants."""

    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    @property
    def name(self) -> str:
        """The kernel's name and what distinguishes this variant."""
        values = [t.lstrip("*") for t in self.arguments.values()] + [f"{k}{v}" for k, v in self.constants.items()]
        return "-".join(
            [self.kernel.__name__.strip("_"), *values, f"warps{self.num_warps}", f"stages{self.num_stages}"]
        )

    def compile(self) -> CompiledKernel:
        """For sm_90, without a driver."""
        names = self.kernel.arg_names
        signature = {n: "constexpr" if n in self.constants else self.arguments.get(n, "i32") for n in names}
        general = {p.name for p in self.kernel.params if p.do_not_specialize}
        aligned = [n for n, t in signature.items() if (t == "i32" and n not in general) or t.startswith("*")]
        source = ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs={(names.index(n),): v for n, v in self.constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
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
    """Read with the disassembler that Triton carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run([tool, flag, cubin.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    count = {op: len(re.findall(rf"\b{op}\b", code)) for op in ("QGMMA", "UTMALDG")}
    return Resources(registers, stack, compiled.metadata.shared, count["QGMMA"], count["UTMALDG"], _spills(code))


def _spills(code: str) -> int:
    lines = [(int(at, 16), op) for at, op in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)]
    jumps = [(int(m[1], 16), at) for at, op in lines if (m := re.search(r"BRA\S* .*?(0x[0-9a-f]+)", op))]
    loops = sorted(((to, at) for to, at in jumps if to <= at), key=lambda loop: loop[1] - loop[0])
    innermost = {next(loop for loop in loops if loop[0] <= at <= loop[1]) for at, op in lines if "QGMMA" in op}
    spilled = [at for at, op in lines if "STL" in op or "LDL" in op]
    return sum(not innermost or any(first <= at <= last for first, last in innermost) for at in spilled)


def variants() -> Iterator[Variant]:
    """All that the launchers may launch."""
    yield Variant(groups._tile_map_kernel, {"offs_ptr": I32, "tiles_ptr": I32, "first_ptr": I32},
                  {"BLOCK": 128, "GROUPS": 256}, num_warps=1)  # fmt: skip
    for x in (BF16, F32):
        yield Variant(quantize._quantize_tile_kernel,
                      {"x_ptr": x, "q_ptr": FP8, "scale_inv_ptr": F32, "amax_floor": "fp32"},
                      {"POW2": False, "ROWS": 16})  # fmt: skip
        yield Variant(quantize._quantize_block_kernel,
                      {"w_ptr": x, "q_ptr": FP8, "scale_inv_ptr": F32, "amax_floor": "fp32"},
                      {"POW2": False})  # fmt: skip
        yield Variant(quantize._dequantize_block_kernel, {"q_ptr": FP8, "scale_inv_ptr": F32, "w_ptr": x}, {},
                      num_warps=8)  # fmt: skip
    for x, dequantize in ((BF16, False), (F32, False), (FP8, True)):
        for grouped in (False, True):
            arguments = {"x_ptr": x, "q_ptr": I32, "scale_inv_ptr": F32, "amax_floor": "fp32"}
            constants = {
                "POW2": False,
                "DEQUANTIZE": dequantize,
                "GROUPED": grouped,
                "COLUMNS": 32 if dequantize else 64,
            }
            arguments |= {"x_scale_inv_ptr": F32} if dequantize else {}
            constants |= {} if dequantize else {"x_scale_inv_ptr": None}
            arguments |= {"tiles_ptr": I32, "first_ptr": I32} if grouped else {}
            constants |= {} if grouped else {"tiles_ptr": None, "first_ptr": None}
            yield Variant(quantize._quantize_tile_t_kernel, arguments, constants)
    yield Variant(gemm._transpose_kernel, {"w_ptr": I32, "t_ptr": I32}, {"ROWS4": 32, "COLUMNS4": 32})
    for config in gemm.SPACE:
        operands = {
            **_descriptors("x_desc", "w_desc", config),
            "y_ptr": BF16,
            "x_scale_inv_ptr": F32,
            "w_scale_inv_ptr": F32,
        }
        yield Variant(gemm._gemm_kernel, operands, *_launch(config))
        grouped = operands | {"tiles_ptr": I32, "first_ptr": I32}
        yield Variant(grouped_gemm._grouped_gemm_kernel, grouped, *_launch(config))
    for config, chunk in wgrad.SPACE:
        operands = {"dyt_scale_inv_ptr": F32, "xt_scale_inv_ptr": F32, "first_ptr": I32}
        operands |= _descriptors("dyt_desc", "xt_desc", config)
        constants, num_warps, num_stages = _launch(config)
        for dw in (BF16, F32):
            yield Variant(wgrad._wgrad_kernel, operands | {"dw_ptr": dw}, constants | {"CHUNK": chunk},
                          num_warps, num_stages)  # fmt: skip


def _descriptors(a: str, b: str, config: gemm.Config) -> dict[str, str]:
    return {a: f"tensordesc<fp8e4nv[{config.rows}, 128]>", b: f"tensordesc<fp8e4nv[{config.columns}, 128]>"}


def _launch(config: gemm.Config) -> tuple[dict[str, int], int, int]:
    tile = {"ROWS": config.rows, "COLUMNS": config.columns, "HALVES": config.halves}
    return tile, config.num_warps, config.num_stages
