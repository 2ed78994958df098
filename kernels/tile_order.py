"""The order in which the programs of the specialised GEMM (`warp_specialized.py`) compute its tiles of 128 rows, or, in
clusters, pairs of them, one below the other; of the last tiles, parts."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

COLUMNS = gl.constexpr(192)  # of a tile
PART = gl.constexpr(64)  # of them: a third, in one column of w's blocks
LOT = gl.constexpr(64)  # tiles of short groups, or of long ones, that are drawn one after the other


@gluon.jit
def walk(problem, BAND: gl.constexpr, CLUSTER: gl.constexpr):
    """A program's tiles as first, end and step, parts of the last ones behind them; by group it takes the first, and
    draws the others."""
    num_m, num_n, _M, _N, _blocks, whole = problem
    program, programs = gl.program_id(0) // CLUSTER, gl.num_programs(0) // CLUSTER
    first, end, step = program, whole + 3 * (num_m * num_n - whole), programs
    if BAND == 0:
        first, end, step = program * end // programs, (program + 1) * end // programs, 1
    return first, end, step


@gluon.jit
def whole_tiles(num_tiles, BAND: gl.constexpr):
    """How many tiles programs compute as a whole. A last wave for no more than a third of them is dealt out in parts,
    one for each."""
    programs = gl.num_programs(0)
    rest = num_tiles % programs
    if BAND > 0 and 3 * rest <= programs:
        num_tiles -= rest
    return num_tiles


@gluon.jit
def _take_turns(tile, short, long):
    """Lots of `short` tiles of one kind and of `long` ones of another, spread evenly; then what is left of either.
    Whether a tile is a long one, and its number among its kind."""
    lots, long_lots = short // LOT + long // LOT, long // LOT
    lot, rest = tile // LOT, tile - lots * LOT
    before = lot * long_lots // gl.maximum(lots, 1)
    is_long = (lot + 1) * long_lots // gl.maximum(lots, 1) > before
    number = gl.where(is_long, before, lot - before) * LOT + tile % LOT
    left = short % LOT
    is_long = gl.where(rest < 0, is_long, rest >= left)
    number = gl.where(rest < 0, number, rest + gl.where(is_long, long_lots * LOT - left, short - left))
    return is_long, number


@gluon.jit
def locate(tile, problem, groups, BAND: gl.constexpr, GROUPED: gl.constexpr, CLUSTER: gl.constexpr):
    """A tile's first row and the end of its group's rows, its group, the first column, and whether it is a part."""
    num_m, num_n, M, _N, _blocks, whole = problem
    first_m, num, band = 0, num_m, BAND
    part = gl.maximum(tile - whole, 0)
    is_part = not GROUPED and tile >= whole
    tile = gl.minimum(tile, whole) + part // 3
    if GROUPED and CLUSTER == 1:
        _tiles_ptr, _bound, _drawn_ptr, num_short = groups
        num_long = num_m - num_short
        is_long, tile = _take_turns(tile, num_short * num_n, num_long * num_n)
        first_m, num = gl.where(is_long, num_short, 0), gl.where(is_long, num_long, num_short)
        band = gl.where(is_long, BAND, BAND // 2)
    tile = gl.maximum(gl.minimum(tile, num * num_n - 1), 0)  # there may be no next, or none at all
    first, height = 0, gl.maximum(num, 1)
    if BAND > 0:
        first = tile // (band * num_n) * band
        height = gl.maximum(gl.minimum(num - first, band), 1)
    m, n = first_m + first + (tile - first * num_n) % height, (tile - first * num_n) // height
    row, end, e = m * (128 * CLUSTER), M, 0
    if GROUPED:
        tiles_ptr, bound, _drawn_ptr, _num_short = groups
        there = m < num_m
        e = gl.load(tiles_ptr + m, mask=there, other=0)
        row = gl.load(tiles_ptr + bound + m, mask=there, other=0)
        end = gl.load(tiles_ptr + 2 * bound + m, mask=there, other=0)
    row += gl.program_id(0) % CLUSTER * 128
    return row, end, e, n * COLUMNS + part % 3 * PART, is_part
