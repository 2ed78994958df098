"""The value and its text forms."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3c.schedules import (
    GENERATORS,
    Action,
    Overlap,
    ScheduleError,
    dualpipe,
    dualpipev,
    from_text,
    generate,
    to_text,
    to_torch_csv,
)

index = st.integers(0, 999)
alone = st.builds(Action, index, st.sampled_from("FBIW"), index, st.integers(0, 1))
pair = st.builds(Overlap, st.builds(Action, index, st.just("F"), index), st.builds(Action, index, st.just("B"), index))
programs = st.lists(st.lists(alone | pair, min_size=1, max_size=6).map(tuple), min_size=1, max_size=4).map(tuple)


@given(programs)
def test_any_program_is_read_back_from_its_text(program):
    assert from_text(to_text(program)) == program


def test_the_words():
    program = from_text("2F0 (0F7;7B3)\n\n3I12r 3W12r\n")
    assert program == (
        (Action(2, "F", 0), Overlap(Action(0, "F", 7), Action(7, "B", 3))),
        (Action(3, "I", 12, direction=1), Action(3, "W", 12, direction=1)),
    )
    assert to_text(program) == "2F0 (0F7;7B3)\n3I12r 3W12r\n"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("0X0", "1:1"),
        ("0F0 0F1\n1F0  f1", "2:6"),
        ("0F0\n\n(0F0;0F1)", "3:1"),
        ("0F0 (0F1;", "1:5"),
        ("0F0 -1F0", "1:5"),
        ("", "1:1"),
        (" \n", "1:1"),
    ],
)
def test_what_is_no_text_says_line_and_column(text, place):
    with pytest.raises(ScheduleError, match=f"^order.txt:{place}: expected .*, found .*; try .*") as error:
        from_text(text, where="order.txt")
    assert "\n" not in str(error.value)


def test_torch_csv_is_read_back():
    program = dualpipev(3, 7)
    assert from_text(to_torch_csv(program)) == program
    assert from_text("0F0,,0F1,0B0\n,1F0,1B0,\n") == from_text("0F0 0F1 0B0\n1F0 1B0")


def test_torch_csv_has_no_word_for_the_reverse_direction():
    with pytest.raises(ScheduleError, match="found 3F0r; try dualpipev"):
        to_torch_csv(dualpipe(4, 8))


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "dualpipe"])  # it has no word for that
def test_torch_reads_validates_and_lowers_the_csv(name):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules", reason="torch's reader is the oracle")
    rows = to_torch_csv(generate(name, 4, 9)).splitlines()
    order = {rank: [schedules._Action.from_str(word) for word in row.split(",")] for rank, row in enumerate(rows)}
    stages = 8 if name in ("interleaved", "zbv", "dualpipev") else 4
    home = schedules._validate_schedule(order, 4, stages, 9)
    lowered = schedules._add_send_recv(order, home.__getitem__, stages)
    sent = sum("SEND" in str(action) for row in lowered.values() for action in row)
    assert sent == 2 * 9 * sum(home[s] != home[s + 1] for s in range(stages - 1))


def test_schedules_need_no_torch_and_nothing_else_of_ours():
    code = "import sys, dsv3c.schedules; print(*(m for m in sys.modules if m.split('.')[0] in ('torch', 'dsv3c')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in loaded if name != "dsv3c" and not name.startswith("dsv3c.schedules")] == []
