"""Kernels at V3's sizes: ours in every configuration known to be good somewhere, cuBLASLt, and torch in BF16.

    python -m dsv3c.benchmarks.bench_kernels [--only dense,grouped,...] [--record]

Every contender is checked before any is timed, against float64 on the same operands. Prints a table a section; the last
line is JSON; --record appends it to `results/`, with the times of the libraries, the fastest of ours and, where bytes
are what takes time, a copy of as many. All but that are replayed from CUDA graphs, so that nobody's host counts. TFLOPS
count two operations a product. Casts: bench_producers.py.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from tabulate import tabulate
from torch import Tensor

import dsv3c.operators  # noqa: F401
from dsv3c.benchmarks import command_line
from dsv3c.benchmarks.record import append, environment
from dsv3c.benchmarks.timing import copy_of, interleaved, replayed
from dsv3c.kernels import gemm, small_gemm, wgrad, wgrad_specialized
from dsv3c.kernels.implementations import Config, Problem, implementations
from dsv3c.numerics import TILE, Recipe, ceil_div
from dsv3c.tuning.workloads import close

ops = torch.ops.dsv3c
FLOOR = Recipe().amax_floor
# N, K of V3's linears (references: q_b, kv_b, o, q_a + kv_a, experts); 4096 tokens
DENSE = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
EXPERTS = [(4096, 7168), (7168, 2048)]  # gate and up stacked, down
NOT_OURS = ("cublaslt", "cublaslt, then add", "bf16", "copy")
GROUPS = [(256, 128), (256, 256), (8, 4096), (4, 8192)]  # all experts, 4096 and 8192 tokens; a share at EP32 and EP64


@dataclass(frozen=True)
class Case:
    """Contenders that compute the same, and what one call costs at least."""

    name: str
    contenders: dict[str, Callable[[], object]]
    check: Callable[[str], None]  # raises when the named contender is wrong
    flops: int = 0
    bytes: int = 0
    unchecked: tuple[str, ...] = field(default=("bf16", "copy"))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def plain(M: int, N: int, K: int, tiled: bool) -> Case:
    """x wᵀ with w in blocks, or (weight gradients) in tiles."""
    x_bf16, w_bf16 = normal(M, K), normal(N, K)
    x = ops.quantize_tile(x_bf16, FLOOR, False)
    w = ops.quantize_tile(w_bf16, FLOOR, False) if tiled else ops.quantize_block(w_bf16, FLOOR, False)
    out = torch.empty(M, N, dtype=torch.float32 if tiled else torch.bfloat16)
    contenders = {
        "cublaslt": lambda: gemm.cublaslt(*x, *w, out, w_tiled=tiled),
        "bf16": lambda: x_bf16 @ w_bf16.T,
    }
    if tiled:
        first = torch.tensor([0, K // TILE], dtype=torch.int32)
        contenders |= wgrads(*x, *w, first, out[None])
    elif M <= 128:
        contenders |= few_rows(M, N, K, *x, *w, out)
    else:
        contenders |= ours("gemm", *x, *w, out)

    def check(name: str) -> None:
        out.fill_(torch.nan)
        contenders[name]()
        close(out, *x, *w)

    traffic = M * K + N * K + M * N * out.element_size()
    return Case(f"{M}x{N}x{K}", contenders, check, 2 * M * N * K, traffic)


def ours(operator: str, *operands: Tensor) -> dict[str, Callable[[], None]]:
    """Our kernels in the configurations that are known to be good somewhere."""
    found = implementations(operator)
    return {
        describe(name, config): partial(found[name].launch, *operands, **config)
        for name in ("triton", "warp_specialized")
        for config in found[name].known
    }


def few_rows(M: int, N: int, K: int, *operands: Tensor) -> dict[str, Callable[[], None]]:
    """Splits that give each multiprocessor a program or two, in the configurations for so many rows."""
    calls = {}
    for splits, config in product(small_gemm.SPLITS, small_gemm.KNOWN):
        programs = splits * ceil_div(N, config["columns"]) * ceil_div(M, config["rows"])
        fill = splits == 1 or 0.8 <= programs / gemm.multiprocessors() <= 2
        if fill and config["rows"] in (64, M) and small_gemm.takes(splits, Problem("gemm", M, N, K)):
            calls[describe(f"split {splits}", config)] = partial(small_gemm.launch, *operands, splits=splits, **config)
    return calls


def wgrads(*operands: Tensor, **flags: bool) -> dict[str, Callable[[], None]]:
    """The kernels alone: where groups begin is known."""
    return {
        describe(name, config): partial(kernel.launch, *operands, **config, **flags)
        for name, kernel in (("triton", wgrad), ("warp_specialized", wgrad_specialized))
        for config in kernel.KNOWN
    }


def describe(name: str, config: Config) -> str:
    return " ".join(map(str, (name, *config.values())))


def accumulated(P: int, N: int, K: int) -> Case:
    """dw += dyᵀ x, in float32; the library in two steps."""
    dyt, xt = (ops.quantize_tile_t(normal(P, n), None, FLOOR, False) for n in (N, K))
    dw, product, first = torch.zeros(N, K), torch.empty(N, K), torch.tensor([0, P // TILE], dtype=torch.int32)

    def library() -> None:
        gemm.cublaslt(*dyt, *xt, product, w_tiled=True)
        dw.add_(product)

    contenders = {"cublaslt, then add": library} | wgrads(*dyt, *xt, first, dw[None], accumulate=True)

    def check(name: str) -> None:
        dw.zero_()
        contenders[name]()
        close(dw, *dyt, *xt)

    return Case(f"{N}x{K}x{P} accumulated", contenders, check, 2 * P * N * K, P * (N + K) + 8 * N * K)


def grouped(E: int, rows: int, N: int, K: int, ragged: bool) -> Case:
    R = E * rows
    if ragged:  # as routing does without balance: Poisson-like
        sizes = torch.bincount(torch.randint(E, (R,)), minlength=E)
    else:
        sizes = torch.full((E,), rows)
    offs = sizes.cumsum(0).to(dtype=torch.int32)
    x_bf16, w_bf16 = normal(R, K), normal(E, N, K)
    x, w = ops.quantize_tile(x_bf16, FLOOR, False), ops.quantize_block(w_bf16, FLOOR, False)
    out = torch.empty(R, N, dtype=torch.bfloat16)
    contenders = {"bf16": lambda: torch.nn.functional.grouped_mm(x_bf16, w_bf16.mT, offs=offs)}
    contenders |= ours("grouped_gemm", *x, *w, offs, out)

    def check(name: str) -> None:
        out.fill_(torch.nan)
        contenders[name]()
        ends = offs.tolist()
        for e in (0, E // 2, E - 1):
            mine = slice(ends[e - 1] if e else 0, ends[e])
            if mine.start == mine.stop:
                continue
            close(out[mine], x[0][mine], x[1][mine], w[0][e], w[1][e])

    name = f"{E}x{rows}, {N}, {K}" + (" ragged" if ragged else "")
    return Case(name, contenders, check, 2 * R * N * K, R * K + int((sizes > 0).sum()) * N * K + 2 * R * N)


def grouped_wgrad(E: int, rows: int, N: int, K: int) -> Case:
    R = E * rows
    offs = torch.arange(1, E + 1, dtype=torch.int32) * rows
    x_bf16, dy_bf16 = normal(R, K), normal(R, N)
    dyt, xt = (ops.quantize_tile_t(t, offs, FLOOR, False) for t in (dy_bf16, x_bf16))
    out = torch.empty(E, N, K, dtype=torch.bfloat16)
    contenders = {"bf16": lambda: torch.nn.functional.grouped_mm(dy_bf16.T, x_bf16, offs=offs)}
    first = torch.arange(E + 1, dtype=torch.int32) * -(-rows // TILE)
    contenders |= wgrads(*dyt, *xt, first, out)
    traffic = R * (N + K) + 2 * E * N * K
    if rows <= TILE:
        contenders["copy"] = copy_of(traffic)

    def check(name: str) -> None:
        out.fill_(torch.nan)
        contenders[name]()
        for e in (0, E // 2, E - 1):
            mine, tiles = slice(e * rows, (e + 1) * rows), slice(e * rows // TILE, (e + 1) * rows // TILE)
            close(out[e], dyt[0][:, mine], dyt[1][:, tiles], xt[0][:, mine], xt[1][:, tiles])

    return Case(f"{E}x{rows}, {N}, {K}", contenders, check, 2 * R * N * K, traffic)


def sections() -> dict[str, Callable[[], Iterator[Case]]]:
    return {
        "grouped": lambda: (grouped(*g, *e, ragged) for g in GROUPS for e in EXPERTS for ragged in (False, True)),
        "dense": lambda: (plain(4096, N, K, False) for N, K in DENSE),
        "grouped-wgrad": lambda: (grouped_wgrad(*g, *e) for g in [(256, 128), (8, 4096), (4, 8192)] for e in EXPERTS),
        "wgrad": lambda: (
            case
            for N, K in [(7168, 4096), (24576, 1536), (7168, 16384)]
            for case in (plain(N, K, 4096, True), accumulated(4096, N, K))
        ),
        "small": lambda: (plain(M, N, K, False) for M in (16, 64, 128) for N, K in DENSE),
        "decode": lambda: (grouped(256, rows, *e, True) for rows in (2, 16) for e in EXPERTS),
    }


def main() -> int:
    parser = command_line.parser(__doc__, sections())
    arguments = parser.parse_args()
    command_line.need_gpu(parser)
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    begin = time.monotonic()
    cases, wrong = [], 0
    for section in arguments.only:
        rows = []
        for case in sections()[section]():
            contenders = dict(case.contenders)
            for name in contenders.keys() - set(case.unchecked):
                try:
                    case.check(name)
                except Exception as error:  # a contender that is wrong, or does not run, gets no time
                    print(f"WRONG {section} {case.name} {name}: {error}", flush=True)
                    wrong += 1
                    del contenders[name]
            contenders = {name: run if name == "copy" else replayed(run) for name, run in contenders.items()}
            times = interleaved(contenders, rounds=15)
            for name, t in times.items():
                tflops, tbps = case.flops / t.median_us / 1e6, case.bytes / t.median_us / 1e6
                rows.append([case.name, name, t.median_us, t.p20_us, t.p80_us, tflops, tbps])
            own = min(times.keys() - set(NOT_OURS), key=lambda name: times[name].median_us, default=None)
            kept = {name: times[name] for name in NOT_OURS if name in times} | ({"own": times[own]} if own else {})
            cases.append(
                {"section": section, "case": case.name, "flops": case.flops, "bytes": case.bytes, "own": own}
                | {f"{name}_us": [t.median_us, t.p20_us, t.p80_us] for name, t in kept.items()}
            )
            print(f"[{time.monotonic() - begin:5.0f} s] {section} {case.name}", flush=True)
            del case, contenders
            torch.cuda.empty_cache()
        headers = ["case", "contender", "µs", "p20", "p80", "TFLOPS", "TB/s"]
        print(tabulate(rows, headers, floatfmt=(*[".0f"] * 6, ".2f")), flush=True)
    command = f"python -m dsv3c.benchmarks.bench_kernels --only {','.join(arguments.only)}"
    result = {"benchmark": "kernels", "command": command, "environment": environment("cuda"), "wrong": wrong}
    if arguments.record and not wrong:
        append([result | {"cases": cases}])
    print(json.dumps(result | {"num_cases": len(cases)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
