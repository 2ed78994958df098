"""``dsv3c tune``: which kernel, in which configuration, is fastest for a problem on this GPU."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option, echo

from dsv3c.config import ModelConfig
from dsv3c.errors import TuneError
from dsv3c.files import make_folder
from dsv3c.kernels.implementations import FILES, Config, Problem, implementations

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

LIMIT_S = 60.0  # a trial's; the first of a problem makes its operands and their float64 product


def tune(
    kernel: Annotated[
        list[str] | None, Option(metavar="NAME", help=f"This operator of {', '.join(FILES)}; may be repeated.")
    ] = None,
    target: Annotated[str, Option(help="A target, or auto: this machine's GPU, without one h200.")] = "auto",
    trials: Annotated[int, Option(min=1, help="Configurations to measure for a problem.")] = 30,
    model: Annotated[str, Option(metavar="CHECKPOINT|PRESET", help="Tune the linears of this model.")] = "v3-671b",
    rows: Annotated[
        list[int] | None, Option(min=1, help="Tokens in a call; may be repeated.", show_default="64, 128, 4096")
    ] = None,
    problem: Annotated[
        list[str] | None,
        Option(metavar="OPERATOR:[GROUPSx]MxNxK", help="Tune this instead; M rows in a group. May be repeated."),
    ] = None,
    storage: Annotated[
        Path | None,
        Option(help="SQLite file of the studies, for optuna-dashboard too.", show_default="beside --output"),
    ] = None,
    output: Annotated[
        Path | None, Option(help="The table to write or add to.", show_default="DSV3C_TABLES/TARGET.json")
    ] = None,
    plots: Annotated[
        Path | None, Option(metavar="DIR", help="Draw each study's history and parameter importance there, as PNG.")
    ] = None,
    sample: Annotated[
        int | None,
        Option(min=1, help="Compile and try so many configurations of an implementation at most.", show_default="all"),
    ] = None,
    prefilter_only: Annotated[bool, Option("--prefilter-only", help="Compile for the target and stop.")] = False,
    as_json: Annotated[bool, Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Tune kernels for this GPU, by measurement.

    First all configurations are compiled for the target, which needs no GPU, and dropped if they spill or take too much
    shared memory or registers. Then each problem gets an Optuna study, whose trials are checked against float64 before
    they are timed, in a process of their own. The result is a table that later launches read: your own is
    DSV3C_TABLES/TARGET.json (by default in ~/.cache/dsv3c/tables), and preferred to the one that comes with dsv3c.
    Interrupted or not, the same command goes on where it was.

    The exit code is 1 if a configuration that was good before is dropped.
    """
    from dsv3c.source import model_config

    operators = [_operator("--kernel", name) for name in kernel or FILES]
    if problem:
        problems = [_problem(text) for text in problem]
        operators = sorted({p.operator for p in problems})
    else:
        problems = [p for p in model_problems(model_config(model), rows or [64, 128, 4096]) if p.operator in operators]
    report = _Tuning(target, output, storage, prefilter_only).run(operators, problems, sample, trials, plots)
    echo(json.dumps(report) if as_json else _text(report))
    if any(found["known_dropped"] for found in report["configurations"]):
        raise Exit(1)


def model_problems(config: ModelConfig, rows: list[int]) -> list[Problem]:
    """What the linears of a model's layers compute in a forward and a backward of so many tokens; the routed experts'
    on one GPU, and a share of 8 of them with 4096 rows each."""
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.moe_intermediate_size
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    latents = config.kv_lora_rank + config.qk_rope_head_dim + (config.q_lora_rank or queries)
    linears = [
        (latents, hidden),
        *([(queries, config.q_lora_rank)] if config.q_lora_rank else []),
        (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        (hidden, heads * config.v_head_dim),
        (2 * width, hidden),
        (hidden, width),
    ]
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    found = [Problem("gemm", M, N, K) for M in rows for N, K in linears]
    found += [Problem("gemm", M, K, N) for M in rows if M > 128 for N, K in linears]  # the gradients of inputs
    found += [Problem("gemm_wgrad", M, N, K) for M in rows if M > 128 for N, K in linears]
    for operator in ("grouped_gemm", "grouped_gemm_wgrad"):
        for N, K in linears[-2:]:
            found += [Problem(operator, M * chosen, N, K, experts) for M in rows if M > 128]
            found.append(Problem(operator, 8 * 4096, N, K, 8))
    return list(dict.fromkeys(found))


class _Tuning:
    """One run of the command: target, files, and whether this machine's GPU is the target."""

    def __init__(self, target: str, output: Path | None, storage: Path | None, prefilter_only: bool):
        import torch

        from dsv3c.tuning import tables, targets

        here = torch.cuda.is_available()
        self.target = targets.load("h200") if target == "auto" and not here else targets.resolve(target)
        if self.target.arch == "cpu":
            raise TuneError(f"--target: expected a GPU, found {self.target.name}; try h200")
        self.why_not = (
            "--prefilter-only" if prefilter_only
            else "there is no GPU here" if not here
            else f"this machine's GPU is no {self.target.name}" if targets.resolve("auto") != self.target
            else None
        )  # fmt: skip
        self.output = output or tables.user_path(self.target.name)
        self.storage = storage or self.output.with_name("studies.db")
        self.rows = tables.read(self.output, self.target.name)

    def run(
        self, operators: list[str], problems: list[Problem], sample: int | None, trials: int, plots: Path | None
    ) -> dict[str, Any]:
        storage = None if self.why_not else self._prepare(plots)  # before minutes of compiling
        with _progress() as progress:
            verdicts = self._prefilter(operators, sample, progress)
            tuned = storage and self._measure(problems, verdicts, trials, storage, plots, progress)
        return {
            "target": self.target.name,
            "configurations": [
                {"operator": operator, "implementation": name} | _counts(found, implementations(operator)[name].known)
                for (operator, name), found in verdicts.items()
            ],
            "measured": self.why_not is None,
            "why_not": self.why_not,
            "problems": [p._asdict() for p in problems],
            "rows": tuned or [],
            "table": None if self.why_not else str(self.output),
            "storage": None if self.why_not else str(self.storage),
        }

    def _prepare(self, plots: Path | None) -> "BaseStorage":
        """The studies' file; what cannot be written or drawn is found out."""
        from dsv3c.tuning import study, tables

        tables.write(self.output, self.target.name, self.rows)
        if plots is not None:
            make_folder("--plots", plots)
            if find_spec("matplotlib") is None:
                raise TuneError("--plots: expected matplotlib, found none; try pip install dsv3c[plot]")
        return study.open_storage(self.storage)

    def _prefilter(self, operators: list[str], sample: int | None, progress: Any) -> dict[tuple[str, str], list]:
        from dsv3c.tuning.prefilter import everything, prefilter

        task = progress.add_task(f"compile for {self.target.name}", total=None)

        def advance(done: int, kernels: int) -> None:
            progress.update(task, completed=done, total=kernels)

        return prefilter(everything(operators, sample), self.target, advance)

    def _measure(
        self, problems, verdicts, trials: int, storage: "BaseStorage", plots: Path | None, progress: Any
    ) -> list[dict[str, Any]]:
        from dsv3c.tuning import study as studies
        from dsv3c.tuning import tables, tuner
        from dsv3c.tuning.measure import measure
        from dsv3c.tuning.worker import Worker

        tuned = []
        with Worker(measure, limit_s=LIMIT_S) as worker:
            for problem in problems:
                task = progress.add_task(_name(problem), total=trials)
                found = tuner.tune(
                    problem, self.target, verdicts, partial(worker, problem), trials=trials, storage=storage,
                    rows=self.rows, progress=partial(_show, progress, task, problem),
                )  # fmt: skip
                if found.row is None:
                    progress.console.print(f"{_name(problem)}: nothing could be measured; built-in rules decide")
                else:
                    self.rows = tables.merge(self.rows, [found.row])
                    tables.write(self.output, self.target.name, self.rows)
                    tuned.append(asdict(found.row))
                if plots is not None:
                    studies.plots(found.study, plots)
        return tuned


def _show(progress: Any, task: Any, problem: Problem, study: Any, outcome: str) -> None:
    """The best so far, or what became of the first trials."""
    from dsv3c.tuning.study import best_us, measured

    best = best_us(study)
    shown = f"best {best:.1f} µs" if math.isfinite(best) else outcome
    progress.update(task, completed=len(measured(study)), description=f"{_name(problem)} {shown}")


def _operator(where: str, name: str) -> str:
    if name not in FILES:
        raise TuneError(f"{where}: expected one of {', '.join(FILES)}, found {name!r}; try gemm")
    return name


def _problem(text: str) -> Problem:
    operator, _, sizes = text.partition(":")
    _operator("--problem", operator)
    try:
        *groups, M, N, K = (int(size) for size in sizes.split("x"))
        (E,) = groups or (1,)
    except ValueError:
        E = M = N = K = 0
    if min(E, M, N, K) < 1 or (E > 1) > operator.startswith("grouped"):
        raise TuneError(
            f"--problem: expected OPERATOR:[GROUPSx]MxNxK, found {text!r}; try gemm:4096x4096x7168 "
            "or grouped_gemm:8x4096x4096x7168"
        )
    return Problem(operator, E * M, N, K, E)


def _name(problem: Problem) -> str:
    groups = f"{problem.groups}x" if problem.groups > 1 else ""
    return f"{problem.operator}:{groups}{problem.rows // problem.groups}x{problem.N}x{problem.K}"


def _counts(verdicts: list, known: tuple[Config, ...]) -> dict[str, Any]:
    reasons = [verdict.reason for verdict in verdicts if verdict.reason]
    return {
        "configurations": len(verdicts),
        "fit": len(verdicts) - len(reasons),
        "dropped": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "known_dropped": [verdict.config for verdict in verdicts if verdict.reason and verdict.config in known],
    }


def _text(report: dict[str, Any]) -> str:
    from tabulate import tabulate

    lines = [f"compiled for {report['target']}:"]
    for found in report["configurations"]:
        why = ", ".join(f"{reason} {count}" for reason, count in found["dropped"].items())
        fit = f"{found['fit']} of {found['configurations']} configurations fit"
        lines.append(f"  {found['operator']} {found['implementation']}: {fit}{why and f'; dropped: {why}'}")
        lines += [f"    among them, good before: {_knobs(config)}" for config in found["known_dropped"]]
    if not report["measured"]:
        return "\n".join([*lines, f"nothing was measured and no table written: {report['why_not']}"])
    table = [
        [_name(Problem(row["operator"], row["rows"], row["N"], row["K"], row["groups"])), row["best"]["implementation"],
         _knobs(row["best"]["config"]), row["best"]["median_us"],
         row["best"]["p20_us"], row["best"]["p80_us"],
         row["runner_up"] and f"{row['runner_up']['implementation']} {row['runner_up']['median_us']:.1f}"]
        for row in report["rows"]
    ]  # fmt: skip
    headers = ["problem", "implementation", "configuration", "µs", "p20", "p80", "runner-up"]
    lines += ["", tabulate(table, headers, floatfmt=".1f"), "", f"table: {report['table']}"]
    return "\n".join([*lines, f"studies: {report['storage']}"])


def _knobs(config: dict[str, Any]) -> str:
    return " ".join(f"{knob}={value}" for knob, value in config.items())


@contextmanager
def _progress() -> Iterator[Any]:
    """Bars on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress
