"""An Optuna study for each problem: 30 trials instead of every configuration.

A trial is one configuration of one implementation, measured by a function that is given. It is pruned after a few
rounds when those are clearly slower than the best of its implementation so far. What the study proposes and the
prefilter dropped, or an earlier trial had, costs nothing and is told to the sampler as pruned. The fastest few are
timed again in turns.
"""

import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

from dsv3c.benchmarks.timing import Timing
from dsv3c.errors import TuneError
from dsv3c.kernels.implementations import Problem
from dsv3c.tuning.tables import Entry, triton_version
from dsv3c.tuning.worker import WorkerError

Choice = tuple[str, dict[str, Any]]
SHORT, LONG = 3, 15  # rounds
SLOWER = 1.2  # so much slower than its implementation's best in the short timing, and a trial is pruned
FINALISTS = 4
MISSES = 10  # proposals in a row that cannot be run or were; then one is drawn from what is left


Measure = Callable[[Sequence[Choice], int], Sequence[Timing]]  # (choices, rounds) -> times, in turns


@dataclass(frozen=True)
class Space:
    """What a study chooses from: each implementation's knobs, and those of their configurations that may be run."""

    knobs: Mapping[str, Mapping[str, tuple]]
    configs: Mapping[str, Sequence[Mapping[str, Any]]]

    def choices(self) -> dict[tuple, tuple[str, Mapping[str, Any]]]:
        """By key."""
        return {key(name, config): (name, config) for name, configs in self.configs.items() for config in configs}

    def suggest(self, trial: optuna.Trial) -> Choice:
        name = trial.suggest_categorical("implementation", sorted(self.knobs))
        knobs = self.knobs[name].items()
        return name, {knob: trial.suggest_categorical(f"{name}.{knob}", values) for knob, values in knobs}


def name_of(problem: Problem, target: str, space: Space) -> str:
    """The study's. Times with another Triton, or from another search space, are another study's."""
    rows = f"{problem.groups}x{problem.rows // problem.groups}"
    knobs = zlib.crc32(repr(sorted(space.knobs.items())).encode())
    return f"{target} triton-{triton_version()} {problem.operator} {rows}x{problem.N}x{problem.K} {knobs:08x}"


class _Kept(InMemoryStorage):
    """In memory, and a copy of each measured trial in a file. Optuna itself would write each parameter of all that are
    proposed: a minute of commits for 20 measurements on a slow disk."""

    def __init__(self, file: BaseStorage, name: str):
        super().__init__()
        self._file = file
        optuna.create_study(storage=file, study_name=name, load_if_exists=True)
        self._of_file = file.get_study_id_from_name(name)

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """With the trials of the file."""
        study_id = super().create_new_study(directions, study_name)
        for trial in self._file.get_all_trials(self._of_file):
            super().create_new_trial(study_id, trial)
        return study_id

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        super().set_study_user_attr(study_id, key, value)
        self._file.set_study_user_attr(self._of_file, key, value)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        told = super().set_trial_state_values(trial_id, state, values)
        trial = self.get_trial(trial_id)
        if "measured" in trial.user_attrs:
            self._file.create_new_trial(self._of_file, trial)
        return told


def open_storage(path: Path) -> BaseStorage:
    """An SQLite file of studies; made if it is not there.

    Raises:
        TuneError: the file cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.RDBStorage(f"sqlite:///{path}")
    except Exception as error:  # of SQLAlchemy, SQLite, or the file system, by what is wrong with the file
        reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
        raise TuneError(f"{path}: expected an Optuna storage, found: {reason}; try another --storage") from error


def open_study(problem: Problem, target: str, space: Space, storage: BaseStorage | None, seed: int = 0) -> optuna.Study:
    """In `storage`, where an earlier one of the same name goes on; None: in memory."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = name_of(problem, target, space)
    kept = None if storage is None else _Kept(storage, name)
    study = optuna.create_study(storage=kept, study_name=name)
    # A study that goes on must not propose again what it began with.
    study.sampler = sampler(seed + len(study.trials))
    study.set_user_attr("problem", problem._asdict())
    return study


def sampler(seed: int) -> optuna.samplers.BaseSampler:
    """TPE over all knobs together. Many candidates, since the best tile is a needle: 6 of 954 configurations are within
    3 % of the best of a GEMM."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, n_startup_trials=4, n_ei_candidates=500
        )


def search(
    study: optuna.Study,
    space: Space,
    first: Sequence[Choice],
    measure: Measure,
    trials: int,
    progress: Callable[[str], None] = lambda outcome: None,
) -> None:
    """Measure until the study has `trials` measured configurations, or there are no more.

    Args:
        first: choices to begin with, such as the built-in ones and a neighbour's best.
        progress: called after each trial, with what became of it.
    """
    allowed, done = space.choices(), {key(*choice_of(trial)) for trial in measured(study)}
    for name, config in first:
        if key(name, config) in allowed.keys() - done:
            study.enqueue_trial(_parameters(name, config), skip_if_exists=True)
    misses = 0
    while len(done) < min(trials, len(allowed)):
        trial = study.ask()
        choice = space.suggest(trial)
        if key(*choice) in allowed.keys() - done:
            done.add(key(*choice))
            progress(_run(study, trial, choice, measure))
            misses = 0
            continue
        study.tell(trial, state=TrialState.PRUNED)
        misses += 1
        if misses == MISSES:
            left = sorted(allowed.keys() - done, key=repr)
            study.enqueue_trial(_parameters(*allowed[Random(trial.number).choice(left)]))
            misses = 0


def _run(study: optuna.Study, trial: optuna.Trial, choice: Choice, measure: Measure) -> str:
    """Measure one trial; what became of it."""
    trial.set_user_attr("measured", True)
    try:
        (short,) = measure([choice], SHORT)
        trial.report(short.median_us, SHORT)
        if short.median_us > SLOWER * best_us(study, choice[0]):
            study.tell(trial, state=TrialState.PRUNED)
            return "pruned"
        (found,) = measure([choice], LONG)
    except WorkerError as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=TrialState.FAIL)
        return str(error)
    trial.set_user_attr("spread", [found.p20_us, found.p80_us])
    study.tell(trial, found.median_us)
    return "measured"


def best_us(study: optuna.Study, name: str | None = None) -> float:
    """Of all, or of the implementation `name`; infinite while nothing was measured."""
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    values = [trial.value for trial in complete if name in (None, trial.params["implementation"])]
    return min((value for value in values if value is not None), default=math.inf)


def measured(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that were run, whatever came of them."""
    return [trial for trial in study.get_trials(deepcopy=False) if "measured" in trial.user_attrs]


def choice_of(trial: optuna.trial.FrozenTrial) -> Choice:
    name = trial.params["implementation"]
    prefix = f"{name}."
    return name, {knob.removeprefix(prefix): v for knob, v in trial.params.items() if knob.startswith(prefix)}


def finish(study: optuna.Study, measure: Measure) -> tuple[Entry, Entry | None] | None:
    """The best, and the best of another implementation: of the fastest few and of each implementation's fastest, timed
    again in turns. None if nothing could be measured."""
    complete = sorted(
        study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]), key=lambda trial: trial.value or math.inf
    )
    best_of: dict[str, Choice] = {}
    for trial in complete:
        best_of.setdefault(choice_of(trial)[0], choice_of(trial))
    finalists = [choice_of(trial) for trial in complete[:FINALISTS]]
    finalists += [choice for choice in best_of.values() if choice not in finalists]
    if not finalists:
        return None
    entries = sorted(
        (Entry(name, config, *(round(us, 2) for us in (timing.median_us, timing.p20_us, timing.p80_us)))
         for (name, config), timing in _again(finalists, measure)),
        key=lambda entry: entry.median_us,
    )  # fmt: skip
    if not entries:
        return None
    others = (entry for entry in entries if entry.implementation != entries[0].implementation)
    return entries[0], next(others, None)


def _again(finalists: list[Choice], measure: Measure) -> list[tuple[Choice, Timing]]:
    """In turns; if one of them fails, each alone, without those that fail."""
    try:
        return list(zip(finalists, measure(finalists, LONG), strict=True))
    except WorkerError:
        timed = []
        for choice in finalists:
            with suppress(WorkerError):
                timed.append((choice, measure([choice], LONG)[0]))
        return timed


def plots(study: optuna.Study, folder: Path) -> list[Path]:
    """Optuna's history and parameter importance as PNG files.

    Raises:
        TuneError: a file that cannot be written.
    """
    from matplotlib import pyplot
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import matplotlib as draw

    drawings = {"history": lambda: draw.plot_optimization_history(study, target_name="µs")}
    if len({trial.value for trial in study.get_trials(states=[TrialState.COMPLETE])}) > 2:
        evaluator = PedAnovaImportanceEvaluator()
        drawings["importance"] = lambda: draw.plot_param_importances(study, evaluator=evaluator)
    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental; and few trials, which the picture shows
        for name, drawing in drawings.items():
            path = folder / f"{study.study_name.replace(' ', '-')}-{name}.png"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                drawing()
                pyplot.savefig(path, bbox_inches="tight", dpi=150)
            except OSError as error:
                raise TuneError(f"{path}: expected a file to write, found: {error.strerror}") from error
            pyplot.close("all")
            made.append(path)
    return made


def _parameters(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"implementation": name} | {f"{name}.{knob}": value for knob, value in config.items()}


def key(name: str, config: Mapping[str, Any]) -> tuple:
    return name, *sorted(config.items())
