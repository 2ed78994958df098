"""`dsv3c tune` without its command line: problems to rows of a table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import optuna
import torch
from optuna.storages import BaseStorage

from dsv3c.kernels.implementations import Config, Problem, implementations
from dsv3c.tuning import study as studies
from dsv3c.tuning.buckets import bucket
from dsv3c.tuning.prefilter import Of, Verdict
from dsv3c.tuning.study import Choice, Measure, Space
from dsv3c.tuning.tables import Row, triton_version
from dsv3c.tuning.targets import Target

NEIGHBOURS = 6  # choices of other problems' rows to begin with


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


def first_choices(problem: Problem, names: Iterable[str], rows: Iterable[Row], most: int) -> list[Choice]:
    """Of the implementations `names`: every library, the bests of the nearest problems, and of each in turn what is
    known to be good."""
    found = {name: implementations(problem.operator)[name] for name in names}

    def distance(row: Row) -> tuple:
        per_group = row.rows / row.groups, problem.rows / problem.groups
        return (row.N, row.K) != (problem.N, problem.K), max(per_group) / min(per_group)

    near = sorted((row for row in rows if row.operator == problem.operator), key=distance)
    bests = [entry for row in near for entry in (row.best, row.runner_up) if entry and entry.implementation in found]
    known = zip_longest(
        *([(name, config) for config in implementation.known] for name, implementation in found.items())
    )
    choices: list[tuple[str, Config]] = [(name, {}) for name in found if not found[name].space]
    choices += [(entry.implementation, entry.config) for entry in bests[:NEIGHBOURS]]
    choices += [choice for in_turn in known for choice in in_turn if choice is not None]
    return list({studies.key(*choice): (choice[0], dict(choice[1])) for choice in choices}.values())[:most]


def tune(
    problem: Problem,
    target: Target,
    verdicts: Mapping[Of, Sequence[Verdict]],
    measure: Measure,
    *,
    trials: int,
    storage: BaseStorage | None = None,
    rows: Iterable[Row] = (),
    progress: Callable[[optuna.Study, str], None] = lambda study, outcome: None,
) -> Tuned:
    """A study of `trials` trials; `rows` are of problems tuned before."""
    candidates = space(problem, verdicts)
    study = studies.open_study(problem, target.name, candidates, storage)
    first = first_choices(problem, candidates.knobs, rows, most=2 * trials // 3)
    studies.search(study, candidates, first, measure, trials, lambda outcome: progress(study, outcome))
    best = studies.finish(study, measure)
    if best is None:
        return Tuned(study, None)
    row = Row(
        problem.operator, problem.N, problem.K, problem.groups, bucket(problem, target.sms), problem.rows, *best,
        len(studies.measured(study)), torch.__version__.partition("+")[0], triton_version(),
    )  # fmt: skip
    return Tuned(study, row)
