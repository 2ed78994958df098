"""Runs a warp-specialised Gluon kernel for Hopper on the CPU, for tests of indices, masks and barriers.

A partition is a thread. What the hardware does at a time of its own choosing happens at a random one: a bulk copy fills
its destination with NaN when it is issued and with the data later; a product reads its operands either when it is
issued or when it is waited for. So a wait that is missing shows as NaN or as another number, and a barrier that is not
reached as an error after a while. What threads cannot show: races between the warps of a partition, layouts, missing
fences.
"""

import ast
import inspect
import math
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dsv3c.kernels.launch import Descriptor

PATIENCE = 30  # seconds without any progress
_ready, _random = threading.Condition(), random.Random(0)
_here = threading.local()


class Barrier:
    def __init__(self) -> None:
        self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = 0

    def arrive(self, arrivals: int, num_bytes: int) -> None:
        with _ready:
            self.missing -= arrivals
            self.bytes += num_bytes
            assert self.missing >= 0
            if self.missing == 0 and self.bytes == 0:
                self.phase ^= 1
                self.missing = self.count
                _ready.notify_all()

    def wait(self, phase) -> None:
        with _ready:
            if not _ready.wait_for(lambda: self.phase != int(phase), PATIENCE):
                raise TimeoutError("a barrier is never reached")
        if _random.random() < 0.1:
            time.sleep(1e-3)  # so that others can be ahead


class Shared:
    """A view of shared memory; of barriers, a list."""

    def __init__(self, data) -> None:
        self.data = data

    @property
    def shape(self):
        return self.data.shape

    def _reinterpret(self, dtype, shape, layout):
        """What lies in the program's memory from here on."""
        memory, first = _here.memory, self.data.data_ptr() - _here.memory.data.data_ptr()
        if dtype == torch.int64:
            return Shared([memory.barriers.setdefault(first + 8 * i, Barrier()) for i in range(shape[0])])
        return Shared(memory.at(first, dtype, shape))

    def index(self, i):
        found = self.data[int(i)]
        return found if isinstance(found, Barrier) else Shared(found)

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.data.permute(order))

    def load(self, layout):
        return self.data.clone()

    def store(self, x) -> None:
        self.data.copy_(x)

    def _keep_alive(self) -> None:
        pass


class Memory:
    """A program's shared memory, by address."""

    def __init__(self, size) -> None:
        self.data, self.barriers, self.copies = torch.full((size,), 255, dtype=torch.uint8), {}, []

    def at(self, first, dtype, shape):
        return self.data[first : first + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class Pointer:
    """To an element of `data`, all that a tensor spans in memory."""

    def __init__(self, data, offset=0) -> None:
        self.data, self.offset, self.dtype = data, offset, SimpleNamespace(element_ty=data.dtype)

    @classmethod
    def to(cls, x):
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return cls(x.as_strided((extent if x.numel() else 0,), (1,)))

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)


class Product:
    """An accumulator with products in flight."""

    def __init__(self, acc, pending) -> None:
        self.acc, self.pending = acc, pending

    def settle(self):
        for a, b in self.pending:
            a, b = (x.data if isinstance(x, Shared) else x for x in (a, b))
            self.acc = self.acc + a.float() @ b.float()
        self.pending = []
        return self.acc


def _mma(a, b, acc, is_async, use_acc=True):
    acc = acc if isinstance(acc, Product) else Product(acc, [])
    product = Product(acc.acc, [*acc.pending, (a, b)] if use_acc else [(a, b)])
    if not use_acc:
        product.acc = torch.zeros_like(acc.acc)
    if _random.random() < 0.5:
        product.settle()
    _here.flying = [*getattr(_here, "flying", []), product]
    return product


def _wait_for_products(outstanding, deps):
    """All of the partition's but the last `outstanding`."""
    first = len(_here.flying) - outstanding
    landed, _here.flying = _here.flying[:first], _here.flying[first:]
    assert any(product is deps[0] for product in landed), "a product is used that may be in flight"
    return deps[0].settle()


def _box(desc, coordinates, shared):
    """The part of a bulk copy that lies inside the tensor, as a view of it, and in shared memory."""
    assert list(desc.block_shape) == list(shared.shape)
    assert int(coordinates[-1]) >= 0
    assert int(coordinates[-1]) * desc.dtype.itemsize % 16 == 0, "the copy engine faults"
    target, source = desc.base, shared.data
    for axis, at in enumerate(int(c) for c in coordinates):
        first, last = (min(max(end, 0), target.shape[axis]) for end in (at, at + shared.shape[axis]))
        target = target.narrow(axis, first, last - first)
        source = source.narrow(axis, max(first - at, 0), last - first)
    return target, source


def _copy(desc, coordinates, barrier, shared, pred=True) -> None:
    if not pred:
        return
    source, target = _box(desc, coordinates, shared)
    with _here.engine:
        shared.data.fill_(math.nan)

    def run() -> None:
        shared.data.zero_()
        target.copy_(source)
        barrier.arrive(0, -shared.data.numel() * shared.data.element_size())

    _here.jobs.append(run)


def _copy_back(desc, coordinates, shared) -> None:
    """It reads shared memory some time before `_wait_for_copies_back`."""
    target, source = _box(desc, coordinates, shared)
    done = threading.Event()

    def run() -> None:
        target.copy_(source)
        done.set()

    _here.jobs.append(run)
    _here.__dict__.setdefault("stores", []).append(done)


def _wait_for_copies_back(pendings) -> None:
    stores = _here.__dict__.setdefault("stores", [])
    while len(stores) > pendings:
        assert stores.pop(0).wait(PATIENCE), "a copy back is never done"


def _set_up(barrier) -> None:
    _here.memory.barriers.setdefault(int(barrier), Barrier()).init(1)


def _expect(barrier, size) -> None:
    if size:
        _here.memory.barriers[int(barrier)].arrive(1, int(size))


def _copy_bytes(target, source, size, barrier, mine, once=False) -> None:
    """What is there is gone at once, what is copied arrives with the wait."""
    of_threads = torch.broadcast_tensors(*map(torch.as_tensor, (target, source.offset, size, mine)))
    for to, at, n, own in zip(*of_threads, strict=True):
        if own:
            data = source.data[at : at + n // source.data.element_size()].view(torch.uint8)
            assert len(data) == n, "read out of bounds"
            assert int(to) % 16 == int(n) % 16 == at * source.data.element_size() % 16 == 0, "the copy engine faults"
            _here.memory.data[to : to + n] = 255
            _here.memory.copies.append((int(barrier), int(to), data))


def _wait(barrier, phase) -> None:
    memory, barrier = _here.memory, int(barrier)
    landed = [copy for copy in memory.copies if copy[0] == barrier]
    memory.copies = [copy for copy in memory.copies if copy[0] != barrier]
    for _, to, data in landed:
        memory.data[to : to + len(data)] = data
        memory.barriers[barrier].arrive(0, -len(data))
        assert memory.barriers[barrier].bytes >= 0, "more is copied than was announced"
    memory.barriers[barrier].wait(phase)


OTHER = 1 << 40  # added to an address in the other program of a cluster


def _memory_of(address):
    other, address = divmod(int(address), OTHER)
    return _here.cluster[(_here.program + other) % len(_here.cluster)], address


def _arrive(address) -> None:
    memory, address = _memory_of(address)
    memory.barriers[address].arrive(4, 0)  # as many warps


def _number_of(parameter: str) -> int:
    return int(parameter.rpartition("_")[2]) // 5  # a descriptor is five parameters


def _copy_to_both(desc, row, column, target, barrier) -> None:
    """Of both programs' memory what is copied over is gone at once."""
    desc = _here.descs[desc]
    for memory in _here.cluster:
        shared = Shared(memory.at(int(target), desc.dtype, desc.block_shape))
        _copy(desc, [row, column], memory.barriers[int(barrier)], shared)


def _copy_hinted(desc, row, column, target, barrier, hint) -> None:
    desc, memory = _here.descs[desc], _here.memory
    _copy(
        desc, [row, column], memory.barriers[int(barrier)], Shared(memory.at(int(target), desc.dtype, desc.block_shape))
    )


def _multiply(x_at, w_at, L, columns=192):
    x, w = (
        _here.memory.at(int(at), torch.float8_e4m3fn, (rows, 128)).float() for at, rows in ((x_at, 64), (w_at, columns))
    )
    return (x @ w.T).split(64, 1)


def _read(at):
    return _here.memory.data.view(torch.float32)[at // 4].clone()


def _gather(pointer, mask=None, other=0):
    at = torch.as_tensor(pointer.offset)
    inside = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand_as(at)
    assert bool(((at >= 0) & (at < pointer.data.numel()))[inside].all()), "read out of bounds"
    return torch.where(inside, pointer.data[at.where(inside, torch.zeros_like(at))], other)


def _scatter(pointer, value, mask=None) -> None:
    at = pointer.offset
    inside = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand_as(at)
    assert bool(((at >= 0) & (at < pointer.data.numel()))[inside].all()), "written out of bounds"
    pointer.data[at[inside]] = value[inside]


def _atomic_add(pointer, value, sem):
    with _ready:
        before = pointer.data[pointer.offset].clone()
        pointer.data[pointer.offset] += value
    return before


def _scan(x, axis, combine):
    return torch.stack([x[: i + 1].sum(axis) for i in range(len(x))])


def _allocate(dtype, shape, layout):
    if dtype == torch.int64:
        return Shared([Barrier() for _ in range(shape[0])])
    if dtype == torch.float8_e4m3fn and shape[1:] == (8, 128):  # all of a program's memory, by KiB
        _here.memory = _here.cluster[_here.program % len(_here.cluster)] = Memory(math.prod(shape))
        return Shared(_here.memory.at(0, dtype, shape))
    if dtype == torch.int32 and len(shape) == 3:  # rows that are copied by address
        _here.memory = Memory(math.prod(shape) * 4)
        return Shared(_here.memory.at(0, dtype, shape))
    return Shared(torch.full(shape, math.nan if dtype.is_floating_point else 0, dtype=dtype))


def _specialize(partitions, num_warps, num_registers) -> None:
    jobs, errors, done = [], [], threading.Event()
    state = _here.__dict__ | {"jobs": jobs, "engine": threading.RLock()}

    def partition(function, arguments) -> None:
        _here.__dict__.update(state)
        try:
            function(*arguments)
        except BaseException as error:
            errors.append(error)

    def engine() -> None:
        while not done.is_set() or jobs:
            if jobs:
                jobs.pop(_random.randrange(len(jobs)))()
            else:
                done.wait(1e-4)

    threads = [threading.Thread(target=partition, args=p) for p in partitions]
    copies = threading.Thread(target=engine)
    for thread in (*threads, copies):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    copies.join()
    if errors:
        raise errors[0]


def _elementwise(function):
    return lambda *args: function(*(torch.as_tensor(a) for a in args))


GL = SimpleNamespace(
    **{n: getattr(torch, n) for n in ("int32", "int64", "float32", "bfloat16", "where", "zeros_like", "exp2", "log2",
                                      "rsqrt")},
    constexpr=lambda x: x,
    minimum=_elementwise(torch.minimum), maximum=_elementwise(torch.maximum), cdiv=lambda a, b: (a + b - 1) // b,
    max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout: torch.full(shape, float(value)).to(dtype), float8e4nv=torch.float8_e4m3fn,
    atomic_add=_atomic_add, join=lambda a, b: torch.stack((a, b), -1), reshape=torch.reshape,
    arange=lambda start, end, layout: torch.arange(start, end), expand_dims=torch.unsqueeze,
    convert_layout=lambda x, layout, assert_trivial=False: x, static_range=range, load=_gather, store=_scatter,
    associative_scan=_scan,
    program_id=lambda axis: torch.tensor(_here.program), num_programs=lambda axis: _here.programs,
    inline_asm_elementwise=lambda *args, **options: torch.tensor(0), allocate_shared_memory=_allocate,
    warp_specialize=_specialize, num_warps=lambda: _here.num_warps, barrier=lambda: None,
    **{n: lambda *args, **options: None for n in ("NVMMASharedLayout", "NVMMADistributedLayout", "BlockedLayout",
                                                  "SliceLayout", "DotOperandLayout", "SwizzledSharedLayout")},
)  # fmt: skip
NAMES = {
    "launched": lambda kernel: kernel,
    "gl": GL,
    "gluon": SimpleNamespace(jit=lambda f=None, **options: f or (lambda g: g)),
    "fence_async_shared": lambda: None,
    "tma": SimpleNamespace(
        async_copy_global_to_shared=_copy, async_copy_shared_to_global=_copy_back, store_wait=_wait_for_copies_back
    ),
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda bar, count: bar.init(count),
        wait=lambda bar, phase: bar.wait(phase),
        expect=lambda bar, num_bytes, pred=True: bar.arrive(1, num_bytes) if pred else None,
        arrive=lambda bar, count, pred=True: bar.arrive(count, 0) if pred else None,
    ),
    "start_of_shared": lambda: 0,
    "meet": lambda: _here.meeting.wait(PATIENCE),
    "of_other": lambda barrier: barrier + OTHER,
    "arrive": _arrive,
    "wait": _wait,
    "set_up": _set_up,
    "expect": _expect,
    "copy": _copy_bytes,
    "copy_to_both": _copy_to_both,
    "copy_through": _number_of,
    "hinted_copy_through": _number_of,
    "copy_hinted": _copy_hinted,
    "EVICT_FIRST": 1,
    "EVICT_NORMAL": 0,
    "warpgroup_mma": _mma,
    "warpgroup_mma_wait": _wait_for_products,
}


class _NotInPlace(ast.NodeTransformer):
    """`x += y` makes a new value in Gluon, and changes the old one in torch."""

    def visit_AugAssign(self, node):
        before = ast.Name(node.target.id, ast.Load())
        return ast.Assign([node.target], ast.BinOp(before, node.op, node.value))


def _belongs(node) -> bool:
    """Whether it is a kernel's: its functions and layouts, not the launcher's."""
    if isinstance(node, ast.FunctionDef):
        return any(ast.unparse(decorator).startswith("gluon.jit") for decorator in node.decorator_list)
    return isinstance(node, ast.Assign) and any(name in ast.unparse(node.value) for name in ("gl.", "copy_through"))


class Kernel:
    """The kernel `name` of a file: `Kernel(path, name)[grid](*arguments)`, on CPU tensors; constants by position.

    `replaced` are functions of the file that cannot run here: those that are inline assembly.
    """

    def __init__(self, path: str, name: str, **replaced) -> None:
        names = dict(NAMES)
        for file in (Path(path).with_name("tile_order.py"), Path(path)):
            tree = ast.parse(file.read_text())
            tree.body = [node for node in tree.body if _belongs(node)]
            exec(compile(ast.fix_missing_locations(_NotInPlace().visit(tree)), file, "exec"), names)
        names.update(replaced)
        self.function, self.parameters = names[name], inspect.signature(names[name]).parameters

    def __getitem__(self, grid):
        def launch(*arguments, num_warps) -> None:
            values = [Pointer.to(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            values = [x.full() if isinstance(x, Descriptor) else x for x in values]
            for descriptor in (x for x in values if isinstance(x, TensorDescriptor)):
                descriptor.dtype = descriptor.base.dtype
            descs = [x for x in values if isinstance(x, TensorDescriptor)]
            programs = int(dict(zip(self.parameters, values, strict=True)).get("CLUSTER", 1))
            for first in range(0, grid[0] * programs, programs):
                state = {"cluster": [None] * programs, "meeting": threading.Barrier(5 * programs), "descs": descs}

                errors: list = []

                def run(program, state=state, errors=errors) -> None:
                    _here.__dict__.update(state, program=program, programs=grid[0] * programs, num_warps=num_warps)
                    try:
                        self.function(*values)
                    except BaseException as error:
                        errors.append(error)

                threads = [threading.Thread(target=run, args=(first + i,)) for i in range(programs)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                if errors:
                    raise errors[0]

        return launch


def specialized_gemm(path: str) -> Kernel:
    """The kernel of `warp_specialized.py`, its assembly in torch."""
    return Kernel(
        path, "_warp_specialized_gemm_kernel", multiply=_multiply, read=_read,
        multiply_part=lambda *args: _multiply(*args, columns=64)[0],
        promote=lambda product, scale, acc: acc + product * scale[:, None],
    )  # fmt: skip
