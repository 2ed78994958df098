"""Which Triton kernels an operator launches, and one configuration of each compiled for Hopper, GPU or not.

The kernels themselves say how they are compiled (kernels/offline.py); here is only the way from an operator's name, as
it stands in a graph, to a kernel. Operators whose work is a library's (attention) have no entry.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from dsv3c.errors import CompileError

# Kernel, as an artifact calls it -> Triton function and the constants that make it that one.
_FUNCTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "tile_map": ("tile_map_kernel", {}),
    "tiles_by_length": ("tiles_by_length_kernel", {}),
    "quantize_tile": ("quantize_tile_kernel", {}),
    "quantize_tile_t": ("retile_kernel", {"ROWWISE": False, "GROUPS": 0}),
    "quantize_tile_t_grouped": ("retile_kernel", {"ROWWISE": False, "GROUPS": 32}),
    "quantize_tile_both": ("retile_kernel", {"ROWWISE": True, "GROUPS": 0}),
    "quantize_tile_both_grouped": ("retile_kernel", {"ROWWISE": True, "GROUPS": 32}),
    "requantize_t": ("requantize_kernel", {"rows_ptr": None}),
    "requantize_t_grouped": ("requantize_kernel", {}),
    "rows_of_groups": ("rows_kernel", {"TOP_K": 0}),
    "rows_of_permutation": ("rows_kernel", {"TOP_K": 8}),
    "quantize_block": ("quantize_block_kernel", {}),
    "quantize_weights": ("quantize_weights_kernel", {"TRANSPOSED": False}),
    "quantize_weights_both": ("quantize_both_kernel", {}),
    "quantize_weights_transposed": ("quantize_weights_kernel", {"TRANSPOSED": True}),
    "dequantize_block": ("dequantize_block_kernel", {}),
    "quantize_e5m6": ("quantize_e5m6_kernel", {}),
    "dequantize_e5m6": ("dequantize_e5m6_kernel", {}),
    "transpose": ("transpose_kernel", {}),
    "gemm": ("gemm_kernel", {}),
    "grouped_gemm": ("grouped_gemm_kernel", {}),
    "small_gemm": ("small_gemm_kernel", {}),
    "add_splits": ("add_splits_kernel", {}),
    "wide_mm": ("wide_mm_kernel", {}),
    "add_parts": ("add_parts_kernel", {}),
    "wgrad_specialized": ("wgrad_specialized_kernel", {"ACCUMULATE": False}),
    "wgrad_specialized_accumulate": ("wgrad_specialized_kernel", {"ACCUMULATE": True}),
    "wgrad": ("wgrad_kernel", {"ACCUMULATE": False}),
    "wgrad_accumulate": ("wgrad_kernel", {"ACCUMULATE": True}),
    "gate": ("gate_kernel", {}),
    "gate_backward": ("gate_backward_kernel", {"SOFTMAX": False}),
    "count_experts": ("count_experts_kernel", {}),
    "sort_by_expert": ("sort_by_expert_kernel", {}),
    "permute": ("permute_kernel", {}),
    "unpermute": ("unpermute_kernel", {}),
    "unpermute_backward": ("unpermute_backward_kernel", {}),
    "swiglu": ("swiglu_kernel", {"SAVE": False}),
    "swiglu_save": ("swiglu_kernel", {"SAVE": True}),
    "swiglu_backward": ("swiglu_backward_kernel", {"GROUPED": False}),
    "swiglu_backward_grouped": ("swiglu_backward_kernel", {"GROUPED": True}),
    "sum_tiles": ("sum_tiles_kernel", {}),
    "draw_none": ("draw_none_kernel", {}),
    "norm": ("norm_kernel", {"residual_ptr": None}),
    "add_norm": ("norm_kernel", {}),
    "norm_backward": ("norm_backward_kernel", {}),
    "sum_programs": ("sum_programs_kernel", {}),
    "rotate_heads": ("rotate_heads_kernel", {}),
    "latent": ("latent_kernel", {"PAGE": 0}),
    "latent_append": ("latent_kernel", {"PAGE": 64}),
    "cross_entropy": ("cross_entropy_kernel", {}),
    "scale": ("scale_kernel", {}),
    "fill": ("fill_kernel", {}),
    "embedding_backward": ("embedding_backward_kernel", {}),
    "accumulate": ("accumulate_kernel", {}),
    "cast_queries": ("cast_heads_kernel", {"ROTATE": True}),
    "cast_keys": ("cast_heads_kernel", {"ROTATE": False}),
    "warp_specialized_gemm": ("warp_specialized_gemm_kernel", {"GROUPED": False}),
    "warp_specialized_grouped_gemm": ("warp_specialized_gemm_kernel", {"GROUPED": True}),
    "warp_specialized_gemm_keys": ("warp_specialized_gemm_kernel", {"GROUPED": False, "GAP": 64}),
    "fill_rope": ("fill_rope_kernel", {}),
    "mla_decode": ("mla_decode_kernel", {}),
    "mla_decode_combine": ("combine_kernel", {}),
}

_KERNELS: dict[str, tuple[str, ...]] = {
    "dsv3c.quantize_tile.default": ("quantize_tile",),
    "dsv3c.quantize_tile_t.default": ("quantize_tile_t", "quantize_tile_t_grouped"),
    "dsv3c.quantize_tile_both.default": ("quantize_tile_both", "quantize_tile_both_grouped"),
    "dsv3c.requantize_t.default": ("requantize_t", "requantize_t_grouped", "rows_of_groups"),
    "dsv3c.quantize_block.default": ("quantize_block",),
    "dsv3c.quantize_weights.default": ("quantize_weights", "quantize_weights_transposed", "quantize_weights_both"),
    "dsv3c.dequantize_block.default": ("dequantize_block",),
    "dsv3c.quantize_e5m6.default": ("quantize_e5m6",),
    "dsv3c.dequantize_e5m6.default": ("dequantize_e5m6",),
    "dsv3c.gemm_wgrad.default": ("wgrad", "wgrad_specialized"),
    "dsv3c.gemm_wgrad_accumulate.default": ("wgrad_accumulate", "wgrad_specialized_accumulate"),
    "dsv3c.gemm.default": ("gemm", "small_gemm", "add_splits", "warp_specialized_gemm"),
    "dsv3c.wide_mm.default": ("wide_mm", "add_parts"),
    "dsv3c.gemm_keys.default": ("warp_specialized_gemm_keys", "fill_rope"),
    "dsv3c.gemm_dgrad.default": ("gemm", "small_gemm", "add_splits", "warp_specialized_gemm", "transpose"),
    "dsv3c.grouped_gemm.default": ("grouped_gemm", "warp_specialized_grouped_gemm", "tile_map", "tiles_by_length"),
    "dsv3c.grouped_gemm_dgrad.default": (
        "grouped_gemm",
        "warp_specialized_grouped_gemm",
        "tiles_by_length",
        "transpose",
        "tile_map",
    ),
    "dsv3c.grouped_gemm_wgrad.default": ("wgrad", "wgrad_specialized", "tile_map"),
    "dsv3c.grouped_gemm_wgrad_accumulate.default": (
        "wgrad_accumulate",
        "wgrad_specialized_accumulate",
        "tile_map",
    ),
    "dsv3c.gate.default": ("gate",),
    "dsv3c.gate_backward.default": ("gate_backward",),
    "dsv3c.sort_by_expert.default": ("count_experts", "sort_by_expert"),
    "dsv3c.permute.default": ("permute",),
    "dsv3c.permute_requantize_t.default": ("requantize_t_grouped", "rows_of_permutation"),
    "dsv3c.unpermute.default": ("unpermute",),
    "dsv3c.unpermute_backward.default": ("unpermute_backward",),
    "dsv3c.swiglu_quantize.default": ("swiglu",),
    "dsv3c.swiglu_quantize_save.default": ("swiglu_save",),
    "dsv3c.swiglu_quantize_backward.default": (
        "swiglu_backward",
        "swiglu_backward_grouped",
        "sum_tiles",
        "tile_map",
        "draw_none",
    ),
    "dsv3c.rms_norm_quantize.default": ("norm",),
    "dsv3c.add_rms_norm_quantize.default": ("add_norm",),
    "dsv3c.rms_norm_backward.default": ("norm_backward", "sum_programs"),
    "dsv3c.rotate_heads_.default": ("rotate_heads",),
    "dsv3c.latent_quantize.default": ("latent",),
    "dsv3c.latent_append_.default": ("latent_append",),
    "dsv3c.rotate_heads.default": ("rotate_heads",),
    "dsv3c.rotate_quantize_both.default": ("cast_queries",),
    "dsv3c.join_quantize_both.default": ("cast_keys",),
    "dsv3c.mla_decode.default": ("mla_decode", "mla_decode_combine"),
    "dsv3c.cross_entropy_.default": ("cross_entropy",),
    "dsv3c.linear_cross_entropy.default": ("cross_entropy",),
    "dsv3c.scale_.default": ("scale",),
    "dsv3c.embedding_backward.default": ("fill", "embedding_backward"),
    "dsv3c.accumulate_.default": ("accumulate",),
}


@dataclass(frozen=True)
class CompiledKernel:
    """A cubin for sm_90a, and what it is: types, constants, warps, registers, stack, spills, shared memory."""

    name: str
    cubin: bytes
    description: dict[str, Any]


def kernels_of(operators: Iterable[str]) -> list[str]:
    """Names of the kernels that `operators`, such as `dsv3c.gemm.default`, launch."""
    return sorted({kernel for operator in operators for kernel in _KERNELS.get(operator, ())})


def _variant(name: str) -> Any:
    from dsv3c.kernels import offline

    function, constants = _FUNCTIONS[name]
    return next(
        v for v in offline.variants()
        if v.kernel.__name__.strip("_") == function and constants.items() <= v.constants.items()
    )  # fmt: skip


def compile_kernel(name: str, *, pow2: bool) -> CompiledKernel:
    """The kernel `name` in the first configuration of its search space, for BF16 where its types vary.

    Raises:
        CompileError: no Triton here, or one that cannot compile it.
    """
    try:
        from dsv3c.kernels import offline
    except ImportError as error:
        raise CompileError(f"kernel {name}: expected Triton, which compiles for Hopper, found {error}") from None
    variant = _variant(name)
    if "POW2" in variant.constants:
        variant = replace(variant, constants=variant.constants | {"POW2": pow2})
    try:
        compiled = variant.compile()
    except Exception as error:  # whatever the compiler's stages raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompileError(f"kernel {name}: expected Triton to compile it for sm_90a, found {reason}") from error
    return CompiledKernel(
        name,
        compiled.asm["cubin"],
        {
            "kernel": _FUNCTIONS[name][0],
            "arch": "sm_90a",
            "types": variant.arguments,
            "constants": variant.constants,
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            **asdict(offline.resources(compiled)),
        },
    )
