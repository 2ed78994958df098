"""The order in which the programs of the specialised GEMM (`warp_specialized.py`) compute its tiles of 128 rows, or, in
clusters, pairs of them, one below the other; of the last tiles, parts."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

COLUMNS = gl.constexpr(192)  # of a tile
PART = gl.constexpr(64)  # of them: a third, in one column of w's blocks


@gluon.jit
def walk(problem, BAND: gl.constexpr, CLUSTER: gl.constexpr):
    """A program's tiles as first, end and step, parts of the last ones behind them."""
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
def by_length(problem, groups):
    """How many tiles are of short groups, which come first, and of long ones; and how many programs begin with short
    ones: their share."""
    num_m, num_n, _M, _N, _blocks, _whole = problem
    _tiles_ptr, _bound, _drawn_ptr, num_short = groups
    short, long, programs = num_short * num_n, (num_m - num_short) * num_n, gl.num_programs(0)
    share = programs * num_short // gl.maximum(num_m, 1)
    return short, long, gl.minimum(gl.maximum(share, programs - long), short)


@gluon.jit
def _begins_short(share):
    """Whether this program does, and how many programs before it do; they are spread evenly."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    before = program * share // programs
    return (program + 1) * share // programs > before, before


@gluon.jit
def first_drawn(problem, groups):
    """A program's first tile, and the number of tiles."""
    short, long, share = by_length(problem, groups)
    begins_short, before = _begins_short(share)
    return gl.where(begins_short, before, short + gl.program_id(0) - before), short + long


@gluon.jit
def draw(problem, groups):
    """Its next, of the kind that it began with while there are any; then of the other."""
    short, long, share = by_length(problem, groups)
    _tiles_ptr, _bound, drawn_ptr, _num_short = groups
    of_short, _before = _begins_short(share)
    first_long = short + gl.num_programs(0) - share  # that no program began with
    tile = gl.atomic_add(drawn_ptr + gl.where(of_short, 0, 1), 1, sem="relaxed")
    tile += gl.where(of_short, share, first_long)
    if tile >= gl.where(of_short, short, short + long):
        tile = gl.atomic_add(drawn_ptr + gl.where(of_short, 1, 0), 1, sem="relaxed")
        tile += gl.where(of_short, first_long, share)
        if not of_short and tile >= short:
            tile = short + long
    return tile


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
        is_long = tile >= num_short * num_n
        tile -= gl.where(is_long, num_short * num_n, 0)
        first_m, num = gl.where(is_long, num_short, 0), gl.where(is_long, num_m - num_short, num_short)
        band = gl.where(is_long, BAND, 1)
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
