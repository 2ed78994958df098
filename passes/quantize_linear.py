"""FP8 for linears and the experts' grouped linears: fprop, dgrad and wgrad, in DeepSeek-V3's recipe.

Works on the joint graph, where all three products of a linear are visible as plain `mm` and `_grouped_mm`. The three
are told apart by what they consume and produce, never by name: a product with a quantised weight transposed is fprop,
with the weight as it is dgrad, and the product that ends as the weight's gradient is wgrad.

    fprop   y  = x wᵀ    1x128 tiles of x  · 128x128 blocks of w
    dgrad   dx = dy w    1x128 tiles of dy · the same blocks (a square block is its own transpose)
    wgrad   dw = dyᵀ x   both in tiles of 128 along the tokens; x's from its FP8 copy, dequantised, transposed and
                         quantised again, so that only the FP8 copy is saved for backward

Source: DeepSeek-V3 report, section 3.3 and figure 6.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, PlainAOTInput

import dsv3c.grouped_linear
import dsv3c.operators  # noqa: F401
from dsv3c.numerics import Recipe
from dsv3c.passes.contract import Level, Tier, leave
from dsv3c.passes.rewrite import aten, insert, insert_pair, is_backward, replace, through_transposes, value

Pair = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class WeightInput:
    """Positions, among a graph's inputs, of a weight and of its quantised copy, which the backend appends."""

    weight: int
    fp8: int
    scale_inv: int


@dataclass(frozen=True)
class QuantizeLinear:
    """Before: `mm(x, wᵀ)`, `mm(dy, w)`, `mm(dyᵀ, x)` of a linear whose weight has a quantised copy.

    After: `dsv3c.gemm`, `gemm_dgrad`, `gemm_wgrad` on FP8 operands; each tensor is quantised once for all its
    consumers. Leaves alone: every other product (router, attention, head), and BF16 products of a linear without a
    quantised copy.
    """

    recipe: Recipe = Recipe()
    weights: tuple[WeightInput, ...] = ()
    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        return _Rewrite(gm, self.recipe, self.weights, _Spelling(aten.mm.default), _DENSE).run()


@dataclass(frozen=True)
class QuantizeGroupedLinear:
    """The same for the experts: `_grouped_mm(x, wᵀ, offs)` and its two gradients become `dsv3c.grouped_gemm*`."""

    recipe: Recipe = Recipe()
    weights: tuple[WeightInput, ...] = ()
    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        return sum(_Rewrite(gm, self.recipe, self.weights, spelling, _GROUPED).run() for spelling in _EXPERTS)


@dataclass(frozen=True)
class _Spelling:
    """One way in which graphs write a product with a weight."""

    product: torch._ops.OpOverload
    is_linear: bool = False  # takes w [N, K] as F.linear does, instead of its transpose
    wgrad: torch._ops.OpOverload | None = None  # an operator of its own, (dy, x), instead of product(dyᵀ, x)


_EXPERTS = (
    _Spelling(aten._grouped_mm.default),
    # For dtypes that _grouped_mm does not take.
    _Spelling(torch.ops.dsv3c.grouped_linear.default, True, torch.ops.dsv3c.grouped_linear_wgrad.default),
)
_DENSE = (torch.ops.dsv3c.gemm.default, torch.ops.dsv3c.gemm_dgrad.default, torch.ops.dsv3c.gemm_wgrad.default)
_GROUPED = (
    torch.ops.dsv3c.grouped_gemm.default,
    torch.ops.dsv3c.grouped_gemm_dgrad.default,
    torch.ops.dsv3c.grouped_gemm_wgrad.default,
)


@dataclass
class _Rewrite:
    """One walk over a graph for one kind of product."""

    gm: fx.GraphModule
    recipe: Recipe
    weights: tuple[WeightInput, ...]
    spelling: _Spelling
    kernels: tuple[torch._ops.OpOverload, torch._ops.OpOverload, torch._ops.OpOverload]
    tiles: dict[fx.Node, Pair] = field(default_factory=dict)  # rows quantised in 1x128 tiles
    tiles_t: dict[fx.Node, Pair] = field(default_factory=dict)  # transposed, in tiles along the tokens
    inputs: set[fx.Node] = field(default_factory=set)  # of the linears that were rewritten

    def run(self) -> int:
        inputs = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        self.copies = {inputs[w.weight]: (inputs[w.fp8], inputs[w.scale_inv]) for w in self.weights}
        self.gradients = _gradients(self.gm, {w.weight for w in self.weights})
        targets = (self.spelling.product, self.spelling.wgrad)
        products = [node for node in self.gm.graph.nodes if node.op == "call_function" and node.target in targets]
        return sum(self.weight_product(node) or self.weight_gradient(node) for node in products)

    def weight_product(self, node: fx.Node) -> int:
        """fprop and dgrad: the right operand is a weight with a quantised copy."""
        if node.target is self.spelling.wgrad:
            return 0
        weight, transposed = through_transposes(node.args[1])
        copy = self.copies.get(weight) or _kept_in_fp8(weight)
        if copy is None:
            if (weight.op == "placeholder" or self.kernels is _GROUPED) and not is_backward(node):
                leave(node, "its weight has no quantised copy")
            return 0
        is_fprop = transposed != self.spelling.is_linear
        if is_fprop:
            self.inputs.add(node.args[0])
        pair = self.quantized(node, node.args[0], self.floor(node))
        kernel = self.kernels[0 if is_fprop else 1]
        replace(node, insert(node, kernel, *pair, *copy, *_offs(node), value(node).dtype))
        return 1

    def weight_gradient(self, node: fx.Node) -> int:
        """wgrad: the product is the gradient of a weight with a quantised copy."""
        if node not in self.gradients:
            return 0
        left, left_transposed = through_transposes(node.args[0])
        right, right_transposed = through_transposes(node.args[1])
        contracts_rows = left_transposed != (node.target is self.spelling.wgrad) and not right_transposed
        if not contracts_rows or not self.inputs & {left, right}:
            leave(node, "a weight gradient of unknown form")
            return 0
        pairs = [*self.quantized_t(node, left), *self.quantized_t(node, right)]
        replace(node, insert(node, self.kernels[2], *pairs, *_offs(node), value(node).dtype))
        return 1

    def floor(self, node: fx.Node) -> float:
        return self.recipe.gradient_amax_floor if is_backward(node) else self.recipe.amax_floor

    def quantized(self, at: fx.Node, x: fx.Node, floor: float) -> Pair:
        if x not in self.tiles:
            self.tiles[x] = insert_pair(at, torch.ops.dsv3c.quantize_tile.default, x, floor, self.recipe.pow2)
        return self.tiles[x]

    def quantized_t(self, at: fx.Node, x: fx.Node) -> Pair:
        if x not in self.tiles_t:
            offs = _offs(at)[0] if _offs(at) else None
            if x in self.inputs:
                fp8, scale_inv = self.tiles[x]
                requantize = torch.ops.dsv3c.requantize_t.default
                pair = insert_pair(at, requantize, fp8, scale_inv, offs, self.recipe.amax_floor, self.recipe.pow2)
            else:
                quantize = torch.ops.dsv3c.quantize_tile_t.default
                pair = insert_pair(at, quantize, x, offs, self.recipe.gradient_amax_floor, self.recipe.pow2)
            self.tiles_t[x] = pair
        return self.tiles_t[x]


def _offs(node: fx.Node) -> tuple[fx.Node, ...]:
    """The groups' ends of a grouped product."""
    return tuple(node.args[2:3])


def _gradients(gm: fx.GraphModule, weights: set[int]) -> set[fx.Node]:
    """The nodes, under their transposes, that are the gradients of the inputs at the positions `weights`."""
    *_, output = gm.graph.nodes
    return {
        through_transposes(node)[0]
        for node, desc in zip(output.args[0], output.meta.get("desc", ()), strict=False)
        if isinstance(desc, GradAOTOutput) and isinstance(desc.grad_of, PlainAOTInput) and desc.grad_of.idx in weights
    }


def _kept_in_fp8(weight: fx.Node) -> Pair | None:
    """The FP8 pair of a weight that the checkpoint keeps in FP8 and the model dequantises at use."""
    return weight.args[:2] if weight.target is torch.ops.dsv3c.dequantize_block.default else None
