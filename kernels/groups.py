"""Which rows a tile of a grouped operator has, found on the device: a host that waited for `offs` would stall the
stream.

Every group is cut into tiles of `block` rows, the last one short; groups without rows have no tile. Tiles are numbered
through all groups. There are at most ⌈R/block⌉ + min(E, R) of them, which is what the host allocates and launches for:
few where few rows meet many groups, as in decoding.

For a kernel with an order of its own, `tiles_by_length` puts tiles of short groups first. Casts of BF16 find their own
tile with `find_tile`: a launch before theirs would cost more.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents

from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import I32, Variant
from dsv3c.numerics import ceil_div


@launched
@triton.jit(do_not_specialize=["E", "bound"])
def _tile_map_kernel(offs_ptr, tiles_ptr, first_ptr, E, bound, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """Program e numbers the tiles of group e; program E writes the total and zero. What follows may begin, and wait."""
    gdc_launch_dependents()
    e = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    end = tl.load(offs_ptr + group, mask=group < E, other=0)
    start = tl.load(offs_ptr + group - 1, mask=(group > 0) & (group < E), other=0)
    count = tl.cdiv(end - start, BLOCK)
    first = tl.sum(tl.where(group < e, count, 0))
    tl.store(first_ptr + e, first)
    tl.store(first_ptr + E + 1, 0, mask=e == E)
    start = tl.sum(tl.where(group == e, start, 0))
    end = tl.sum(tl.where(group == e, end, 0))
    count = tl.cdiv(end - start, BLOCK)
    for i in range(0, count, 32):
        tile = i + tl.arange(0, 32)
        mine = tile < count
        tl.store(tiles_ptr + first + tile, e, mask=mine)
        tl.store(tiles_ptr + bound + first + tile, start + tile * BLOCK, mask=mine)
        tl.store(tiles_ptr + 2 * bound + first + tile, end, mask=mine)


@triton.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _numbers(x, LANES: gl.constexpr):
    """The columns of x [32, n], each as LANES has it; nothing moves."""
    N: gl.constexpr = x.shape[1] // 2
    if N == 0:
        return (gl.convert_layout(gl.reshape(x, (32,)), LANES, assert_trivial=True),)
    else:
        left, right = gl.split(gl.permute(gl.reshape(x, (32, 2, N)), (0, 2, 1)))
        return _numbers(left, LANES) + _numbers(right, LANES)


@gluon.jit
def _tiles(rows, BLOCK: gl.constexpr):
    return ((rows + (BLOCK - 1)).to(gl.uint32) // BLOCK).to(gl.int32)


@gluon.jit
def find_tile(offs_ptr, tile, E, BLOCK: gl.constexpr, GROUPS: gl.constexpr):
    """First row of a tile, its rows to the end of the group (0 or less if it is no group's), and the number of tiles.

    Each warp looks through all GROUPS (`groups_of`) for itself, a lane through neighbours, which it loads 16 bytes at a
    time if E is a multiple of 16. No tile has more than BLOCK rows: so of the groups whose first tile is not behind
    this one, the last, which is its own, has the least first row less BLOCK for each tile before, and the largest end.
    """
    N: gl.constexpr = GROUPS // 32
    WIDE: gl.constexpr = gl.BlockedLayout([1, N], [32, 1], [gl.num_warps(), 1], [1, 0])
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    total = gl.load(offs_ptr + E - 1, mask=E > 0, other=0)
    group = N * gl.arange(0, 32, gl.SliceLayout(1, WIDE))[:, None] + gl.arange(0, N, gl.SliceLayout(0, WIDE))[None, :]
    ends = _numbers(gl.where(group < E, gl.load(offs_ptr + group, mask=group < E, other=0), total), LANES)
    before = N * gl.arange(0, 32, LANES)  # groups
    start = gl.load(offs_ptr + before - 1, mask=(before > 0) & (before <= E), other=0)
    start = gl.where(before <= E, start, total)
    count, end = gl.full([32], 0, gl.int32, LANES), start
    for i in gl.static_range(N):
        count += _tiles(ends[i] - end, BLOCK)
        end = ends[i]
    first = gl.associative_scan(count, 0, _plus) - count
    origin, last = gl.full([32], 2147483647, gl.int32, LANES), gl.full([32], 0, gl.int32, LANES)
    for i in gl.static_range(N):
        origin = gl.where(first <= tile, gl.minimum(origin, start - first * BLOCK), origin)
        last = gl.where(first <= tile, ends[i], last)
        first += _tiles(ends[i] - start, BLOCK)
        start = ends[i]
    row = gl.min(origin, 0) + tile * BLOCK
    return row, gl.max(last, 0) - row, gl.sum(count, 0)


def groups_of(offs: Tensor | None) -> int:
    """What `find_tile` is compiled for: a power of two, no less than the groups or a warp's lanes; 0 without groups."""
    return 0 if offs is None else triton.next_power_of_2(max(len(offs), 32))


def tile_map(offs: Tensor, rows: int, block: int) -> tuple[Tensor, Tensor]:
    """`tiles` int32 [3, ⌈rows/block⌉ + min(E, rows)]: each tile's group, its first row, and its group's end;
    `first` int32 [E + 2]: each group's first tile, the number of tiles, and zero, for programs to count the tiles that
    they have drawn. Tiles from that number on are not written.
    """
    E = len(offs)
    bound = ceil_div(rows, block) + min(E, rows)
    tiles = torch.empty(3, bound, dtype=torch.int32, device=offs.device)
    first = torch.empty(E + 2, dtype=torch.int32, device=offs.device)
    _tile_map_kernel[(E + 1,)](offs.contiguous(), tiles, first, E, bound, block, triton.next_power_of_2(E), num_warps=1)
    return tiles, first


@launched
@triton.jit(do_not_specialize=["E", "bound"])
def _tiles_by_length_kernel(offs_ptr, tiles_ptr, counts_ptr, E, bound, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """Program e places the tiles of group e; program E writes the counts."""
    e = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    end = tl.load(offs_ptr + group, mask=group < E, other=0)
    start = tl.load(offs_ptr + group - 1, mask=(group > 0) & (group < E), other=0)
    count = tl.cdiv(end - start, BLOCK)
    num_short = tl.sum(tl.where(count > 1, 0, count))
    tl.store(counts_ptr, tl.sum(count), mask=e == E)
    tl.store(counts_ptr + 1, num_short, mask=e == E)
    tl.store(counts_ptr + 2, 0, mask=e == E)
    tl.store(counts_ptr + 3, 0, mask=e == E)
    start = tl.sum(tl.where(group == e, start, 0))
    end = tl.sum(tl.where(group == e, end, 0))
    mine = tl.cdiv(end - start, BLOCK)
    alike = (count > 1) == (mine > 1)
    first = tl.sum(tl.where((group < e) & alike, count, 0)) + tl.where(mine > 1, num_short, 0)
    for i in range(0, mine, 32):
        tile = i + tl.arange(0, 32)
        tl.store(tiles_ptr + first + tile, e, mask=tile < mine)
        tl.store(tiles_ptr + bound + first + tile, start + tile * BLOCK, mask=tile < mine)
        tl.store(tiles_ptr + 2 * bound + first + tile, end, mask=tile < mine)


def tiles_by_length(offs: Tensor, rows: int, block: int) -> tuple[Tensor, Tensor]:
    """`tiles` as `tile_map` has them, those of short groups (of one tile) first; `counts` int32 [4]: the number of
    tiles, that of short groups' tiles, and zeros, for programs to count the tiles of either kind that they have drawn.
    """
    E = len(offs)
    bound = ceil_div(rows, block) + min(E, rows)
    tiles = torch.empty(3, bound, dtype=torch.int32, device=offs.device)
    counts = torch.empty(4, dtype=torch.int32, device=offs.device)
    _tiles_by_length_kernel[(E + 1,)](
        offs.contiguous(), tiles, counts, E, bound, block, triton.next_power_of_2(E), num_warps=1
    )
    return tiles, counts


def variants() -> Iterator[Variant]:
    constants = {"BLOCK": 128, "GROUPS": 256}
    for kernel, counts in ((_tile_map_kernel, "first_ptr"), (_tiles_by_length_kernel, "counts_ptr")):
        yield Variant(kernel, {"offs_ptr": I32, "tiles_ptr": I32, counts: I32}, constants, num_warps=1)
