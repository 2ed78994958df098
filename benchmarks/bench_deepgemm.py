"""Our FP8 products against DeepGEMM's, on the same operands and in the same run, at V3's sizes.

    python -m dsv3c.benchmarks.bench_deepgemm [--record]

Needs `deep_gemm`, which is no dependency of ours: build it from its repository. *best* is the fastest of all
implementations here, cuBLASLt included, *own* the fastest of our kernels. Every contender is checked before any is
timed, in replays of a CUDA graph, so that nobody's host counts. Skewed groups hold the same rows in Zipf's proportions
(s = 1), 5 % of them none; DeepGEMM wants groups of whole tiles, so those are compared with ours when balanced, in turns
with them: the GPU is at its power limit, and its clock differs more from minute to minute than contenders do. The last
line is JSON; --record appends it to `results/`, with the times of DeepGEMM, cuBLASLt and the fastest of ours.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import geometric_mean
from typing import Any

try:
    import deep_gemm
except ModuleNotFoundError:
    deep_gemm = None
import torch
from tabulate import tabulate
from torch import Tensor

from dsv3c.benchmarks import command_line
from dsv3c.benchmarks.bench_kernels import DENSE, EXPERTS, FLOOR, GROUPS, close, few_rows, normal, ops, ours
from dsv3c.benchmarks.record import append, environment
from dsv3c.benchmarks.timing import Timing, interleaved, replayed
from dsv3c.benchmarks.workloads import zipf
from dsv3c.kernels import gemm

THEIRS = ("deepgemm", "cublaslt")


@dataclass(frozen=True)
class Contest:
    """Calls that compute the same into `out`; `check` says whether that is right."""

    section: str
    name: str
    calls: dict[str, Callable[[], object]]
    check: Callable[[], None]
    out: Tensor
    flops: int


def dense(M: int) -> Iterator[tuple[Contest, ...]]:
    for N, K in DENSE:
        x, w = ops.quantize_tile(normal(M, K), FLOOR, False), ops.quantize_block(normal(N, K), FLOOR, False)
        out = torch.empty(M, N, dtype=torch.bfloat16)
        calls = {"deepgemm": partial(deep_gemm.fp8_gemm_nt, x, w, out), "cublaslt": partial(gemm.cublaslt, *x, *w, out)}
        if M <= 128:
            calls |= few_rows(M, N, K, *x, *w, out)
        else:
            calls |= ours("gemm", *x, *w, out)
        yield (Contest(f"dense M={M}", f"{M}x{N}x{K}", calls, partial(close, out, *x, *w), out, 2 * M * N * K),)


def grouped() -> Iterator[tuple[Contest, ...]]:
    for E, rows in GROUPS:
        for N, K in EXPERTS:
            R = E * rows
            x, w = ops.quantize_tile(normal(R, K), FLOOR, False), ops.quantize_block(normal(E, N, K), FLOOR, False)
            out = torch.empty(R, N, dtype=torch.bfloat16)
            experts = torch.arange(E, dtype=torch.int32).repeat_interleave(rows)
            contests = []
            for section, sizes in {"grouped": torch.full((E,), rows), "zipf": zipf(E, R)}.items():
                offs = sizes.cumsum(0).int()
                calls = ours("grouped_gemm", *x, *w, offs, out)
                if section == "grouped":
                    deepgemm = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
                    calls["deepgemm"] = partial(deepgemm, x, w, out, experts)
                check = partial(close_in_groups, out, x, w, offs.tolist())
                contests.append(Contest(section, f"{E}x{rows} {N},{K}", calls, check, out, 2 * R * N * K))
            yield tuple(contests)


def close_in_groups(out: Tensor, x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], ends: list[int]) -> None:
    for e in (0, len(ends) // 2, len(ends) - 1):
        rows = slice(ends[e - 1] if e else 0, ends[e])
        if rows.start < rows.stop:
            close(out[rows], x[0][rows], x[1][rows], w[0][e], w[1][e])


def measure(contests: Iterable[Contest]) -> list[dict[str, Timing]]:
    """Of each contest the contenders' times; all take turns."""
    calls = {}
    for contest in contests:
        for name, call in contest.calls.items():
            contest.out.fill_(torch.nan)
            call()
            try:
                contest.check()
            except AssertionError as error:
                raise SystemExit(f"{contest.section} {contest.name} {name}: {error}") from None
            calls[contest.section, name] = replayed(call)
    timings = interleaved(calls, rounds=15)
    return [{name: timings[contest.section, name] for name in contest.calls} for contest in contests]


def main() -> int:
    parser = command_line.parser(__doc__)
    arguments = parser.parse_args()
    if deep_gemm is None:
        parser.error("expected the package deep_gemm, found none; build it from github.com/deepseek-ai/DeepGEMM")
    command_line.need_gpu(parser)
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    rows, cases, ratios, balanced = [], [], defaultdict(list), {}
    for contests in chain(dense(4096), dense(64), dense(128), grouped()):
        for contest, timings in zip(contests, measure(contests), strict=True):
            us = {name: t.median_us for name, t in timings.items()}
            own = min((name for name in us if name not in THEIRS), key=us.__getitem__)
            best = min(t for name, t in us.items() if name != "deepgemm")
            if "deepgemm" in us:
                balanced[contest.name] = us[own]
                ratios[f"{contest.section}: best"].append(us["deepgemm"] / best)
                ratios[f"{contest.section}: own"].append(us["deepgemm"] / us[own])
            else:
                ratios["zipf: own balanced / own"].append(balanced[contest.name] / us[own])
            for name, t in timings.items():
                tflops = contest.flops / t.median_us / 1e6
                rows.append([contest.section, contest.name, name, t.median_us, t.p20_us, t.p80_us, tflops])
            kept = {"own" if name == own else name: timings[name] for name in (*THEIRS, own) if name in us}
            case: dict[str, Any] = {"section": contest.section, "case": contest.name, "own": own}
            cases.append(case | {f"{name}_us": [t.median_us, t.p20_us, t.p80_us] for name, t in kept.items()})
            print(contest.section, contest.name, *(f"{n} {us[n]:.1f}" for n in (*THEIRS, own) if n in us), flush=True)
    print(tabulate(rows, ["section", "case", "contender", "µs", "p20", "p80", "TFLOPS"], floatfmt=".1f"))
    means = {name: round(geometric_mean(values), 3) for name, values in ratios.items()}
    result = {"benchmark": "deepgemm", "deep_gemm": deep_gemm.__version__, "geometric_means": means}
    if arguments.record:
        command = "python -m dsv3c.benchmarks.bench_deepgemm"
        append([result | {"command": command, "environment": environment("cuda"), "cases": cases}])
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
