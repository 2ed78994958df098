"""Every kernel compiles for Hopper on a machine without a GPU; what the assembler says about it."""

import pytest

offline = pytest.importorskip("dsv3c.kernels.offline", reason="needs Triton")

SHARED_LIMIT = 227 * 1024  # bytes a program may have on sm_90
VARIANTS = {v.name: v for v in offline.variants()}


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_for_sm_90(name):
    compiled = VARIANTS[name].compile()
    found = offline.resources(compiled)
    assert "target sm_90a" in compiled.asm["ptx"].replace(".target", "target")
    assert found.shared_bytes <= SHARED_LIMIT
    # Two halves use all 255 registers, some compilers two more; what is accumulated into is loaded beside them; the
    # SwiGLU gradient's 64 registers make room for 32 warps.
    few = "HALVES2" in name or "swiglu_backward" in name
    assert found.spills <= (8 if "ACCUMULATETrue" in name else 4 if few else 0)
    if "gemm" in name or "wgrad" in name:
        assert found.fp8_mma > 0
        assert found.bulk_loads > 0
