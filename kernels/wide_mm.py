"""Products of BF16 matrices in float32: the router's logits, and their gradients.

Logits have a column for each expert, at most 256, so that a tile takes all columns, and rows are read once. Tiles alone
are too few for a GPU: programs share the contraction of one, and a second kernel adds their sums, first to last. Other
products are cuBLAS's, whose call costs the host 140 µs when the GPU is idle, as it is in front of the first long kernel
of a MoE layer. Gradients come when the host is ahead, and logits of few rows, in decoding, from a CUDA graph.

H200, 7168 values contracted, cuBLAS's time behind it: 4096 rows of 8 columns 27.1 and 28.4 µs, of 256 39.2 and 35.5; 64
rows of 256 15.3 and 11.4.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv3c.kernels.gemm import hopper, multiprocessors
from dsv3c.kernels.launch import Descriptor, compiling, launched
from dsv3c.kernels.offline import F32, Variant
from dsv3c.numerics import ceil_div

ROWS, BLOCK = 128, 64  # of a tile, of the contraction
FEW = 512  # rows that cuBLAS computes faster, by 1 to 4 µs
MOST_COLUMNS, MOST_SPLITS = 256, 16
_compiled: set[tuple[int, int]] = set()
SUMS, AT_ONCE = 512, 8  # of a program of the second kernel, and splits whose loads do not wait for each other


@launched
@triton.jit(do_not_specialize=["M", "splits"])
def _wide_mm_kernel(
    a_desc, b_desc, parts_ptr, M, N, K, splits, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """parts [splits, M, N]: each split's part of the contraction."""
    gdc_launch_dependents()
    row, split = tl.program_id(0) * ROWS, tl.program_id(1)
    blocks = tl.cdiv(K, BLOCK)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(split * blocks // splits, (split + 1) * blocks // splits):
        acc = tl.dot(a_desc.load([row, block * BLOCK]), b_desc.load([0, block * BLOCK]).T, acc)
    rows, columns = row + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = (split.to(tl.int64) * M + rows[:, None]) * N + columns[None, :]
    tl.store(parts_ptr + at, acc, mask=(rows[:, None] < M) & (columns[None, :] < N))


@launched
@triton.jit(do_not_specialize=["size", "splits"])
def _add_parts_kernel(parts_ptr, out_ptr, size, splits, AT_ONCE: tl.constexpr, SUMS: tl.constexpr):
    """out [size]: the sum of parts [splits, size], first to last."""
    gdc_wait()
    at = tl.program_id(0) * SUMS + tl.arange(0, SUMS)
    total = tl.zeros((SUMS,), tl.float32)
    for first in range(0, splits, AT_ONCE):
        for split in tl.static_range(AT_ONCE):
            inside = (at < size) & (first + split < splits)
            total += tl.load(parts_ptr + (first + split) * size + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, total, mask=at < size)


def wide_mm(a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Launcher of `dsv3c::wide_mm`."""
    if dtype == torch.float32 and _takes(a_MK, b_KN):
        kernels = _columns(b_KN.shape[1]), out.get_device()
        if len(a_MK) >= FEW:
            _launch(a_MK, b_KN.mT, out)
            return
        if kernels not in _compiled:  # so that no number of rows that comes later compiles anything
            with compiling():
                _launch(a_MK, b_KN.mT, out)
            _compiled.add(kernels)
    if dtype == torch.float32:
        torch.ops.aten.mm.dtype_out(a_MK, b_KN, dtype, out=out)
    else:
        torch.mm(a_MK, b_KN, out=out)


def _takes(a_MK: Tensor, b_KN: Tensor) -> bool:
    """Few columns, and what the copy engine reads: rows of a and of bᵀ contiguous and 16-byte aligned."""
    operands = a_MK, b_KN.mT
    fit = all(x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in operands)
    return fit and a_MK.numel() > 0 and 0 < b_KN.shape[1] <= MOST_COLUMNS and hopper()


def _launch(a_MK: Tensor, b_NK: Tensor, out: Tensor) -> None:
    (M, K), N = a_MK.shape, len(b_NK)
    columns, tiles = _columns(N), ceil_div(M, ROWS)
    splits = max(1, min(MOST_SPLITS, multiprocessors() // tiles, ceil_div(K, BLOCK)))
    parts = out if splits == 1 else out.new_empty((splits, M, N))
    _wide_mm_kernel[(tiles, splits)](
        Descriptor(a_MK, (ROWS, BLOCK)), Descriptor(b_NK, (columns, BLOCK)), parts, M, N, K, splits,
        ROWS, columns, BLOCK, num_warps=_warps(columns), num_stages=_stages(columns),
    )  # fmt: skip
    if splits > 1:
        _add_parts_kernel[(ceil_div(M * N, SUMS),)](parts, out, M * N, splits, AT_ONCE, SUMS, launch_pdl=True)


def _columns(N: int) -> int:
    return max(16, triton.next_power_of_2(N))


def _warps(columns: int) -> int:
    return 4 if columns <= 64 else 8


def _stages(columns: int) -> int:
    return min(8, (200 << 10) // (2 * BLOCK * (ROWS + columns)))


def variants() -> Iterator[Variant]:
    for columns in (16, 32, 64, 128, 256):
        operands = {
            "a_desc": f"tensordesc<bf16[{ROWS}, {BLOCK}]>",
            "b_desc": f"tensordesc<bf16[{columns}, {BLOCK}]>",
            "parts_ptr": F32,
        }
        constants = {"ROWS": ROWS, "COLUMNS": columns, "BLOCK": BLOCK}
        yield Variant(_wide_mm_kernel, operands, constants, _warps(columns), _stages(columns))
    yield Variant(_add_parts_kernel, {"parts_ptr": F32, "out_ptr": F32}, {"AT_ONCE": AT_ONCE, "SUMS": SUMS})
