"""The generators' orders: small goldens to read, torch's own generators, what does not fit."""

from types import SimpleNamespace

import pytest

from dsv3c.schedules import (
    GENERATORS,
    ScheduleError,
    check,
    dualpipe,
    dualpipev,
    from_text,
    generate,
    interleaved,
    to_text,
    to_torch_csv,
    zbv,
)

# Rank r sends P-1-r forwards ahead, then alternates.
ONE_F_ONE_B = """\
0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0B3 0B4 0B5
1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1B4 1B5
2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2B5
3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5
"""

# The same with B split; W follows r micro-batches behind I.
ZB1P = """\
0F0 0F1 0F2 0F3 0I0 0W0 0F4 0I1 0W1 0F5 0I2 0W2 0I3 0W3 0I4 0W4 0I5 0W5
1F0 1F1 1F2 1I0 1F3 1I1 1W0 1F4 1I2 1W1 1F5 1I3 1W2 1I4 1W3 1I5 1W4 1W5
2F0 2F1 2I0 2F2 2I1 2F3 2I2 2W0 2F4 2I3 2W1 2F5 2I4 2W2 2I5 2W3 2W4 2W5
3F0 3I0 3F1 3I1 3F2 3I2 3F3 3I3 3W0 3F4 3I4 3W1 3F5 3I5 3W2 3W3 3W4 3W5
"""

# Steps of rank 0, as the docstring of _dualpipev_row numbers them: 0F0 0F1 | 0F2 3F0r | 3I0r 3W0r 3F1r |
# (0F3;3B1r) (3F2r;0B0) | 3B2r (3F3r;0B1) | 3B3r 0I2 | 0W2 0I3 | 0W3. Ranks 2 and 3 are 1 and 0 the other way round.
# Equal to what github.com/deepseek-ai/DualPipe @3da1bbe does with 4 ranks and 8 micro-batches.
DUALPIPE = """\
0F0 0F1 0F2 3F0r 3I0r 3W0r 3F1r (0F3;3B1r) (3F2r;0B0) 3B2r (3F3r;0B1) 3B3r 0I2 0W2 0I3 0W3
1F0 2F0r 1F1 2F1r 1F2 2B0r (2F2r;1B0) (1F3;2B1r) (2F3r;1B1) 2B2r 1B2 2I3r 1I3 2W3r 1W3
1F0r 2F0 1F1r 2F1 1F2r 2B0 (2F2;1B0r) (1F3r;2B1) (2F3;1B1r) 2B2 1B2r 2I3 1I3r 2W3 1W3r
0F0r 0F1r 0F2r 3F0 3I0 3W0 3F1 (0F3r;3B1) (3F2;0B0r) 3B2 (3F3;0B1r) 3B3 0I2r 0W2r 0I3r 0W3r
"""


@pytest.mark.parametrize(
    ("name", "num_microbatches", "golden"), [("1f1b", 6, ONE_F_ONE_B), ("zb1p", 6, ZB1P), ("dualpipe", 8, DUALPIPE)]
)
def test_golden(name, num_microbatches, golden):
    assert to_text(generate(name, 4, num_microbatches)) == golden
    check(from_text(golden))


def test_dualpipev_is_the_first_half_of_dualpipe():
    half = to_text(dualpipev(4, 10))
    assert to_text(dualpipe(8, 20)[:4]).replace("r", "") == half


SIZES = [(1, 2), (2, 4), (2, 7), (3, 6), (4, 8), (4, 10), (4, 13), (8, 20), (16, 64)]


def torch_rows(class_name: str, num_ranks: int, num_microbatches: int) -> list[str]:
    """The rows that torch's own generator makes, as its CSV without the empty cells."""
    schedules = pytest.importorskip(
        "torch.distributed.pipelining.schedules", reason="torch's generators are the oracle"
    )
    num_rounds = max(1, num_microbatches // num_ranks)
    self = SimpleNamespace(
        pp_group_size=num_ranks, _n_microbatches=num_microbatches, num_stages=2 * num_ranks, n_local_stages=2,
        number_of_rounds=num_rounds, microbatches_per_round=num_microbatches // num_rounds,
    )  # fmt: skip
    make = getattr(schedules, class_name)._calculate_single_rank_operations
    return [",".join(str(a) for a in make(self, rank) if a is not None) for rank in range(num_ranks)]


@pytest.mark.parametrize("size", SIZES)
def test_dualpipev_is_torchs(size):
    assert to_torch_csv(dualpipev(*size)).splitlines() == torch_rows("ScheduleDualPipeV", *size)


@pytest.mark.parametrize("size", [*SIZES, (4, 1), (4, 3), (4, 6)])
def test_zbv_is_torchs(size):
    assert to_torch_csv(zbv(*size)).splitlines() == torch_rows("ScheduleZBVZeroBubble", *size)


@pytest.mark.parametrize("size", [(2, 4), (3, 6), (4, 8), (4, 10), (8, 20), (16, 64), (4, 3)])
def test_interleaved_is_torchs(size):
    assert to_torch_csv(interleaved(*size)).splitlines() == torch_rows("ScheduleInterleaved1F1B", *size)


@pytest.mark.parametrize("name", [name for name in GENERATORS if not name.startswith("dualpipe")])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 7, 12])
def test_other_schedules_take_any_size(name, num_ranks, num_microbatches):
    check(generate(name, num_ranks, num_microbatches))


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_microbatches", "message"),
    [
        ("dualpipe", 3, 12, "dualpipe: expected an even number of ranks .*, found 3; try --ranks 4"),
        ("dualpipe", 0, 12, "dualpipe: expected an even number of ranks .*, found 0; try --ranks 2"),
        ("dualpipe", 4, 6, "expected an even number of micro-batches, 8 or more .*, found 6; try --microbatches 8"),
        ("dualpipe", 4, 9, "found 9; try --microbatches 10"),
        ("dualpipev", 4, 7, "dualpipev: expected 8 micro-batches or more .*, found 7; try --microbatches 8"),
        ("gpipe", 0, 1, "gpipe: expected 1 rank or more, found 0; try --ranks 1"),
        ("ZB-1P", 2, 0, "zb1p: expected 1 micro-batch or more, found 0; try --microbatches 1"),
        ("dualpip", 4, 8, "expected one of gpipe, .*, found 'dualpip'; try dualpipe"),
    ],
)
def test_what_does_not_fit_says_what_does(name, num_ranks, num_microbatches, message):
    with pytest.raises(ScheduleError, match=message) as error:
        generate(name, num_ranks, num_microbatches)
    assert "\n" not in str(error.value)
