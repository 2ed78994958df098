"""`dsv3c tune` without its command line: problems to rows of a table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch

from dsv3c.kernels.implementations import Problem, implementations
from dsv3c.tuning import study as studies
from dsv3c.tuning.buckets import bucket
from dsv3c.tuning.prefilter import Of, Verdict
from dsv3c.tuning.study import Choice, Measure, Space
from dsv3c.tuning.tables import Row, triton_version
from dsv3c.tuning.targets import Target

NEIGHBOURS = 4  # bests of other problems to begin with


@dataclass(frozen=True)
class Tuned:
    """A problem's study, and its row; None if nothing could be measured."""

    study: optuna.Study
    row: Row | None


def space(problem: Problem, verdicts: Mapping[Of, Sequence[Verdict]]) -> Space:
    """Of the implementations that take the problem, what the prefilter left."""
    found = {
        name: [verdict.config for verdict in verdicts[problem.operator, name] if verdict.reason is None]
        for name, implementation in implementations(problem.operator).items()
        if implementation.takes(problem)
    }
    found = {name: configs for name, configs in found.items() if configs}
    return Space({name: implementations(problem.operator)[name].space for name in found}, found)


def first_choices(problem: Problem, rows: Iterable[Row]) -> list[Choice]:
    """Every library, every implementation's known configurations, and the bests of the nearest problems."""
    found = implementations(problem.operator)
    choices: list[Choice] = [(name, {}) for name, implementation in found.items() if not implementation.space]
    choices += [(name, dict(config)) for name, implementation in found.items() for config in implementation.known]

    def distance(row: Row) -> tuple:
        per_group = row.rows / row.groups, problem.rows / problem.groups
        return (row.N, row.K) != (problem.N, problem.K), max(per_group) / min(per_group)

    near = sorted((row for row in rows if row.operator == problem.operator), key=distance)
    bests = [entry for row in near for entry in (row.best, row.runner_up) if entry is not None and entry.config]
    others: list[Choice] = []
    for entry in bests:
        if (entry.implementation, entry.config) not in (*choices, *others):
            others.append((entry.implementation, entry.config))
    return choices + others[:NEIGHBOURS]


def tune(
    problem: Problem,
    target: Target,
    verdicts: Mapping[Of, Sequence[Verdict]],
    measure: Measure,
    *,
    trials: int,
    storage: Path | None = None,
    rows: Iterable[Row] = (),
    progress: Callable[[optuna.Study, str], None] = lambda study, outcome: None,
) -> Tuned:
    """A study of `trials` trials; `rows` are of problems tuned before. Raises TuneError for a storage that cannot be
    used."""
    candidates = space(problem, verdicts)
    study = studies.open_study(problem, target.name, candidates, storage)
    studies.search(
        study, candidates, first_choices(problem, rows), measure, trials, lambda outcome: progress(study, outcome)
    )
    best = studies.finish(study, measure)
    if best is None:
        return Tuned(study, None)
    row = Row(
        problem.operator, problem.N, problem.K, problem.groups, bucket(problem, target.sms), problem.rows, *best,
        len(studies.measured(study)), torch.__version__.partition("+")[0], triton_version(),
    )  # fmt: skip
    return Tuned(study, row)
