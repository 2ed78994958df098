"""Which numbers of rows share a row of a tuning table.

What flips with the number of rows is the number of waves: as many tiles as there are multiprocessors run at a time, so
one tile more can cost as much as a whole wave, and another size of tile may win. A bucket therefore never crosses a
change of the number of waves of 128×128 tiles, as long as a wave counts (up to 8; then up to a quarter more), and never
spans more than a quarter of an octave of tiles. Up to 128 rows the weights are the traffic, and buckets are octaves; as
they are where rows are contracted (weight gradients), which changes the length of a tile's loop alone.
"""

from dsv3c.kernels.implementations import Problem
from dsv3c.numerics import TILE, ceil_div


def bucket(problem: Problem, sms: int) -> int:
    """The largest number of rows a group of the bucket that `problem` falls into, on a GPU with `sms`
    multiprocessors."""
    rows = max(1, ceil_div(problem.rows, problem.groups))
    if rows <= TILE or problem.operator.endswith("wgrad"):
        return max(16, 1 << (rows - 1).bit_length())
    tiles, columns = ceil_div(rows, TILE), problem.groups * ceil_div(problem.N, TILE)
    waves = _step(ceil_div(tiles * columns, sms))
    return TILE * min(_step(tiles), waves * sms // columns)


def _step(n: int) -> int:
    """The least number of three significant bits from n on: 1 to 8, 10, 12, 14, 16, 20, ..."""
    low = max(0, n.bit_length() - 3)
    return -(-n >> low) << low
