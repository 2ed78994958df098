"""The tuner held against exhaustive sweeps.

    python -m dsv3c.benchmarks.bench_tuning compile OUT    # which configurations fit; needs no GPU, warms the cache
    python -m dsv3c.benchmarks.bench_tuning sweep OUT      # all of those timed, on a GPU: OUT/sweep-*.json

A sweep's every configuration is checked first: the first of an implementation against float64, the others bit for bit
against it.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from dsv3c.kernels.implementations import Problem, implementations
from dsv3c.tuning import targets
from dsv3c.tuning.prefilter import prefilter

SWEPT = (Problem("gemm", 4096, 4096, 7168), Problem("grouped_gemm", 8 * 4096, 4096, 7168, 8))


def compile_all(out: Path) -> None:
    for problem in SWEPT:
        start, fits = time.monotonic(), {}
        for name, implementation in implementations(problem.operator).items():
            verdicts = prefilter(problem.operator, implementation, targets.load("h200"))
            fits[name] = [verdict.config for verdict in verdicts if verdict.reason is None]
            reasons = [verdict.reason for verdict in verdicts]
            print(problem.operator, name, {reason: reasons.count(reason) for reason in sorted(set(reasons), key=str)},
                  f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
        (out / f"fits-{problem.operator}.json").write_text(json.dumps(fits))


def sweep(out: Path) -> None:
    import torch
    import triton

    from dsv3c.benchmarks.timing import interleaved
    from dsv3c.tuning.measure import verified

    torch.manual_seed(0)
    for problem in SWEPT:
        start, calls, choices, wrong = time.monotonic(), {}, [], 0
        for name, configs in json.loads((out / f"fits-{problem.operator}.json").read_text()).items():
            for config in configs:
                try:
                    calls[str(len(choices))] = verified(problem, (name, config))
                    choices.append((name, config))
                except Exception as error:  # wrong, or does not run: no time
                    print("WRONG", problem.operator, name, config, str(error).partition("\n")[0], flush=True)
                    wrong += 1
        print(f"{problem.operator}: {len(choices)} right, {wrong} wrong, {time.monotonic() - start:.1f} s", flush=True)
        timings = interleaved(calls, rounds=7, seconds=12)
        rows = [
            {"implementation": name, "config": config, **asdict(timing)}
            for (name, config), timing in zip(choices, timings.values(), strict=True)
        ]
        rows.sort(key=lambda row: row["median_us"])
        for row in rows[:12]:
            print(f"{row['median_us']:8.1f} {row['p20_us']:8.1f} {row['p80_us']:8.1f}", row["implementation"],
                  row["config"], flush=True)  # fmt: skip
        document = {"problem": problem._asdict(), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                    "triton": triton.__version__, "rows": rows}  # fmt: skip
        (out / f"sweep-{problem.operator}.json").write_text(json.dumps(document))
        print(f"{problem.operator}: {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    {"compile": compile_all, "sweep": sweep}[sys.argv[1]](folder)
