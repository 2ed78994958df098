"""Launches and calls that came before: Triton's binder is the oracle for what a launch needs, and kernels that are
Python functions of addresses show what a replayed call does."""

import ctypes
import random
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from dsv3c.kernels import launch, offline, replay
from dsv3c.kernels.launch import Descriptor, launched
from dsv3c.kernels.replay import Replay
from dsv3c.kernels.warp_specialized import BF16_TILES

NARROW = replace(BF16_TILES, swizzle_byte_width=64)
CPU = -1  # what a tensor on the CPU says its device is


class Compiled:
    """A kernel that runs `function` with addresses in place of tensors."""

    def __init__(self, function, num_descs, what=None) -> None:
        self.metadata = SimpleNamespace(tensordesc_meta=[{}] * num_descs)
        self.function, self.packed_metadata, self.run, self.what = function, None, Run(function, num_descs), what


class Run:
    """As Triton's: with descriptors, `launch` encodes them, and is made around the launcher."""

    def __init__(self, function, num_descs) -> None:
        def launcher(*arguments):
            function(*addresses(arguments))

        def encoding(*arguments):
            raise AssertionError("descriptors were encoded again")
            launcher(*arguments)

        self.launch = encoding if num_descs else launcher

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        assert stream == "stream"
        self.launch(*arguments)


def addresses(arguments):
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]


def fake(kernel, monkeypatch, function=lambda *arguments: None):
    """`kernel`, whose first launches are of `Compiled`; its binder is Triton's."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    monkeypatch.setattr(kernel, "device_caches", {CPU: ({}, {}, None, backend, binder)})
    launcher = launch._Launcher(kernel)

    def first(*args, grid, warmup, **options):
        if not warmup:
            knobs.runtime.launch_enter_hook(None)
            function(*addresses(args))
        return Compiled(function, launcher.num_descs, binder(*args, **options)[1:])

    monkeypatch.setattr(launcher, "first", first)
    monkeypatch.setattr(kernel, "run", launcher)
    return binder


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: CPU, get_current_stream=lambda device: "stream")
    for module in (launch, replay):
        monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(replay, "_empty", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(launch, "_encoder", lambda meta: lambda address, shape, strides: [(address, shape, strides)])


@launched
@triton.jit(do_not_specialize=["R"])
def _plain(x_ptr, y_ptr, R, N, scale, FLAG: tl.constexpr):
    pass


@launched
@triton.jit(do_not_specialize=["R"])
def _described(x_desc, w_desc, y_ptr, R, N, BLOCK: tl.constexpr):
    pass


def memory(dtype, offset):
    return torch.zeros(4096, dtype=torch.uint8)[16 * 4 + offset :][:1024].view(dtype).view(16, -1)


def test_each_launch_is_of_the_kernel_that_triton_would_compile_for_it(monkeypatch):
    binder = fake(_plain, monkeypatch)
    dtypes, sizes = (torch.uint8, torch.bfloat16, torch.float32), (1, 2, 16, 17, 2**31, 2**31 + 16)
    pointers = [None, *(memory(dtype, offset) for dtype in dtypes for offset in (0, 4, 16))]
    cases = list(product(pointers, pointers, sizes, sizes, (0.5, 2.0), (False, True), (1, 4)))
    seen = set()
    for *args, warps in random.Random(0).sample(cases, 3000):
        expected = binder(*args, num_warps=warps)[1:]
        assert _plain[(1,)](*args, num_warps=warps).what == expected
        seen.add(str(expected))
    assert 500 < len(seen) < 2000
    assert len(_plain.run.loaded) == len(seen)


def test_launches_with_descriptors(monkeypatch):
    started = []
    binder = fake(_described, monkeypatch, lambda *arguments: started.append(arguments))
    kinds = [(torch.bfloat16, (64, 64), None), (torch.bfloat16, (64, 128), None), (torch.float8_e4m3fn, (64, 64), None),
             (torch.bfloat16, (64, 64), BF16_TILES), (torch.bfloat16, (64, 64), NARROW)]  # fmt: skip
    kernels = set()
    for a, b, turn in product(kinds, kinds, range(2)):
        x, w = (torch.zeros(256, 256 + 128 * turn, dtype=dtype) for dtype, _, _ in (a, b))
        descs = Descriptor(x, *a[1:]), Descriptor(w, *b[1:])
        compiled = _described[(1,)](*descs, x, 5, 16, 64)
        assert compiled.what == binder(*(desc.full() for desc in descs), x, 5, 16, 64)[1:]
        kernels.add(id(compiled))
    assert len(kernels) == len(kinds) ** 2
    assert started[-1] == (
        (x.data_ptr(), x.shape, x.stride()), (w.data_ptr(), w.shape, w.stride()), x.data_ptr(), 5, 16, 64
    )  # fmt: skip


@launched
@triton.jit
def _clustered(x_ptr, CLUSTER: tl.constexpr):
    pass


@pytest.mark.parametrize("size", [1, 2])
def test_a_cluster_from_the_first_launch_on(size, monkeypatch):
    """Triton compiles for one program alone; what is started is what the kernel's packed metadata says then."""
    started = []
    fake(_clustered, monkeypatch)
    compiled = Compiled(None, 0)
    compiled.packed_metadata = (4, 1, 1024)
    compiled.run = lambda x, y, z, stream, function, metadata, *rest: started.append((x, metadata))

    def first(x, size, *, grid, warmup, **options):
        if not warmup:
            started.append((*grid, compiled.packed_metadata))
        return compiled

    monkeypatch.setattr(_clustered.run, "first", first)
    for _ in range(3):
        _clustered[(7,)](memory(torch.float32, 0), size)
    assert started == 3 * [(7, (4, size, 1024))]


def test_every_kernel_is_launched_so():
    others = {v.kernel.__name__ for v in offline.variants() if not isinstance(v.kernel.run, launch._Launcher)}
    assert others == set()


def test_what_is_compiled_only_is_not_launched(monkeypatch):
    started = []
    fake(_plain, monkeypatch, lambda *arguments: started.append(arguments))
    arguments = None, None, 1, 1, 1.0, True
    _plain.run(*arguments, grid=(1,), warmup=True)
    assert _plain.run.loaded == {}
    _plain[(1,)](*arguments)
    assert len(started) == 1
    with launch.compiling():
        _plain[(1,)](*arguments)
        _plain[(1,)](None, None, 1, 2, 1.0, True)
    assert (len(started), len(_plain.run.loaded)) == (1, 1)
    _plain[(1,)](*arguments)
    assert len(started) == 2
    monkeypatch.setattr(_plain.run, "first", lambda *args, **options: "compiled")
    assert _plain.run(*arguments, grid=(1,), warmup=True) == "compiled"
    assert len(started) == 2


# Calls of operators. `_axpy` computes y += scale · x, for n values in float32.


def axpy(x, y, n, scale, *rest):
    x, y = (np.ctypeslib.as_array((ctypes.c_float * n).from_address(at)) for at in (x, y))  # torch's would be seen
    y += np.float32(scale) * x


@launched
@triton.jit
def _axpy(x_ptr, y_ptr, n, scale):
    pass


@triton.jit
def _stranger(x_ptr, y_ptr, n, scale):
    pass


class Operator(Replay):
    """Counts the calls of its launcher."""

    def __init__(self, launcher, allocate=lambda x, *rest: x.new_empty(x.shape)) -> None:
        def counting(*args):
            self.asked += 1
            launcher(*args)

        super().__init__(allocate, counting)
        self.asked = 0


def scaled(x, scale, out):
    """out = scale · x, by way of a workspace whose first four values are not used."""
    n = x.numel()
    half = x.new_empty(n + 4)
    _zero(half)
    _zero(out)
    _axpy[(1,)](x, half[4:], n, scale / 2)
    _zero(half[:4])
    _axpy[(1,)](half[4:].view(x.shape), out, n, 2.0)


def _zero(x):
    """0 · x added to itself would keep what is not a number."""
    _clear[(1,)](x, x.numel())


@launched
@triton.jit
def _clear(x_ptr, n):
    pass


@pytest.fixture
def kernels(monkeypatch):
    fake(_axpy, monkeypatch, axpy)
    fake(_clear, monkeypatch, lambda x, n: ctypes.memset(x, 0, 4 * n))


@pytest.mark.usefixtures("kernels")
class TestReplay:
    def test_the_third_call_asks_nobody(self):
        operator = Operator(scaled)
        for turn in range(6):
            x = torch.randn(3, 5)
            assert torch.equal(operator(x, 0.5), 0.5 * x)
            assert operator.asked == min(turn + 1, 2)

    def test_a_known_call_is_done_without_a_look(self, monkeypatch):
        operator, x = Operator(scaled), torch.randn(3, 5)
        for _ in range(2):
            assert operator.known((x, 0.5)) is None
            operator(x, 0.5)
        call = operator.known((x, 0.5))
        x = torch.randn(3, 5)
        assert torch.equal(call((x, 0.5)), 0.5 * x)
        assert operator.asked == 2
        elsewhere = torch.ones(16)[1:].view(3, 5)
        assert operator.known((elsewhere, 0.5)) is None
        assert torch.equal(call((elsewhere, 0.5)), 0.5 * elsewhere)
        assert operator.asked == 3
        monkeypatch.setattr(replay, "hooked", lambda: True)
        assert torch.equal(call((x, 0.5)), 0.5 * x)
        assert operator.asked == 4

    @pytest.mark.parametrize(
        "other",
        [
            (torch.ones(5, 3), 0.5),
            (torch.ones(5, 3).t(), 0.5),
            (torch.ones(3, 5), 0.25),
            (torch.ones(16)[1:].view(3, 5), 0.5),
            (torch.ones(3, 5, dtype=torch.int32), 0.5),
        ],
        ids=["shape", "strides", "scale", "alignment", "dtype"],
    )
    def test_another_signature_is_another_call(self, other):
        operator = Operator(scaled)
        for _ in range(4):
            operator(torch.randn(3, 5), 0.5)
        operator(*other)
        assert operator.asked == 3

    @pytest.mark.parametrize("more", ["copies", "fills", "adds", "stranger"])
    def test_a_launcher_that_does_more_is_always_asked(self, more, monkeypatch):
        fake(_stranger, monkeypatch, axpy)
        monkeypatch.setattr(_stranger, "run", _stranger.run.first)

        def launcher(x, scale, out):
            n = x.numel()
            _zero(out)
            if more == "copies":
                x = x.clone()
            elif more == "fills":
                out.zero_()
            elif more == "adds":
                torch.add(out, 0.0, out=out)
            (_stranger.run if more == "stranger" else _axpy.run)(x, out, n, scale, grid=(1,), warmup=False)

        operator = Operator(launcher)
        for turn in range(5):
            x = torch.randn(3, 5)
            assert torch.equal(operator(x, 0.5), 0.5 * x)
            assert operator.asked == turn + 1

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_products_of_a_library(self, mode):
        def launcher(a, out):
            """Launches and products in turns, on views of what is given, returned and kept in between."""
            half = a.new_empty(6, 4)
            _zero(half)
            _axpy[(1,)](a[1:], half[2:], 16, 2.0)
            torch.mm(half[2:], a[1:].t(), out=out[1:])
            _zero(out[:1])
            _axpy[(1,)](out, half, 20, 1.0)
            torch.ops.aten.mm.out(half[1:5].t(), half[1:5], out=out[:4])

        with mode():
            operator = Operator(launcher, lambda a: a.new_empty(5, 4))
            for _ in range(6):
                a = torch.randn(5, 4)
                out, first = operator(a), 2 * a[1:] @ a[1:].T
                second = first + torch.cat([torch.zeros(1, 4), 2 * a[1:4]])
                assert torch.equal(out[:4], second.T @ second)
                assert torch.equal(out[4], first[3])
            assert operator.asked == 2

    def test_a_product_of_words_seen_otherwise_is_not_replayed(self):
        def launcher(a, out):
            torch.mm(a.view(torch.float32), a.view(torch.float32).t(), out=out)

        operator = Operator(launcher, lambda a: torch.empty(3, 3))
        for turn in range(4):
            a = torch.randn(3, 3)
            operator(a.view(torch.int32))
            assert operator.asked == turn + 1

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_a_view_that_copies_is_always_asked(self, mode):
        def launcher(x, scale, out):
            _zero(out)
            x = x.contiguous()
            _axpy.run(x, out, x.numel(), scale, grid=(1,), warmup=False)

        with mode():
            operator = Operator(launcher)
            for turn in range(5):
                x = torch.randn(5, 3).t()
                assert torch.equal(operator(x, 0.5), 0.5 * x)
                assert operator.asked == turn + 1

    def test_a_tensor_of_nobody_is_not_replayed(self):
        table = torch.ones(15)
        operator = Operator(lambda x, out: (_zero(out), _axpy[(1,)](table, out, 15, 1.0)))
        for turn in range(4):
            operator(torch.randn(15))
            assert operator.asked == turn + 1

    def test_a_launch_with_a_tuple_is_not_replayed(self, monkeypatch):
        fake(_stranger, monkeypatch, lambda xy, out, n, scale: [axpy(at, out, n, scale) for at in addresses(xy)])
        operator = Operator(lambda x, y, out: (_zero(out), _stranger[(1,)]((x, y), out, 15, 2.0)))
        for _ in range(5):
            x, y = torch.randn(2, 15).unbind()
            assert torch.equal(operator(x, y), 2 * (x + y))

    def test_another_device_is_not_replayed(self, monkeypatch):
        monkeypatch.setattr(replay.driver.active, "get_current_device", lambda: 0)
        monkeypatch.setattr(_axpy, "device_caches", {0: _axpy.device_caches[CPU]})
        monkeypatch.setattr(_clear, "device_caches", {0: _clear.device_caches[CPU]})
        operator = Operator(scaled)
        for turn in range(4):
            operator(torch.randn(3, 5), 0.5)
            assert operator.asked == turn + 1

    def test_descriptors(self, monkeypatch):
        started = []
        fake(_described, monkeypatch, lambda *arguments: started.append(arguments))

        def launcher(x, out):
            _described[(1,)](Descriptor(x, (64, 64)), Descriptor(x[8:], (64, 64)), out, 1, 2, 3)

        operator = Operator(launcher)
        for _ in range(5):
            x = torch.randn(64, 64)
            out = operator(x)
        assert operator.asked == 2
        rest = (64, 64), (64, 1)
        assert started[-1] == (
            (x.data_ptr(), *rest), (x.data_ptr() + 8 * 256, (56, 64), (64, 1)), out.data_ptr(), 1, 2, 3
        )  # fmt: skip

    def test_one_tensor_in_two_places(self):
        def launcher(x, y, out):
            _zero(out)
            _axpy[(1,)](x, out, x.numel(), 1.0)
            _axpy[(1,)](y, out, x.numel(), 10.0)

        operator = Operator(launcher)
        x, y = torch.randn(2, 16)
        for a, b in ((x, x), (x, x), (x, x), (x, y), (y, x), (x, x), (y, x)):
            assert torch.equal(operator(a, b), a + 10 * b)
        assert operator.asked == 4

    def test_results(self):
        def allocate(x, kind):
            made = x.new_empty(5, 3).t(), x.new_empty(3)
            return made if kind == "two" else made[0] if kind == "one" else None

        def launcher(x, kind, out=None):
            for result in (x,) if out is None else out if isinstance(out, tuple) else (out,):
                _zero(result)

        for kind in ("two", "one", "none"):
            operator, x = Operator(launcher, allocate), torch.ones(3, 5)
            found = [operator(x.fill_(1.0), kind) for _ in range(4)]
            assert operator.asked == 2
            if kind == "none":
                assert found == [None] * 4
                assert not x.any()
                continue
            for results in (out if isinstance(out, tuple) else (out,) for out in found):
                assert len(results) == 1 + (kind == "two")
                assert [(y.shape, y.stride()) for y in results] == [((3, 5), (1, 3)), ((3,), (1,))][: len(results)]
                assert not any(y.any() for y in results)
            assert len({y.data_ptr() for out in found for y in (out if kind == "two" else (out,))}) == 4 * len(results)

    def test_somebody_watches_launches(self):
        operator, x, seen = Operator(scaled), torch.randn(3, 5), []
        for _ in range(3):
            operator(x, 0.5)
        hook = seen.append
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            operator(x, 0.5)
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        assert (operator.asked, len(seen)) == (3, 5)

    def test_lists_and_wrong_arguments_are_not_remembered(self):
        def allocate(xs, *rest):
            if not xs:
                raise ValueError("none")
            return xs[0].new_empty(15)

        operator = Operator(lambda xs, out: (_zero(out), _axpy[(1,)](xs[0], out, 15, 1.0)), allocate)
        for _ in range(3):
            assert torch.equal(operator([x := torch.randn(15)]), x)
            with pytest.raises(ValueError, match="none"):
                operator([])
        assert operator.asked == 3
        assert operator.ways == {}

    def test_results_of_lists_are_made_again(self):
        def allocate(xs, scale):
            asked.append(len(xs))
            return [xs[0].new_empty(xs[0].shape), xs[0].new_empty_strided((3, 5), (1, 3), dtype=torch.float64)]

        def launcher(xs, scale, out):
            _zero(out[0])
            _axpy[(1,)](xs[0], out[0], len(xs[0]), scale)

        asked, operator, pairs = [], Operator(launcher, allocate), []
        for turn in range(3):
            for count, size, scale in ((2, 4, 0.5), (3, 4, 0.5), (2, 5, 0.5), (2, 4, 2.0)):
                xs = list(torch.randn(count, size))
                same, other = operator(xs, scale)
                assert (other.shape, other.stride(), other.dtype) == ((3, 5), (1, 3), torch.float64)
                pairs.append((same, scale * xs[0]))
            assert (asked, operator.asked) == ([2, 3, 2, 2], 4 * turn + 4)
        assert all(torch.equal(same, expected) for same, expected in pairs)

    def test_signatures_are_forgotten(self, monkeypatch):
        monkeypatch.setattr(replay, "KEPT", 8)
        operator = Operator(scaled)
        for size in range(1, 100):
            x = torch.randn(size)
            assert torch.equal(operator(x, 0.5), 0.5 * x)
        assert len(operator.ways) <= 8
