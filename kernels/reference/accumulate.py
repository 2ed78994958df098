"""A gradient, added to its sum."""

from torch import Tensor


def accumulate_ref(total: Tensor, x: Tensor) -> None:
    """total += x, in float32, rounded once."""
    total.add_(x)
