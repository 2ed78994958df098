"""Pictures and traces: what is in them, not how they look."""

import builtins
import json
from fractions import Fraction
from itertools import groupby
from xml.etree import ElementTree

import pytest

from dsv3c.schedules import Cost, ScheduleError, dualpipe, generate, plot, simulate, trace

TIMELINE = simulate(dualpipe(4, 8), Cost(1, 2, 1, 3, comm=1))


def test_svg_has_a_number_per_action_and_a_label_per_rank(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'dsv3c[plot]'")
    plot(TIMELINE, tmp_path / "a.svg", title="dualpipe by hand")
    texts = [text.text for text in ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")]
    for microbatch in "0123":
        # Each of 2 directions x 4 stages has F, and B or I and W; so has the axis a few numbers.
        assert texts.count(microbatch) >= 16
    assert [text for text in texts if text.startswith("rank")] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert {"dualpipe by hand", "forward", "backward", "input gradient", "weight gradient", "idle"} <= set(texts)


def test_the_same_timeline_gives_the_same_svg(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'dsv3c[plot]'")
    for name in ("a.svg", "b.svg"):
        plot(TIMELINE, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_png_has_the_colours_of_the_kinds_where_they_run(tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="pip install 'dsv3c[plot]'")
    plot(simulate(generate("gpipe", 2, 2), Cost(1, 2, 1, 3)), tmp_path / "a.png")
    pixels = (image.imread(tmp_path / "a.png")[:, :, :3] * 255).round().astype(int)
    rows = [[f"#{r:02x}{g:02x}{b:02x}" for r, g, b in row] for row in pixels]
    row = next(row for row in rows if "#f2a33a" in row)  # the upper end of rank 0, above its numbers
    kinds = [colour for colour, _ in groupby(row) if colour in ("#f2a33a", "#f0f0f0", "#3f9f5f")]
    assert kinds == ["#f2a33a", "#f2a33a", "#f0f0f0", "#3f9f5f", "#3f9f5f"]  # F F, idle, B B


@pytest.mark.parametrize("name", ["a.pdf", "a"])
def test_other_files(tmp_path, name):
    with pytest.raises(ScheduleError, match=r"plot: expected a file ending in .svg or .png, found .*; try a.svg"):
        plot(TIMELINE, tmp_path / name)


def test_without_matplotlib(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ScheduleError, match=r"expected matplotlib, found none; try pip install 'dsv3c\[plot\]'"):
        plot(TIMELINE, tmp_path / "a.svg")


def test_trace():
    events = json.loads(trace(TIMELINE, unit=Fraction(1, 2)))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [(e["tid"], e["name"], 2 * e["ts"], 2 * (e["ts"] + e["dur"])) for e in slices] == [
        (rank, str(span.cell), span.start, span.end) for rank, row in enumerate(TIMELINE.rows) for span in row
    ]
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert names == ["rank 0", "rank 1", "rank 2", "rank 3"]
    # 4 micro-batches in 2 directions cross 3 borders, there and back; an arrow starts in a slice and ends at one.
    sent, received = ([e for e in events if e["ph"] == ph] for ph in "sf")
    assert len(sent) == len(received) == 4 * 2 * 3 * 2
    for a, b in zip(sent, received, strict=True):
        assert a["id"] == b["id"]
        assert a["ts"] < b["ts"]
        assert any(e["tid"] == a["tid"] and e["ts"] + e["dur"] == a["ts"] + 0.5 for e in slices)  # its last tick
        assert any(e["tid"] == b["tid"] and e["ts"] == b["ts"] for e in slices)
    held = [event["args"]["held"] for event in events if event["ph"] == "C" and event["name"].endswith("rank 0")]
    assert max(held) == 5
