"""Studies: what 30 trials find of recorded sweeps, and what a trial that goes wrong costs."""

import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from dsv3c.benchmarks import bench_tuning
from dsv3c.errors import TuneError
from dsv3c.kernels.implementations import Implementation, Problem
from dsv3c.tuning import study as studies
from dsv3c.tuning import targets, tuner
from dsv3c.tuning.prefilter import Verdict
from dsv3c.tuning.study import Space
from dsv3c.tuning.tables import Entry, Row
from dsv3c.tuning.worker import Worker, WorkerError

PROBLEM = Problem("gemm", 4096, 4096, 7168)
KNOBS = {"ours": {"x": (1, 2, 3, 4), "y": (2, 4, 8, 16)}, "theirs": {}}
SPACE = Space(
    KNOBS, {"ours": [{"x": x, "y": y} for x in KNOBS["ours"]["x"] for y in KNOBS["ours"]["y"]], "theirs": [{}]}
)
BAD = Space({"ours": {"x": (3, 4, 5, 6, 7)}}, {"ours": [{"x": x} for x in (3, 4, 5, 6, 7)]})


@pytest.fixture
def fakes(monkeypatch):
    """A module that a new process can import."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import misbehave

    return misbehave


def searched(space, measure, trials, storage=None, first=(), seed=0):
    study = studies.open_study(PROBLEM, "h200", space, storage and studies.open_storage(storage), seed)
    outcomes = []
    studies.search(study, space, list(first), measure, trials, outcomes.append)
    return study, outcomes


@pytest.mark.parametrize("recorded", bench_tuning.recorded(), ids=lambda sweep: "x".join(map(str, sweep.problem)))
def test_thirty_trials_are_within_three_percent_of_a_sweep(recorded):
    """Begun with the known configurations, as `dsv3c tune` begins. Times are looked up in what was measured."""
    pytest.importorskip("triton")
    assert len(recorded.times) >= 200
    first = [
        choice
        for choice in tuner.first_choices(recorded.problem, recorded.configs, [], 20)
        if studies.key(*choice) in recorded.times
    ]
    assert all(100 * recorded.regret(seed, first) <= 3 for seed in range(5))


def test_a_study_is_reproducible(fakes):
    trials = [[trial.params for trial in searched(SPACE, fakes.measure, 8, seed=seed)[0].trials] for seed in (0, 0, 1)]
    assert trials[0] == trials[1] != trials[2]


def test_a_study_goes_on_where_it_was(fakes, tmp_path):
    """In a file that Optuna itself reads, hence its dashboard."""
    storage = tmp_path / "new" / "studies.db"
    first, outcomes = searched(SPACE, fakes.measure, 5, storage)
    assert len(outcomes) == len(studies.measured(first)) == 5
    second, outcomes = searched(SPACE, fakes.measure, 9, storage)
    assert len(outcomes) == 4
    chosen = [studies.key(*studies.choice_of(trial)) for trial in studies.measured(second)]
    assert len(set(chosen)) == 9
    assert not searched(SPACE, fakes.measure, 9, storage)[1]
    loaded = optuna.load_study(study_name=first.study_name, storage=f"sqlite:///{storage}")
    assert loaded.best_value == studies.best_us(second)
    assert loaded.user_attrs["problem"] == PROBLEM._asdict()


def test_a_small_space_ends_the_search(fakes):
    study, outcomes = searched(SPACE, fakes.measure, 100)
    assert len(outcomes) == len(SPACE.choices()) == 17
    assert studies.best_us(study) == fakes.PEAK_US


def test_what_the_prefilter_dropped_is_never_measured(fakes):
    kept = [config for config in SPACE.configs["ours"] if config["x"] != 3]
    study, _ = searched(Space(KNOBS, {"ours": kept, "theirs": [{}]}), fakes.measure, 100)
    assert {trial.params.get("ours.x") for trial in studies.measured(study)} == {None, 1, 2, 4}


def test_slow_configurations_are_pruned_after_a_short_timing(fakes):
    rounds = []

    def measure(choices, count):
        rounds.append(count)
        return fakes.measure(choices, count)

    study, outcomes = searched(SPACE, measure, 2, first=[("ours", {"x": 3, "y": 8}), ("ours", {"x": 1, "y": 16})])
    assert outcomes == ["measured", "pruned"]
    assert rounds == [studies.SHORT, studies.LONG, studies.SHORT]
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED]


def test_a_hang_a_crash_and_a_wrong_result_cost_a_trial_each(fakes):
    start = time.monotonic()
    with Worker(fakes.measure, limit_s=0.5) as worker:
        study, outcomes = searched(BAD, worker, 5, first=[("ours", {"x": x}) for x in (5, 6, 7, 4, 3)])
        assert worker.starts == 3
    assert [outcome.partition(":")[0] for outcome in outcomes] == [
        "hung", "crashed", "AssertionError", "measured", "measured",
    ]  # fmt: skip
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 3 + ["COMPLETE"] * 2
    assert studies.best_us(study) == fakes.time_of("ours", {"x": 3}).median_us
    assert time.monotonic() - start < 60


def test_a_row_has_the_best_and_the_best_of_another_implementation(fakes, monkeypatch):
    found = {name: _implementation(name, knobs) for name, knobs in KNOBS.items()}
    monkeypatch.setattr(tuner, "implementations", lambda operator: found)
    verdicts = {("gemm", name): [Verdict(config, None) for config in of] for name, of in SPACE.configs.items()}
    tuned = tuner.tune(PROBLEM, targets.load("h200"), verdicts, fakes.measure, trials=20)
    assert (tuned.row.best.implementation, tuned.row.best.config) == ("ours", {"x": 3, "y": 8})
    assert (tuned.row.runner_up.implementation, tuned.row.runner_up.config) == ("theirs", {})
    assert (tuned.row.best.median_us, tuned.row.best.p20_us) == (fakes.PEAK_US, fakes.PEAK_US - 1)
    assert (tuned.row.bucket, tuned.row.rows, tuned.row.trials) == (4096, 4096, 17)
    nothing = tuner.tune(PROBLEM, targets.load("h200"), verdicts, _fail, trials=3)
    assert nothing.row is None


def _implementation(name, knobs, known=()):
    return Implementation(name, knobs, launch=None, known=known)


def test_a_crash_among_the_fastest_costs_that_one(fakes):
    """And not what was measured before: in turns with others a kernel may fail that did not alone."""

    def measure(choices, rounds):
        if ("ours", {"x": 3, "y": 8}) in choices and rounds == studies.LONG and finishing:
            raise WorkerError("crashed")
        return fakes.measure(choices, rounds)

    finishing = False
    study, _ = searched(SPACE, measure, 100)
    finishing = True
    best, _ = studies.finish(study, measure)
    assert studies.best_us(study) == fakes.PEAK_US < best.median_us
    assert studies.finish(study, _fail) is None


def _fail(choices, rounds):
    raise WorkerError("crashed")


@pytest.mark.parametrize("kind", ["no database", "a folder", "under a file"])
def test_a_storage_that_cannot_be_used_is_a_line(tmp_path, kind):
    path = tmp_path / "studies.db"
    if kind == "no database":
        path.write_text("this is no database, and long enough to look at" * 10)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.write_text("")
        path = path / "studies.db"
    with pytest.raises(TuneError, match=r"expected an Optuna storage, found: .*; try another --storage") as caught:
        studies.open_storage(path)
    assert "\n" not in str(caught.value)


def test_plots(fakes, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    study, _ = searched(SPACE, fakes.measure, 12)
    made = studies.plots(study, tmp_path / "plots")
    assert [path.name.rpartition("-")[2] for path in made] == ["history.png", "importance.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_what_a_study_begins_with(monkeypatch):
    """Libraries, then the rows nearest in shape and in rows, then of each implementation in turn what is known."""
    ours = _implementation("ours", {"x": (1, 2, 3)}, known=({"x": 1}, {"x": 2}))
    theirs = _implementation("theirs", {"y": (1, 2)}, known=({"y": 1},))
    found = {"ours": ours, "theirs": theirs, "library": _implementation("library", {})}
    monkeypatch.setattr(tuner, "implementations", lambda operator: found)

    def row(N, rows, x):
        best = Entry("ours", {"x": x}, 1.0, 1.0, 1.0)
        return Row("gemm", N, 7168, 1, rows, rows, best, None, 1, "2.11.0", "3.6")

    rows = [row(512, 4096, 1), row(4096, 64, 2), row(4096, 8192, 3)]
    nearest = [("ours", {"x": 3}), ("ours", {"x": 2}), ("ours", {"x": 1})]
    assert tuner.first_choices(PROBLEM, found, rows, 9) == [("library", {}), *nearest, ("theirs", {"y": 1})]
    assert tuner.first_choices(PROBLEM, ["theirs"], rows, 9) == [("theirs", {"y": 1})]
    assert tuner.first_choices(PROBLEM, found, [], 3) == [("library", {}), ("ours", {"x": 1}), ("theirs", {"y": 1})]
