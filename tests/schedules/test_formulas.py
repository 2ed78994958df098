"""The formulas of the generators' docstrings against the simulator, over grids of sizes and costs.

P ranks, n micro-batches; F, I, W: ticks of a stage; O: of an overlapped pair.
"""

from itertools import pairwise, product

import pytest

from dsv3c.schedules import Cost, generate, interleaved, simulate

SIZES = [(1, 3), (2, 4), (3, 7), (4, 8), (4, 13), (6, 16)]
EVEN_SIZES = [(2, 4), (4, 8), (4, 14), (6, 12), (8, 20)]
TICKS = list(product((1, 2, 4), repeat=3))


def timeline(name, size, f, i, w, overlapped=None, comm=0):
    overlapped = f + i + w if overlapped is None else overlapped
    return simulate(generate(name, *size), Cost(f, i + w, w, overlapped, comm=comm))


@pytest.mark.parametrize("size", [*SIZES, (4, 1), (4, 2)])
def test_gpipe_and_1f1b(size):
    p, n = size
    for f, i, w in TICKS:  # any times
        for name in ("gpipe", "1f1b"):
            assert set(timeline(name, size, f, i, w).bubbles) == {(p - 1) * (f + i + w)}
    assert timeline("gpipe", size, 1, 1, 1).activations == (n,) * p
    assert timeline("1f1b", size, 1, 1, 1).activations == tuple(min(p - r, n) for r in range(p))


@pytest.mark.parametrize("v", [1, 2, 3])
@pytest.mark.parametrize(
    ("p", "n", "longest_round"), [(1, 2, 1), (2, 4, 2), (3, 9, 3), (3, 7, 4), (4, 8, 4), (4, 7, 7)]
)
def test_interleaved_from_a_round_on(p, n, longest_round, v):
    program = interleaved(p, n, stages_per_rank=v)
    for f, i, w in TICKS:
        assert set(simulate(program, Cost(f, i + w, w, f + i + w)).bubbles) == {(p - 1) * (f + i + w)}
    ahead = [(v - 1) * longest_round + 2 * (p - 1 - r) + 1 if v > 1 else p - r for r in range(p)]
    assert simulate(program, Cost(1, 2, 1, 3)).activations == tuple(min(a, v * n) for a in ahead)


def test_interleaved_idles_more_without_a_full_round():
    assert max(simulate(interleaved(4, 2), Cost(1, 2, 1, 3)).bubbles) > 3 * 3


@pytest.mark.parametrize("size", SIZES)
def test_zb1p_if_w_is_the_shortest(size):
    p, n = size
    for f, i, w in TICKS:
        bubbles = set(timeline("zb1p", size, f, i, w).bubbles)
        published = (p - 1) * (f + (i + w) - 2 * w)
        if w <= min(f, i):
            assert bubbles == {published}
        else:  # a W longer than the gap it fills costs time itself
            assert min(bubbles) >= published
    assert timeline("zb1p", size, 1, 1, 1).activations == (min(p, n),) * p


@pytest.mark.parametrize("size", [(1, 3), (2, 4), (3, 5), (4, 8), (4, 13), (6, 16)])
def test_zbv_if_w_f_i_are_in_order(size):
    p, _ = size
    for f, i, w in TICKS:
        if w <= f <= i:
            assert set(timeline("zbv", size, f, i, w).bubbles) == {(p - 1) * max(i, 2 * (i - w))}
    assert timeline("zbv", size, 1, 1, 1).activations == (2 * p,) * p


def test_zbv_with_equal_times_only_waits_for_the_first_input():
    p = 4
    rows = timeline("zbv", (p, 8), 1, 1, 1).rows
    assert [(row[0].start, row[-1].end) for row in rows] == [(r, rows[0][-1].end + r) for r in range(p)]
    assert all(a.end == b.start for row in rows for a, b in pairwise(row))


@pytest.mark.parametrize(
    ("name", "size", "half"),
    [
        *(("dualpipe", (p, n), p // 2) for p, n in EVEN_SIZES),
        *(("dualpipev", (p // 2, n // 2), p // 2) for p, n in EVEN_SIZES),
    ],
)
def test_dualpipe_and_dualpipev_if_w_f_i_are_in_order_and_f_is_i(name, size, half):
    from_turn = [half - 1 - r for r in range(half)]
    from_turn += from_turn[::-1] if name == "dualpipe" else []
    for f, w in product((1, 2, 4), repeat=2):
        if w > f:
            continue
        b = f + w
        for overlapped in range(b, f + b + 1):
            bubble, saved = (half - 1) * (overlapped + b - 3 * w), f + b - overlapped
            found = timeline(name, size, f, f, w, overlapped).bubbles
            assert max(found) == bubble
            assert found == tuple(bubble - max(0, ranks - 1) * saved for ranks in from_turn)
    assert set(timeline(name, size, 1, 1, 1).activations) == {2 * half + 1}


def test_dualpipes_formula_is_not_exact_if_f_is_not_i():
    f, i, w = 1, 2, 1
    assert max(timeline("dualpipe", (8, 16), f, i, w).bubbles) != 3 * ((f + i + w) + (i + w) - 3 * w)


def test_parameter_copies():
    def copies(name):
        return set(timeline(name, (4, 8), 1, 1, 1).copies)

    assert [copies(name) for name in ("1f1b", "zb1p", "dualpipe", "dualpipev", "zbv")] == [{1}, {1}, {2}, {2}, {2}]


def test_the_formulas_are_for_free_communication_and_equal_stages():
    """With either, the bubble is larger than the formula, here (P-1)(F+B) = 9."""
    assert max(timeline("1f1b", (4, 8), 1, 1, 1, comm=1).bubbles) > 9
    slow = Cost((1, 1, 1, 2), (2, 2, 2, 4), (1, 1, 1, 2), tuple((3, 3, 3, 5) for _ in range(4)))
    assert max(simulate(generate("1f1b", 4, 8), slow).bubbles) > 9


def test_v3_of_deepseeks_table():
    """16 ranks, 64 micro-batches, B = 2F, W = F, nothing gained by overlapping: the table of the README of DualPipe."""
    bubbles = [max(timeline(name, (16, 64), 1, 1, 1).bubbles) for name in ("1f1b", "zb1p", "dualpipe")]
    assert bubbles == [15 * 3, 15 * (3 - 2), 7 * (3 + 2 - 3)]
