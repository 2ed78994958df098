"""Which numbers of rows share a row of a tuning table.

What flips with the number of rows is the number of waves: as many tiles as there are multiprocessors run at a time, so
one tile more can cost as much as a whole wave, and another size of tile may win. A bucket therefore never crosses a
change of the number of waves of 128×128 tiles, as long as a wave counts (up to 8; then up to a quarter more), and never
spans more than a quarter of an octave of tiles. Up to 128 rows the weights are the traffic, and buckets are octaves; as
they are where rows are contracted (weight gradients), which changes the length of a tile's loop alone.

Tiles of other sizes have other numbers of waves. A row's times are therefore carried over to other numbers of rows by
the waves of the tiles that they were measured with (`growth`), within a bucket and to buckets that were not measured.
(H200, 45 products of V3's shapes with 256 to 4096 rows: chosen so from the rows for 4096, the faster of best and
runner-up is within 0.5 % of the fastest of four, and 3.4 % at 256 × 24576 × 1536; the best alone is up to 22 % slower.
Pairs of programs count as such: of 328 sizes chosen so, the faster of two is missed by 0.2 % on average and 10 % at
most; as two programs they were missed by 1.3 and 55 %.)
"""

from dsv3c.kernels.implementations import Problem, Tile
from dsv3c.numerics import TILE, ceil_div


def bucket(problem: Problem, sms: int) -> int:
    """The largest number of rows a group of the bucket that `problem` falls into, on a GPU with `sms`
    multiprocessors."""
    rows = max(1, ceil_div(problem.rows, problem.groups))
    if not in_waves(problem):
        return max(16, 1 << (rows - 1).bit_length())
    tiles, columns = ceil_div(rows, TILE), problem.groups * ceil_div(problem.N, TILE)
    waves = _step(ceil_div(tiles * columns, sms))
    return TILE * min(_step(tiles), waves * sms // columns)


def in_waves(problem: Problem) -> bool:
    """Whether waves are what takes the time."""
    return problem.rows > TILE * problem.groups and not problem.operator.endswith("wgrad")


def growth(measured: Problem, problem: Problem, tile: Tile, sms: int) -> float:
    """How many times as long as `measured` a problem takes by its waves of `tile`; 1 if waves are not what takes the
    time."""

    def waves(of: Problem) -> float:
        tiles = of.groups * ceil_div(of.rows, of.groups * tile.rows) * ceil_div(of.N, tile.columns)
        whole, rest = divmod(tiles, sms // tile.programs)
        in_parts = tile.parts > 1 and rest * tile.parts <= sms // tile.programs
        return whole + (0.5 if in_parts else 1.0) * (rest > 0)  # a part of the specialised GEMM's takes half as long

    return waves(problem) / waves(measured) if in_waves(problem) else 1.0


def _step(n: int) -> int:
    """The least number of three significant bits from n on: 1 to 8, 10, 12, 14, 16, 20, ..."""
    low = max(0, n.bit_length() - 3)
    return -(-n >> low) << low
