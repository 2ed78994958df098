"""Buckets of rows: intervals, none with two numbers of waves while a wave counts."""

import pytest

from dsv3c.kernels.implementations import Problem, Tile, implementations
from dsv3c.tuning.buckets import bucket, growth

SMS = 132


def waves(rows: int, N: int, groups: int) -> int:
    return -(-(-(-rows // 128) * groups * -(-N // 128)) // SMS)


@pytest.mark.parametrize(("N", "groups"), [(2112, 1), (4096, 1), (24576, 1), (4096, 8), (7168, 256)])
def test_buckets_are_intervals_that_keep_the_number_of_waves(N, groups):
    operator = "grouped_gemm" if groups > 1 else "gemm"
    of = {rows: bucket(Problem(operator, groups * rows, N, 7168, groups), SMS) for rows in range(1, 4400)}
    assert all(bound >= rows for rows, bound in of.items())
    assert all(of[bound] == bound for bound in of.values() if bound in of)
    assert sorted(of.values()) == list(of.values())
    for rows, bound in of.items():
        if rows > 128:
            counts = waves(rows, N, groups), waves(bound, N, groups)
            assert counts[0] == counts[1] or 4 * counts[1] <= 5 * counts[0] > 32


def test_few_rows_and_contracted_rows_go_in_octaves():
    assert [bucket(Problem("gemm", M, 4096, 7168), SMS) for M in (0, 1, 16, 17, 64, 65, 128)] == [
        16, 16, 16, 32, 64, 128, 128,
    ]  # fmt: skip
    assert bucket(Problem("gemm_wgrad", 4097, 4096, 7168), SMS) == 8192
    assert bucket(Problem("grouped_gemm", 256 * 100, 4096, 7168, 256), SMS) == 128


def test_growth_is_of_waves_where_they_take_the_time():
    measured = Problem("gemm", 4096, 7168, 2048)
    assert growth(measured, measured._replace(rows=3328), Tile(128, 256), SMS) == 6 / 7
    assert growth(measured, measured._replace(rows=3328), Tile(128, 128), SMS) == 12 / 14
    assert growth(measured, measured._replace(rows=128), Tile(128, 128), SMS) == 1
    contracted = measured._replace(operator="gemm_wgrad")
    assert growth(contracted, contracted._replace(rows=512), Tile(128, 128), SMS) == 1
    groups = Problem("grouped_gemm", 8 * 4096, 4096, 7168, 8)
    assert growth(groups, groups._replace(rows=8 * 129), Tile(128, 256), SMS) == 2 / 32
    # Pairs on 66 pairs of multiprocessors: of 7 × 38 and 16 × 38 tiles; of 8 × 2 × 22 and 8 × 16 × 22.
    assert growth(measured, measured._replace(rows=1792), Tile(256, 192, 2), SMS) == 5 / 10
    assert growth(groups, groups._replace(rows=8 * 300), Tile(256, 192, 2), SMS) == 6 / 43

    # 32 × 38 and 8 × 38 tiles leave 28 and 40 for a last wave; 3 × 38 and 2 × 38 are a wave, too many for parts.
    dealt_out = Tile(128, 192, parts=3)
    assert growth(measured, measured._replace(rows=1024), dealt_out, SMS) == 2.5 / 9.5
    assert growth(measured, measured._replace(rows=384), dealt_out, SMS) == 1 / 9.5
    assert growth(measured, measured._replace(rows=132), dealt_out, SMS) == 1 / 9.5


def test_tiles_of_the_specialised_product():
    pytest.importorskip("triton")
    dense, grouped = (implementations(operator)["warp_specialized"].tile for operator in ("gemm", "grouped_gemm"))
    assert grouped({"cluster": 1, "band": 8}) == (128, 192, 1, 1)
    assert grouped({"cluster": 2, "band": 8}) == (256, 192, 2, 1)
    assert dense({"band": 8}) == (128, 192, 1, 3)
    assert dense({"band": 0}) == (128, 192, 1, 1)
