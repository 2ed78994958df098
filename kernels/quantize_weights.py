"""A layer's weights to FP8 in one launch, in 128×128 blocks: once an optimizer step.

A program has a block. Which weight it is of, and where the results go, stands in a table that is copied to the GPU
ahead of the launch: a weight's results may be rows of a stack's. Training wants each copy transposed too: the block is
there, so that costs the writing alone. Bits equal `quantize_block`'s.

BF16 weights whose sizes are multiples of 16 are read once: both copies are cast from shared memory, the transposed one
from its columns (`columns.py`). H200, a MoE layer of 8 experts, 1.2 GB of BF16: 590 µs, 0.94 of a copy of as many
bytes; read three times, as other weights are, 718. With 16 warps, two programs a multiprocessor instead of three, 677.
The call takes the host 0.2 ms, which shows if the GPU has nothing to do.
"""

from collections.abc import Iterator
from itertools import islice

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsv3c.kernels.columns import divide_words, largest, load_words, shared_layout
from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import BF16, F32, Variant
from dsv3c.kernels.quantize import _divide, _maximum, _readable, _reciprocal, _scale_inv
from dsv3c.kernels.tiles import divide, reciprocal
from dsv3c.numerics import TILE, ceil_div

# Of a weight in the table: five addresses; rows, columns, first block; rows of its stack.
FIELDS = tl.constexpr(9)
ROWS = 64  # of a part of a block
WARPS = 8  # of a program of `_quantize_both_kernel`


@triton.jit
def _address(weight_ptr, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    return tl.multiple_of(tl.load(weight_ptr + FIELD).to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def _size(weight_ptr, FIELD: tl.constexpr, ALIGNMENT: tl.constexpr):
    return tl.multiple_of(tl.load(weight_ptr + FIELD).to(tl.int32), ALIGNMENT)


@launched
@triton.jit(do_not_specialize=["num_weights"])
def _quantize_weights_kernel(
    table_ptr, like_ptr, num_weights, amax_floor, POW2: tl.constexpr, TRANSPOSED: tl.constexpr, MOST: tl.constexpr,
    ALIGNMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """At most MOST weights, of like's dtype, whose sizes and addresses are multiples of ALIGNMENT."""
    weights = tl.arange(0, MOST)
    first = tl.load(table_ptr + weights * FIELDS + 7, mask=weights < num_weights, other=1 << 31)
    weight_ptr = table_ptr + (tl.sum((first <= tl.program_id(0)).to(tl.int32), 0) - 1) * FIELDS
    N, K = _size(weight_ptr, 5, ALIGNMENT), _size(weight_ptr, 6, ALIGNMENT)
    down, across = tl.cdiv(N, 128), tl.cdiv(K, 128)
    block = tl.program_id(0) - _size(weight_ptr, 7, 1)
    batch = (block // (down * across)).to(tl.int64)
    n, k = block // across % down, block % across
    columns = k * 128 + tl.arange(0, 128)

    # Once over the block for the scale and once for each result, in parts: then it is in the cache, and few registers
    # are taken. Casting once for both results is no faster, and one layout of bytes is turned into the other wrongly by
    # the ptxas of CUDA 12.9 (triton #11111).
    w_ptr = _address(weight_ptr, 0, like_ptr.dtype.element_ty, ALIGNMENT) + batch * N * K
    amax = 0.0
    for part in tl.static_range(0, 128, ROWS):
        rows = n * 128 + part + tl.arange(0, ROWS)
        inside = (rows[:, None] < N) & (columns[None, :] < K)
        w = tl.load(w_ptr + rows[:, None].to(tl.int64) * K + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        amax = _maximum(amax, tl.reduce(tl.reduce(tl.abs(w), 1, _maximum), 0, _maximum))
    scale_inv = _scale_inv(amax, amax_floor, POW2)
    reciprocal = _reciprocal(scale_inv)
    q_ptr = _address(weight_ptr, 1, tl.float8e4nv, ALIGNMENT) + batch * N * K
    for part in tl.static_range(0, 128, ROWS):
        rows = n * 128 + part + tl.arange(0, ROWS)
        inside = (rows[:, None] < N) & (columns[None, :] < K)
        offsets = rows[:, None].to(tl.int64) * K + columns[None, :]
        w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(q_ptr + offsets, _divide(w, scale_inv, reciprocal).to(tl.float8e4nv), mask=inside)
    tl.store(_address(weight_ptr, 2, tl.float32, 4) + (batch * down + n) * across + k, scale_inv)
    if TRANSPOSED:
        stack_N = _size(weight_ptr, 8, ALIGNMENT)
        t_ptr = _address(weight_ptr, 3, tl.float8e4nv, ALIGNMENT) + (batch * K + columns[:, None]) * stack_N
        for part in tl.static_range(0, 128, ROWS):
            rows = n * 128 + part + tl.arange(0, ROWS)
            inside = (columns[:, None] < K) & (rows[None, :] < N)
            offsets = rows[None, :].to(tl.int64) * K + columns[:, None]
            w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            tl.store(t_ptr + rows[None, :], _divide(w, scale_inv, reciprocal).to(tl.float8e4nv), mask=inside)
        offset = (batch * across + k) * tl.cdiv(stack_N, 128) + n
        tl.store(_address(weight_ptr, 4, tl.float32, 4) + offset, scale_inv)


@launched
@gluon.jit(do_not_specialize=["num_weights"])
def _quantize_both_kernel(table_ptr, like_ptr, num_weights, amax_floor, POW2: gl.constexpr, MOST: gl.constexpr):
    """As `_quantize_weights_kernel`, of BF16 weights with aligned sizes, transposed ones too, from one reading."""
    WARPS: gl.constexpr = gl.num_warps()
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    weights = gl.arange(0, MOST, gl.BlockedLayout([1], [32], [WARPS], [0]))
    first = gl.load(table_ptr + weights * FIELDS + 7, mask=weights < num_weights, other=1 << 31)
    weight_ptr = table_ptr + (gl.sum((first <= gl.program_id(0)).to(gl.int32), 0) - 1) * FIELDS
    N, K = _size(weight_ptr, 5, 16), _size(weight_ptr, 6, 16)
    down, across = gl.cdiv(N, 128), gl.cdiv(K, 128)
    block = gl.program_id(0) - _size(weight_ptr, 7, 1)
    batch = (block // (down * across)).to(gl.int64)
    n, k = block // across % down, block % across
    row = gl.arange(0, 128, gl.SliceLayout(1, LOAD))[:, None]
    column = gl.arange(0, 128, gl.SliceLayout(0, LOAD))[None, :]
    inside = (row < N - n * 128) & (column < K - k * 128)
    start, at = (batch * N + n * 128) * K + k * 128, row * K + column
    w = gl.load(_address(weight_ptr, 0, like_ptr.dtype.element_ty, 16) + start + at, mask=inside, other=0.0)
    shared = gl.allocate_shared_memory(gl.bfloat16, (128, 128), shared_layout(128, 16), w)
    words, others = load_words(shared)
    scale_inv = _scale_inv(gl.reduce(largest(words, others), 0, _maximum), amax_floor, POW2)
    first, second = reciprocal(scale_inv)
    stack_N = _size(weight_ptr, 8, 16)
    t_ptr = _address(weight_ptr, 3, gl.int32, 16) + ((batch * K + k * 128) * stack_N + n * 128) // 4
    LAYOUT: gl.constexpr = words.type.layout
    word = gl.arange(0, 32, gl.SliceLayout(1, LAYOUT))[:, None]
    line = gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))[None, :]
    within = (line < K - k * 128) & (word < (N - n * 128) // 4)
    gl.store(t_ptr + (line * (stack_N // 4) + word), divide_words(words, others, first, second), mask=within)
    wide = shared.load(LOAD).to(gl.float32)  # again: kept until here, registers would spill
    q = divide(wide, first, second).to(gl.float8e4nv)
    gl.store(_address(weight_ptr, 1, gl.float8e4nv, 16) + start + at, q, mask=inside)
    gl.store(_address(weight_ptr, 2, gl.float32, 4) + (batch * down + n) * across + k, scale_inv)
    gl.store(_address(weight_ptr, 4, gl.float32, 4) + (batch * across + k) * gl.cdiv(stack_N, 128) + n, scale_inv)


def quantize_weights(
    weights: list[Tensor], stacks: list[int], amax_floor: float, pow2: bool, transposed: bool, out: list[Tensor]
) -> None:
    """Launcher of `dsv3c::quantize_weights`."""
    weights = [_readable(w).contiguous() for w in weights]
    rows = list(_rows(weights, stacks, 4 if transposed else 2, out))
    for dtype in {w.dtype for w in weights if w.numel()}:
        table, blocks, bits = [], 0, 0
        for w, (address, q, scale_inv, t, t_scale_inv, N, K, stack_N) in zip(weights, rows, strict=True):
            if w.dtype == dtype and w.numel():
                table.append([address, q, scale_inv, t, t_scale_inv, N, K, blocks, stack_N])
                bits |= address | q | t | N | K | stack_N
                blocks += w.numel() // (N * K) * ceil_div(N, TILE) * ceil_div(K, TILE)
                like = w
        aligned = bits % 16 == 0
        host = torch.tensor(table, dtype=torch.int64, pin_memory=True)
        given = host.to(like.device, non_blocking=True), like, len(table), amax_floor, pow2
        most = max(16, triton.next_power_of_2(len(table)))
        if aligned and transposed and dtype == torch.bfloat16:
            _quantize_both_kernel[(blocks,)](*given, most, num_warps=WARPS)
        else:
            _quantize_weights_kernel[(blocks,)](*given, transposed, most, 16 if aligned else 1, ROWS)


def _rows(weights: list[Tensor], stacks: list[int], size: int, out: list[Tensor]) -> Iterator[list[int]]:
    """For each weight its address, those of its rows in the results of its stack (0 for results that are not wanted),
    its sizes, and the rows of the stack."""
    rest, results = iter(weights), iter(out)
    for count in stacks:
        stack = list(islice(rest, count))
        stack_N = sum(w.shape[-2] for w in stack)
        places = [copy.data_ptr() for copy in islice(results, size)] + [0] * (4 - size)
        for w in stack:
            N, K = w.shape[-2:]
            yield [w.data_ptr(), *places, N, K, stack_N]
            down, across = ceil_div(N, TILE), ceil_div(K, TILE)
            places = [place + step for place, step in zip(places, (N * K, 4 * down * across, N, 4 * down), strict=True)]


def variants() -> Iterator[Variant]:
    both = {"table_ptr": "*i64", "like_ptr": BF16, "amax_floor": "fp32"}
    yield Variant(_quantize_both_kernel, both, {"POW2": False, "MOST": 16}, num_warps=WARPS)
    for like in (BF16, F32):
        for transposed in (False, True):
            yield Variant(
                _quantize_weights_kernel,
                {"table_ptr": "*i64", "like_ptr": like, "amax_floor": "fp32"},
                {"POW2": False, "TRANSPOSED": transposed, "MOST": 16, "ALIGNMENT": 16, "ROWS": ROWS},
            )
