"""Modules that keep their weights in FP8, as a checkpoint holds them, and dequantise them at use.

Half the memory of BF16, and the compiler's FP8 passes take the pair (w_fp8, w_scale_inv) as it is: `dequantize_block`
then disappears. Eager, they compute with the dequantised weight in the input's dtype. For inference: the weights are
not trained, but gradients flow through to the inputs.

Shape suffixes: N out, K in, E experts, I expert width, D hidden; blocks of 128x128, ragged ones at the ends.
"""

from collections.abc import Callable, Iterator
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsv3c.operators  # noqa: F401  (defines torch.ops.dsv3c)
from dsv3c.config import ModelConfig
from dsv3c.layers import Experts
from dsv3c.model import DeepseekV3
from dsv3c.numerics import E4M3, TILE, Recipe, ceil_div

# What DeepSeek's checkpoints hold in FP8, and the config's word for it.
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [TILE, TILE], "activation_scheme": "dynamic"}
NOT_IN_FP8 = ("lm_head", "eh_proj")


def quantized_modules(model: DeepseekV3) -> Iterator[tuple[str, nn.Linear | Experts]]:
    """What DeepSeek's checkpoints hold in FP8, by path: all linears but head and eh_proj, and the experts. (The gate is
    not a linear.)"""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Experts) and path.rpartition(".")[2] not in NOT_IN_FP8:
            yield path, module


def keep_in_fp8(model: DeepseekV3) -> None:
    """Replaces those modules by ones that keep their weights in FP8, uninitialised, on the model's device."""
    for path, module in list(quantized_modules(model)):
        if isinstance(module, Experts):
            new: nn.Module = Float8Experts(model.config, device=module.down_proj.device)
        else:
            new = Float8Linear(module.in_features, module.out_features, device=module.weight.device)
        model.set_submodule(path, new)


def recipe_of(config: ModelConfig) -> Recipe:
    """V3's recipe; V3.1's checkpoints ask for power-of-two scales. `config` may be transformers'."""
    quantization = getattr(config, "quantization_config", None)
    return Recipe(pow2=isinstance(quantization, dict) and quantization.get("scale_fmt") == "ue8m0")


class _Float8(nn.Module):
    """Weights and scales keep their dtypes, whatever the model is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(keep_dtype, recurse)


def _weight(*shape: int, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=E4M3, device=device), requires_grad=False)


def _scale_inv(*shape: int, device: torch.device | str | None) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


class Float8Linear(_Float8, nn.Linear):
    """weight: E4M3 [N, K]; weight_scale_inv: float32 [⌈N/128⌉, ⌈K/128⌉], which multiplies to dequantise."""

    weight_scale_inv: Tensor

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = _weight(out_features, in_features, device=device)
        blocks = ceil_div(out_features, TILE), ceil_div(in_features, TILE)
        self.register_buffer("weight_scale_inv", _scale_inv(*blocks, device=device))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, torch.ops.dsv3c.dequantize_block(self.weight, self.weight_scale_inv, input.dtype))


class Float8Experts(_Float8, Experts):
    """gate_up_proj: E4M3 [E, 2I, D], down_proj: E4M3 [E, D, I]; `*_scale_inv`: float32, one per block.

    Gate and up were quantised apart, so each has blocks of its own: gate_up_proj_scale_inv is [E, 2⌈I/128⌉, ⌈D/128⌉],
    gate's first. Where I is not a multiple of 128 these are not the blocks of the stacked weight; such halves are
    dequantised apart, and the compiler leaves them as they are.
    """

    gate_up_proj_scale_inv: Tensor
    down_proj_scale_inv: Tensor

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        with torch.device("meta"):
            super().__init__(config)
        experts, dim, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        dim_blocks, width_blocks = ceil_div(dim, TILE), ceil_div(width, TILE)
        self.gate_up_proj = _weight(experts, 2 * width, dim, device=device)
        self.down_proj = _weight(experts, dim, width, device=device)
        gate_up, down = (experts, 2 * width_blocks, dim_blocks), (experts, dim_blocks, width_blocks)
        self.register_buffer("gate_up_proj_scale_inv", _scale_inv(*gate_up, device=device))
        self.register_buffer("down_proj_scale_inv", _scale_inv(*down, device=device))

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        dequantize = torch.ops.dsv3c.dequantize_block
        down_EDI = dequantize(self.down_proj, self.down_proj_scale_inv, dtype)
        if self.down_proj.shape[2] % TILE == 0:
            return dequantize(self.gate_up_proj, self.gate_up_proj_scale_inv, dtype), down_EDI
        gate, up = self.gate_up_proj.chunk(2, dim=1)
        gate_scale_inv, up_scale_inv = self.gate_up_proj_scale_inv.chunk(2, dim=1)
        halves = dequantize(gate, gate_scale_inv, dtype), dequantize(up, up_scale_inv, dtype)
        return torch.cat(halves, dim=1), down_EDI
