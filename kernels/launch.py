"""How a kernel is launched: as Triton does it, without what Triton does again at each launch.

The host is ahead of the GPU only after the first long kernel, so what a launch costs the host is time of every call
that begins with an idle GPU. Triton asks for its settings, makes text of the specialisation to look it up, and checks,
specialises and encodes each descriptor of a tensor anew. Here a launch that needs no new code is recognised by Triton's
own rule (its binder, which says what a kernel is specialised on), and goes to the launcher of the kernel that is there.
What is seen for the first time goes through Triton, and so does everything while somebody has hooks on launches.

`recorded` collects launches for `replay.py`, `compiling` keeps them from starting.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from inspect import getclosurevars
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

MAPS = 1024  # encoded descriptors that are kept, for each descriptor of a kernel

_here = threading.local()  # .tape: where this thread's launches are recorded; .compiling: they start nothing


class Descriptor(TensorDescriptor):
    """Boxes of `block_shape` of a matrix, for the copy engine. Triton's, but checked by the driver alone."""

    def __init__(self, base: Tensor, block_shape: tuple[int, ...], layout: Any = None) -> None:
        self.base, self.block_shape, self.layout = base, block_shape, layout

    shape = property(lambda self: self.base.shape)
    strides = property(lambda self: self.base.stride())

    def full(self) -> TensorDescriptor | GluonTensorDescriptor:
        """What Triton compiles for."""
        fields = self.base, list(self.shape), list(self.strides), list(self.block_shape)
        return TensorDescriptor(*fields) if self.layout is None else GluonTensorDescriptor(*fields, self.layout)


class Loaded(NamedTuple):
    """A kernel that is compiled and loaded."""

    compiled: CompiledKernel
    run: Callable[..., None]
    encoders: list[Callable[..., list]]  # of each descriptor: (address, shape, strides) → the launcher's arguments

    def start(self, grid: tuple[int, int, int], stream: int, arguments: list) -> None:
        compiled = self.compiled
        self.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


class Launch(NamedTuple):
    """As it was."""

    kernel: Loaded
    grid: tuple[int, int, int]
    descs: tuple[Descriptor, ...]
    values: list  # of the arguments behind them


def launched(kernel: Any) -> Any:
    """Decorator above `triton.jit` or `gluon.jit` of a kernel; its descriptors, if any, are its first arguments."""
    if isinstance(kernel, JITFunction):  # the interpreter's are left alone
        kernel.run = _Launcher(kernel)
    return kernel


def hooked() -> bool:
    """Whether somebody, a profiler, wants to see launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


class _Launcher:
    """A kernel's `run`, which Triton calls for `kernel[grid](*args, **options)`."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel, self.first = kernel, kernel.run
        self.num_descs = sum(name.endswith("_desc") for name in kernel.arg_names)
        self.no_descs = (None,) * self.num_descs
        self.loaded: dict[tuple, Loaded] = {}

    def __call__(self, *args, grid: tuple[int, ...], warmup: bool, **options) -> CompiledKernel | None:
        device = driver.active.get_current_device()
        descs, rest = args[: self.num_descs], args[self.num_descs :]
        *_, binder = self.kernel.device_caches[device]
        bound, specialization, other = binder(*self.no_descs, *rest, **options)
        kinds = [(desc.base.dtype, desc.block_shape, desc.layout) for desc in descs]
        key = (device, *kinds, *specialization, *other.items())
        found = self.loaded.get(key)
        warmup = warmup or getattr(_here, "compiling", False)
        if found is None or warmup or hooked():
            given = [desc.full() for desc in descs] + list(rest)
            if found is None and not warmup and bound.get("CLUSTER", 1) > 1:
                _in_clusters(self.first(*given, grid=grid, warmup=True, **options), bound["CLUSTER"])
            compiled = self.first(*given, grid=grid, warmup=warmup, **options)
            if warmup or compiled is None:
                return compiled
            found = self.loaded.setdefault(key, _load(compiled))
        else:
            encoded: list = []
            for encode, desc in zip(found.encoders, descs, strict=True):
                encoded += encode(desc.base.data_ptr(), desc.shape, desc.strides)
            values = list(bound.values())[self.num_descs :]
            found.start((*grid, 1, 1)[:3], driver.active.get_current_stream(device), encoded + values)
        tape = getattr(_here, "tape", None)
        if tape is not None:
            tape.append(Launch(found, (*grid, 1, 1)[:3], descs, list(bound.values())[self.num_descs :]))
        return found.compiled


def _in_clusters(compiled: CompiledKernel, size: int) -> None:
    """Has `grid` clusters of so many programs started; the code is that of a program that stands alone."""
    num_warps, _, *rest = compiled.packed_metadata
    compiled.packed_metadata = (num_warps, size, *rest)


def _load(compiled: CompiledKernel) -> Loaded:
    encoders = [_encoder(meta) for meta in compiled.metadata.tensordesc_meta or ()]
    run = compiled.run
    if encoders:  # it encodes descriptors and calls the launcher that it was made for
        run = copy(run)
        run.launch = getclosurevars(run.launch).nonlocals["launcher"]
    return Loaded(compiled, run, encoders)


def _encoder(meta: dict[str, Any]) -> Callable[..., list]:
    from triton.backends.nvidia.driver import make_tensordesc_arg

    @lru_cache(MAPS)
    def encode(address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> list:
        base = SimpleNamespace(data_ptr=lambda: address)
        desc = SimpleNamespace(base=base, shape=shape, strides=strides, padding="zero", round_f32_to_tf32=False)
        return make_tensordesc_arg(desc, meta)

    return encode


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, this thread's launches compile kernels that are missing, and start none."""
    _here.compiling = True
    try:
        yield
    finally:
        _here.compiling = False


@contextmanager
def recorded() -> Iterator[tuple[list[Launch], list]]:
    """This thread's launches inside, and an entry for each launch that Triton sees: more than are ours if a kernel is
    not `launched`."""
    tape: list[Launch] = []
    seen: list = []
    thread = threading.get_ident()

    def hook(metadata) -> None:
        if threading.get_ident() == thread:
            seen.append(metadata)

    knobs.runtime.launch_enter_hook.add(hook)
    _here.tape = tape
    try:
        yield tape, seen
    finally:
        _here.tape = None
        knobs.runtime.launch_enter_hook.remove(hook)
