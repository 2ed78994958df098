"""How an operator is registered, and the checks that operators share."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dsv3c import ahead
from dsv3c.errors import Dsv3cError
from dsv3c.numerics import E4M3, MIN_AMAX_FLOOR, TILE, ceil_div

_LIBRARY = torch.library.Library("dsv3c", "FRAGMENT")


class OperatorError(Dsv3cError):
    """A dsv3c operator was called with tensors that do not fit together."""


def expect(name: str, found, expected) -> None:
    if found != expected:
        raise OperatorError(f"{name}: expected {expected}, found {found}; try the shapes in kernels/reference/")


def check_rank(name: str, x: Tensor, dimensions: int) -> None:
    expect(f"number of dimensions of {name}", x.dim(), dimensions)


def check_wide(name: str, dtype: torch.dtype) -> None:
    """Real numbers of 16 bits or more."""
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise OperatorError(f"dtype of {name}: expected floating point of 16 bits or more, found {dtype}; try bfloat16")


def check_matrices(name: str, x: Tensor) -> None:
    if x.dim() < 2:
        raise OperatorError(f"number of dimensions of {name}: expected at least 2, found {x.dim()}; try x[None]")


def _check_devices(names: list[str], args: tuple) -> None:
    """All tensors are where the first is."""
    device = None
    for name, arg in zip(names, args, strict=False):
        for x in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(x, Tensor):
                device = device or x.device
                if x.device != device:
                    raise OperatorError(
                        f"device of {name}: expected {device}, found {x.device}; try {name}.to({device})"
                    )


def check_tiles(name: str, x_RK: Tensor, scale_inv: Tensor) -> None:
    """An FP8 pair of 1×128 tiles."""
    check_rank(name, x_RK, 2)
    expect(f"dtype of {name}", x_RK.dtype, E4M3)
    expect(f"dtype of {name}'s scale_inv", scale_inv.dtype, torch.float32)
    R, K = x_RK.shape
    expect(f"shape of {name}'s scale_inv", tuple(scale_inv.shape), (R, ceil_div(K, TILE)))


def check_blocks(name: str, w_NK: Tensor, scale_inv: Tensor) -> None:
    """An FP8 pair of 128×128 blocks."""
    check_matrices(name, w_NK)
    expect(f"dtype of {name}", w_NK.dtype, E4M3)
    expect(f"dtype of {name}'s scale_inv", scale_inv.dtype, torch.float32)
    *batch, N, K = w_NK.shape
    expect(f"shape of {name}'s scale_inv", tuple(scale_inv.shape), (*batch, ceil_div(N, TILE), ceil_div(K, TILE)))


def count_groups(offs: Tensor) -> int:
    """The number of groups; a SymInt while tracing."""
    check_rank("offs", offs, 1)
    expect("dtype of offs", offs.dtype, torch.int32)
    return offs.shape[0]


def check_floor(amax_floor: float) -> None:
    if not amax_floor >= MIN_AMAX_FLOOR:
        raise OperatorError(
            f"amax_floor: expected at least {MIN_AMAX_FLOOR:g}, found {amax_floor:g}; try numerics.Recipe's"
        )


def empty_tiles(x: Tensor, rows, columns) -> tuple[Tensor, Tensor]:
    """An FP8 pair of 1×128 tiles; scale_inv column-major."""
    scale_inv = x.new_empty((ceil_div(columns, TILE), rows), dtype=torch.float32).t()
    return x.new_empty((rows, columns), dtype=E4M3), scale_inv


def define(schema: str, allocate: Callable, definition: Callable, kernels: str, flops: Callable | None = None) -> None:
    """Register the operator `schema` (its name and signature, as torch.library takes them).

    Args:
        allocate: checks the arguments and makes the results, on any device and on fake tensors; None if the operator
            writes to an argument instead.
        definition: returns the results; of `kernels/reference/`, what runs on the CPU.
        kernels: the module of `dsv3c.kernels` whose function of the operator's name, called with the arguments and the
            results of `allocate`, fills those on a GPU; imported at the first call.
        flops: from shapes, for torch's counter.
    """
    name = schema.partition("(")[0]
    names = [argument.name for argument in torch._C.parse_schema(f"dsv3c::{schema}").arguments]

    def checked(*args):
        _check_devices(names, args)
        return allocate(*args)

    def cpu(*args):
        started = ahead.result(name, args)
        if started is not None:
            return started
        checked(*args)
        return definition(*args)

    @cache
    def launcher() -> Any:
        from dsv3c.kernels.replay import Replay  # needs Triton

        return Replay(checked, getattr(import_module(f"dsv3c.kernels.{kernels}"), name))

    def cuda(*args):
        started = ahead.result(name, args)
        return launcher()(*args) if started is None else started

    ahead.known[name] = lambda args: launcher().known(args)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"dsv3c::{name}", checked, lib=_LIBRARY)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.dsv3c, name))(flops)
