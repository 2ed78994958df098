"""Quantised copies of a model's weights, made once and made again when a weight has changed.

The graphs take the copies as inputs: quantising inside them would read and write every weight in every call. A copy
is fresh while its weight is the same object, with the same storage and version, and no optimizer has stepped over it
since. The last rule is there because fused optimizers leave the version counter alone. A write through `.data` leaves
no trace at all: `compiled.weights_changed()` is for those who do that.

Weights that are multiplied as one (`MergeLinear`) have one copy, stacked. What training adds is a second, transposed
copy, a byte a value: FP8 operands have the contraction contiguous, so that dx = dy w needs wᵀ. Without it every input
gradient would transpose its weight again (V3's MoE layer: 1.6 ms of a micro-batch).
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import dsv3c.operators  # noqa: F401  (defines torch.ops.dsv3c)
from dsv3c.numerics import Recipe

_caches: "weakref.WeakSet[QuantizedWeights]" = weakref.WeakSet()


class _Copy(NamedTuple):
    sources: list[tuple[weakref.ref, int, int]]  # of each weight: itself, its storage, its version
    tensors: tuple[Tensor, ...]

    def is_fresh(self, weights: Sequence[Tensor]) -> bool:
        for (alive, storage, version), weight in zip(self.sources, weights, strict=True):
            if alive() is not weight or storage != weight.data_ptr() or version != weight._version:
                return False
        return True


class QuantizedWeights:
    """The FP8 copies of one compiled model's weights, in 128x128 blocks."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.copies: dict[tuple[int, ...], _Copy] = {}
        _watch_optimizers()
        _caches.add(self)

    def copy(self, weights: Sequence[Tensor], *, training: bool) -> tuple[Tensor, ...]:
        """What `quantize` returns for `weights` as they are now; quantises them if that is missing or stale."""
        key, size = tuple(map(id, weights)), 4 if training else 2
        found = self.copies.get(key)
        if found is None or len(found.tensors) < size or not found.is_fresh(weights):
            self.copies.pop(key, None)  # its memory first
            copies = self.copies
            sources = [(weakref.ref(w, lambda _: copies.pop(key, None)), w.data_ptr(), w._version) for w in weights]
            found = copies[key] = _Copy(sources, self.quantize(weights, training=training))
        return found.tensors[:size]

    @torch.no_grad()
    def quantize(self, weights: Sequence[Tensor], *, training: bool) -> tuple[Tensor, ...]:
        """(w_fp8, w_scale_inv) of the stack of `weights`, of which all but the last have a multiple of 128 rows. For
        training also the same pair once more, with the strides of a transposed one, for the input gradient."""
        ops, cast = torch.ops.dsv3c, (self.recipe.amax_floor, self.recipe.pow2)
        quantize = ops.quantize_block_both if training else ops.quantize_block
        parts = zip(*(quantize(weight.detach(), *cast) for weight in weights), strict=True)
        stacked = [_cat(tensors, dim) for tensors, dim in zip(parts, (-2, -2, -1, -1), strict=False)]
        return *stacked[:2], *(tensor.mT for tensor in stacked[2:])

    def forget(self, weights: Iterable[Tensor] | None = None) -> None:
        """Marks the copies of `weights` (all by default) stale."""
        if weights is None:
            self.copies.clear()
        else:
            stale = set(map(id, weights))
            for key in [key for key in self.copies if not stale.isdisjoint(key)]:
                del self.copies[key]

    def bytes(self) -> int:
        return sum(t.nbytes for copy in self.copies.values() for t in copy.tensors)


def _cat(tensors: tuple[Tensor, ...], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


_watching = False


def _watch_optimizers() -> None:
    """Once a process: after any optimizer's step, its parameters' copies are stale."""
    global _watching
    if not _watching:
        register_optimizer_step_post_hook(_after_step)
        _watching = True


def _after_step(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for cache in _caches:
        cache.forget(stepped)
