"""Quantised copies of a model's weights, made once and made again when the weight has changed.

The graphs take the copies as inputs: quantising inside them would read and write every weight in every call. A copy
is fresh while its weight is the same object, with the same storage and version, and no optimizer has stepped over it
since. The last rule is there because fused optimizers leave the version counter alone. A write through `.data` leaves
no trace at all: `compiled.weights_changed()` is for those who do that.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import dsv3c.operators  # noqa: F401  (defines torch.ops.dsv3c)
from dsv3c.numerics import Recipe

Pair = tuple[Tensor, Tensor]

_caches: "weakref.WeakSet[QuantizedWeights]" = weakref.WeakSet()


@dataclass(frozen=True)
class _Copy:
    weight: weakref.ref
    storage: int
    version: int
    pair: Pair


class QuantizedWeights:
    """The FP8 copies of one compiled model's weights, in 128x128 blocks."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.copies: dict[int, _Copy] = {}
        _watch_optimizers()
        _caches.add(self)

    def pair(self, weight: Tensor) -> Pair:
        """(w_fp8, w_scale_inv) of `weight` as it is now; quantises it if the copy is missing or stale."""
        copy = self.copies.get(id(weight))
        if (
            copy is None
            or copy.weight() is not weight
            or copy.storage != weight.data_ptr()
            or copy.version != weight._version
        ):
            key, copies = id(weight), self.copies
            alive = weakref.ref(weight, lambda _: copies.pop(key, None))
            copy = copies[key] = _Copy(alive, weight.data_ptr(), weight._version, self.quantize(weight))
        return copy.pair

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> Pair:
        return torch.ops.dsv3c.quantize_block(weight.detach(), self.recipe.amax_floor, self.recipe.pow2)

    def forget(self, weights=None) -> None:
        """Marks the copies of `weights` (all by default) stale."""
        if weights is None:
            self.copies.clear()
        else:
            for weight in weights:
                self.copies.pop(id(weight), None)

    def bytes(self) -> int:
        return sum(t.nbytes for copy in self.copies.values() for t in copy.pair)


_watching = False


def _watch_optimizers() -> None:
    """Once a process: after any optimizer's step, its parameters' copies are stale."""
    global _watching
    if not _watching:
        register_optimizer_step_post_hook(_after_step)
        _watching = True


def _after_step(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    for cache in _caches:
        cache.forget(parameter for group in optimizer.param_groups for parameter in group["params"])
