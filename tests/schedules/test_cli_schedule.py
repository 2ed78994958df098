"""``dsv3c schedule``, as a user types it."""

import json
import re
import subprocess
import sys

import pytest

from dsv3c.cli import main
from dsv3c.schedules import dualpipe, to_text

SIZE = ("--ranks", "16", "--microbatches", "64")
SMALL = ("--ranks", "4", "--microbatches", "8")


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dsv3c", "schedule", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


def test_the_table(run):
    """By hand: bubbles from the formulas with F = W = 1, B = 2; zbv's and dualpipev's stages take half of that."""
    costs = ("--forward", "1", "--backward", "2", "--weight", "1", "--overlapped", "3")
    assert run(*SIZE, *costs) == (
        0,
        "schedule       bubble           makespan    activations    parameters\n"
        "-----------  --------  -----  ----------  -------------  ------------\n"
        "gpipe            45    19.0%       237             64               1\n"
        "1f1b             45    19.0%       237             16               1\n"
        "interleaved      22.5  10.5%       214.5           23.5             1\n"
        "zb1p             15    7.2%        207             16               1\n"
        "zbv               7.5  3.8%        199.5           16               1\n"
        "dualpipe         14    6.8%        206             17               2\n"
        "dualpipev        15    7.2%        207             16.5             1\n",
        "",
    )


def test_json(run):
    code, out, err = run(*SIZE, "--overlapped", "2.5", "--json")
    rows = json.loads(out)
    assert (code, err, len(rows)) == (0, "", 7)
    assert all(list(row) == ["name", "bubble", "makespan", "activations", "parameters"] for row in rows)
    assert rows[1] == {"name": "1f1b", "bubble": 45, "makespan": 237, "activations": 16, "parameters": 1}
    assert rows[5]["bubble"] == 7 * (2.5 + 2 - 3)


def test_any_unit_is_exact(run):
    """In units of a tenth and a third: 1F1B's bubble is 3 (F + B)."""
    _, out, _ = run(*SMALL, "--forward", "0.1", "--backward", "1/3", "--weight", "0.1", "--only", "1F1B", "--json")
    assert json.loads(out)[0]["bubble"] == float("1.3")


def test_communication_costs_time(run):
    free, slow = (json.loads(run(*SMALL, "--comm", comm, "--json")[1]) for comm in ("0", "0.25"))
    assert all(a["makespan"] < b["makespan"] for a, b in zip(free, slow, strict=True))


def test_memory_leaves_out_what_does_not_fit(run):
    code, out, err = run(*SIZE, "--memory", "16.5", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == ["1f1b", "zb1p", "zbv", "dualpipev"]
    assert err.splitlines() == [
        "left out: gpipe, which holds 64 activations",
        "left out: interleaved, which holds 23.5 activations",
        "left out: dualpipe, which holds 17 activations",
    ]


def test_text_and_back(run, tmp_path):
    code, out, _ = run(*SMALL, "--only", "DualPipe", "--text")
    assert (code, out) == (0, to_text(dualpipe(4, 8)))
    file = tmp_path / "mine.txt"
    file.write_text(out)
    mine, theirs = (json.loads(run(*of, "--json")[1]) for of in (("--program", file), (*SMALL, "--only", "dualpipe")))
    assert mine == [theirs[0] | {"name": "mine"}]


def test_plot_and_trace(run, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'dsv3c[plot]'")
    picture, trace = tmp_path / "out.svg", tmp_path / "out.json"
    code, out, _ = run(*SMALL, "--only", "zbv", "--plot", picture, "--trace", trace)
    assert code == 0
    assert "zbv" in out
    assert "zbv: 4 ranks, 8 micro-batches, makespan 25.5, bubble 1.5, 4 activations" in picture.read_text()
    assert json.loads(trace.read_text())["traceEvents"]


def test_search(run):
    pytest.importorskip("ortools", reason="pip install 'dsv3c[schedules]'")
    code, out, err = run("--ranks", "2", "--microbatches", "4", "--only", "dualpipe", "--only", "search", "--json")
    best, found = json.loads(out)
    assert code == 0
    assert found["makespan"] <= best["makespan"]
    assert err.startswith("search: from ")
    assert "the shortest takes at least 12, this 0.0% more" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--ranks", "15", "--microbatches", "64"),
            "dualpipe: expected an even number of ranks .*; try --ranks 16, or",
        ),
        (("--ranks", "4", "--microbatches", "6"), "dualpipe: expected .* 8 or more .*, found 6; try --microbatches 8"),
        (("--ranks", "4"), "--microbatches: expected a number, found none"),
        ((), "--ranks: expected a number, found none"),
        ((*SMALL, "--forward", "-1"), "--forward: expected a number from 0, found '-1'"),
        ((*SMALL, "--comm", "fast"), "--comm: expected a number from 0, found 'fast'"),
        ((*SMALL, "--comm", "1/0"), "--comm: expected a number from 0, found '1/0'"),
        ((*SMALL, "--weight", "3"), "--weight: expected a part of --backward, at most 2, found 3"),
        ((*SMALL, "--overlapped", "1"), "--overlapped: expected at least 2, the longer of .*, found 1"),
        ((*SMALL, "--forward", "0", "--backward", "0", "--weight", "0"), "--forward, --backward: expected some time"),
        ((*SMALL, "--only", "dualpip"), "schedule: expected one of gpipe, .*, found 'dualpip'; try dualpipe"),
        ((*SMALL, "--memory", "3"), "--memory: expected at least 4, what 1f1b holds, found 3; try --only search"),
        ((*SMALL, "--text"), "expected one schedule, found 7; try --only dualpipe"),
        ((*SMALL, "--only", "zbv", "--plot", "a.pdf"), "plot: expected a file ending in .svg or .png, found 'a.pdf'"),
        ((*SMALL, "--only", "zbv", "--trace", "no/such/folder"), "no/such/folder: expected a file to write, found: No"),
        (("--program", "no-such-file"), "--program: expected a text file, found no-such-file"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err)


def test_a_bad_text_says_line_and_column_and_a_bad_order_shows_the_grid(run, tmp_path):
    file = tmp_path / "order.txt"
    file.write_text("0F0 0B0\n1F0 1X0\n")
    code, _, err = run("--program", file)
    assert code == 2
    assert f"{file}:2:5: expected an action such as 2F0" in err
    file.write_text("0F0 0B0\n1B0 1F0\n")
    code, _, err = run("--program", file)
    assert code == 2
    assert err.splitlines()[:3] == ["step   0     1", "rank 0 0F0   0B0", "rank 1 >1B0< 1F0"]
    assert "found waiting in a circle: 1B0 (rank 1, step 0) for 1F0" in err.splitlines()[3]


def test_needs_no_torch():
    code = (
        "import sys; sys.argv = ['dsv3c', 'schedule', '--ranks', '4', '--microbatches', '8']\n"
        "from dsv3c.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
