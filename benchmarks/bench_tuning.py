"""The tuner held against exhaustive sweeps.

    python -m dsv3c.benchmarks.bench_tuning compile OUT   # which configurations fit; warms Triton's cache
    python -m dsv3c.benchmarks.bench_tuning sweep OUT     # all of those timed, on a GPU
    python -m dsv3c.benchmarks.bench_tuning held-back OUT # sizes that no row was measured at, on a GPU
    python -m dsv3c.benchmarks.bench_tuning replay        # studies on the recorded sweeps, no GPU

A sweep's every configuration is checked first: the first of an implementation against float64, the others bit for bit
against it. Recorded sweeps lie in benchmarks/results/tuning/; a replayed study looks its times up there, so that what
30 trials find can be held against the best of all, for many seeds.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from tabulate import tabulate

from dsv3c.benchmarks import command_line
from dsv3c.benchmarks.record import append, environment
from dsv3c.benchmarks.timing import Timing, interleaved, replayed
from dsv3c.kernels.implementations import FILES, Problem, choose, implementations
from dsv3c.tuning import study as studies
from dsv3c.tuning import targets, tuner
from dsv3c.tuning.prefilter import Of, Verdict, everything, prefilter
from dsv3c.tuning.study import Choice, Space

RESULTS = Path(__file__).parent / "results" / "tuning"
ROUNDS = 7
SWEPT = (
    Problem("gemm", 4096, 4096, 7168),
    Problem("grouped_gemm", 8 * 4096, 4096, 7168, 8),
    Problem("gemm", 128, 4096, 7168),
    Problem("gemm_wgrad", 4096, 4096, 7168),
)
HELD_BACK = (
    *(Problem("gemm", M, N, K) for N, K in ((4096, 7168), (7168, 2048)) for M in (48, 100, 3712, 4000)),
    Problem("grouped_gemm", 8 * 3900, 4096, 7168, 8),
    Problem("grouped_gemm", 256 * 100, 7168, 2048, 256),
    Problem("gemm_wgrad", 3712, 4096, 7168),
    Problem("grouped_gemm_wgrad", 8 * 3900, 7168, 2048, 8),
    Problem("grouped_gemm_wgrad", 256 * 100, 7168, 2048, 256),
)


@dataclass(frozen=True)
class Sweep:
    """Every configuration of a problem's kernel, timed."""

    problem: Problem
    times: dict[tuple, Timing]  # by `studies.key`
    configs: dict[str, list[dict]]  # by implementation

    @property
    def best_us(self) -> float:
        return min(timing.median_us for timing in self.times.values())

    def measure(self, choices: Sequence[Choice], rounds: int) -> list[Timing]:
        """A measurement that looks up."""
        return [self.times[studies.key(*choice)] for choice in choices]

    def space(self) -> Space:
        found = implementations(self.problem.operator)
        return Space({name: found[name].space for name in self.configs}, self.configs)

    def regret(self, seed: int, first: Sequence[Choice], trials: int = 30) -> float:
        """How much slower than the best of all the study's best is."""
        study = studies.open_study(self.problem, "h200", self.space(), None, seed)
        studies.search(study, self.space(), first, self.measure, trials)
        return studies.best_us(study) / self.best_us - 1


def recorded() -> list[Sweep]:
    return [read(path) for path in sorted(RESULTS.glob("sweep-*.json"))]


def read(path: Path) -> Sweep:
    document = json.loads(path.read_text())
    times: dict[tuple, Timing] = {}
    configs: dict[str, list[dict]] = {}
    for name, values, *us in document["rows"]:
        config = dict(zip(document["knobs"] if values else [], values, strict=True))
        configs.setdefault(name, []).append(config)
        times[studies.key(name, config)] = Timing(us[0], us[1], us[2], ROUNDS, None)
    return Sweep(Problem(**document["problem"]), times, configs)


def write(path: Path, problem: Problem, rows: list[tuple[str, dict, Timing]]) -> None:
    """A configuration a line."""
    import torch
    import triton

    knobs = list(next(config for _, config, _ in rows if config))
    head = {"problem": problem._asdict(), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
            "triton": triton.__version__, "knobs": knobs}  # fmt: skip
    lines = [
        json.dumps([name, list(config.values()), *(round(us, 1) for us in (t.median_us, t.p20_us, t.p80_us))])
        for name, config, t in sorted(rows, key=lambda row: row[2].median_us)
    ]
    path.write_text(json.dumps(head)[:-1] + ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")


def compile_all(out: Path, sample: int | None) -> dict[Of, list[Verdict]]:
    """Verdicts on everything, or on a sample; kept in OUT/fits.json, since `sweep` and `held-back` need them too."""
    kept = out / "fits.json"
    if not kept.exists():
        start = time.monotonic()
        found = prefilter(everything(FILES, sample), targets.load("h200"))
        kept.write_text(json.dumps([[*of, list(map(asdict, verdicts))] for of, verdicts in found.items()]))
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    return {
        (operator, name): [Verdict(**verdict) for verdict in verdicts]
        for operator, name, verdicts in json.loads(kept.read_text())
    }


def sweep(out: Path, sample: int | None) -> None:
    from dsv3c.tuning.measure import verified

    verdicts = compile_all(out, sample)
    for problem in SWEPT:
        start = time.monotonic()
        calls: dict[str, Callable[[], None]] = {}
        choices: list[Choice] = []
        for verdict in verdicts[problem.operator, "triton"]:
            if verdict.reason is None:
                try:
                    calls[str(len(calls))] = replayed(verified(problem, ("triton", verdict.config)))
                    choices.append(("triton", verdict.config))
                except Exception as error:  # wrong, or does not run: no time
                    print("WRONG", problem, verdict.config, str(error).partition("\n")[0], flush=True)
        timings = interleaved(calls, rounds=ROUNDS, seconds=5)
        rows = [(*choice, timing) for choice, timing in zip(choices, timings.values(), strict=True)]
        write(out / f"sweep-{problem.operator}-{problem.rows}x{problem.N}x{problem.K}-nvidia-h200.json", problem, rows)
        best = min(rows, key=lambda row: row[2].median_us)
        print(f"{problem}: {len(rows)} right, best {best}, {time.monotonic() - start:.0f} s", flush=True)


def held_back(out: Path, sample: int | None, record: bool = False) -> None:
    """What the table chooses, beside what a study of that very size finds, in one run."""
    from dsv3c.tuning.measure import measure

    target, verdicts, rows = targets.load("h200"), compile_all(out, sample), []
    for problem in HELD_BACK:
        implementation, config = choose(problem)
        own = tuner.tune(problem, target, verdicts, partial(measure, problem), trials=30).row
        assert own is not None
        best = own.best.implementation, own.best.config
        ours, optimum = (t.median_us for t in measure(problem, [(implementation.name, dict(config)), best], 25))
        rows.append([str(tuple(problem)), implementation.name, ours, best[0], optimum, ours / optimum - 1])
        print(rows[-1], flush=True)
    headers = ["problem", "chosen", "µs", "its own optimum", "µs", "slower by"]
    print(tabulate(rows, headers, floatfmt=("", "", ".1f", "", ".1f", ".1%")))
    if record:
        command = f"python -m dsv3c.benchmarks.bench_tuning held-back{f' --sample {sample}' if sample else ''}"
        keys = ("problem", "chosen", "chosen_us", "optimum", "optimum_us", "slower_by")
        cases = [dict(zip(keys, row, strict=True)) for row in rows]
        append([{"benchmark": "held back", "command": command, "environment": environment("cuda"), "cases": cases}])


def replay(seeds: int = 20) -> dict[str, list[float]]:
    """Regrets of studies that begin with the known configurations, as `dsv3c tune` does, and of studies without."""
    rows, report = [], {}
    for found in recorded():
        known = [
            choice
            for choice in tuner.first_choices(found.problem, found.configs, [], 20)
            if studies.key(*choice) in found.times
        ]
        for how, first in (("known first", known), ("from nothing", [])):
            regrets = [found.regret(seed, first) for seed in range(seeds)]
            within = sum(regret <= 0.03 for regret in regrets)
            rows.append(
                [str(tuple(found.problem)), len(found.times), how, median(regrets), max(regrets), f"{within}/{seeds}"]
            )
            report[f"{tuple(found.problem)} {how}"] = regrets
    print(tabulate(rows, ["problem", "configurations", "30 trials", "median", "worst", "within 3 %"],
                   floatfmt=("", "", "", ".1%", ".1%")))  # fmt: skip
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compile", "sweep", "held-back", "replay"))
    parser.add_argument("out", type=Path, nargs="?", default=Path("out"))
    parser.add_argument("--record", action="store_true", help="append what held-back finds to benchmarks/results")
    limit = "so many configurations of an implementation at most"
    parser.add_argument("--sample", type=command_line.at_least_one, help=limit)
    arguments = parser.parse_args()
    if arguments.what == "replay":
        print(json.dumps(replay()))
        return
    if arguments.what != "compile":
        command_line.need_gpu(parser)
    arguments.out.mkdir(parents=True, exist_ok=True)
    what: dict[str, Callable[[Path, int | None], object]] = {
        "compile": compile_all, "sweep": sweep, "held-back": partial(held_back, record=arguments.record),
    }  # fmt: skip
    what[arguments.what](arguments.out, arguments.sample)


if __name__ == "__main__":
    main()
