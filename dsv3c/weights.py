"""Quantised copies of a model's weights, made once and made again when a weight has changed.

The graphs take the copies as inputs: quantising inside them would read and write every weight in every call. A copy
is fresh while its weight is the same object, with the same storage and version, and no optimizer has stepped over it
since. The last rule is there because fused optimizers leave the version counter alone. A write through `.data` leaves
no trace at all: `compiled.weights_changed()` is for those who do that.

Weights that are multiplied as one (`MergeLinear`) have one copy, stacked. What training adds is a second, transposed
copy, a byte a value: FP8 operands have the contraction contiguous, so that dx = dy w needs wᵀ. Without it every input
gradient would transpose its weight again (V3's MoE layer on an H200: 5.6 ms of a micro-batch).
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

import dsv3c.operators  # noqa: F401  (defines torch.ops.dsv3c)
from dsv3c.numerics import Recipe

_caches: "weakref.WeakSet[QuantizedWeights]" = weakref.WeakSet()


class _Source(NamedTuple):
    """A weight as it was. Its storage is held weakly: its address alone may be that of another one since."""

    weight: weakref.ref
    storage: StorageWeakRef
    address: int
    version: int | None  # inference tensors have none

    @classmethod
    def of(cls, weight: Tensor, forget: Callable[[weakref.ref], None]) -> "_Source":
        version = None if weight.is_inference() else weight._version
        storage = StorageWeakRef(weight.untyped_storage())
        return cls(weakref.ref(weight, forget), storage, weight.data_ptr(), version)


class _Copy(NamedTuple):
    sources: list[_Source]
    tensors: tuple[Tensor, ...]

    def is_fresh(self, weights: Sequence[Tensor]) -> bool:
        for (alive, storage, address, version), weight in zip(self.sources, weights, strict=True):
            if alive() is not weight or address != weight.data_ptr():
                return False
            if storage.cdata != weight.untyped_storage()._cdata or (version is not None and version != weight._version):
                return False
        return True


def _forget(copies: "dict[tuple[int, ...], _Copy]", key: tuple[int, ...], _: weakref.ref) -> None:
    copies.pop(key, None)


class QuantizedWeights:
    """The FP8 copies of one compiled model's weights, in 128x128 blocks."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.copies: dict[tuple[int, ...], _Copy] = {}
        _watch_optimizers()
        _caches.add(self)

    def copies_of(self, stacks: Sequence[Sequence[Tensor]], *, training: bool) -> list[Tensor]:
        """What `quantize` returns for `stacks` as they are now; it is called for those that are missing or stale.

        Runs in each call of each layer, ahead of the GPU.
        """
        size, stale = 4 if training else 2, []
        found: list[Tensor] = []
        for stack in stacks:
            key = tuple(map(id, stack))
            copy = self.copies.get(key)
            if copy is None or len(copy.tensors) < size or not copy.is_fresh(stack):
                stale.append((key, stack))
            else:
                found += copy.tensors[:size]
        if not stale:
            return found
        del found, copy  # their memory first
        self._make(stale, training)
        return self.copies_of(stacks, training=training)

    def _make(self, stale: list[tuple[tuple[int, ...], Sequence[Tensor]]], training: bool) -> None:
        copies = self.copies
        for key, _ in stale:
            copies.pop(key, None)
        made = iter(self.quantize([stack for _, stack in stale], training=training))
        for key, stack in stale:
            forget = partial(_forget, copies, key)
            sources = [_Source.of(weight, forget) for weight in stack]
            copies[key] = _Copy(sources, tuple(islice(made, 4 if training else 2)))

    @torch.no_grad()
    def quantize(self, stacks: Sequence[Sequence[Tensor]], *, training: bool) -> list[Tensor]:
        """For each stack of weights (w_fp8, w_scale_inv), and for training the same pair once more, with the strides of
        a transposed one, for the input gradient; one launch. All but a stack's last have a multiple of 128 rows."""
        weights = [weight.detach() for stack in stacks for weight in stack]
        cast = self.recipe.amax_floor, self.recipe.pow2
        return torch.ops.dsv3c.quantize_weights(weights, list(map(len, stacks)), *cast, training)

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
