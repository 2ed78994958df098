"""Routing at V3's sizes: the gate, the sort by expert, and the moves of rows, against a copy of the same bytes.

    python -m dsv3c.benchmarks.bench_routing [--tokens 4096] [--record]

Every contender is checked before any is timed. Calls are replayed from CUDA graphs, so that a launch costs what it
costs the GPU; an empty kernel among the contenders says how much of that is the replay. The last line is JSON; --record
appends it to `results/`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from tabulate import tabulate
from torch import Tensor

import dsv3c.operators  # noqa: F401
from dsv3c.benchmarks import command_line
from dsv3c.benchmarks.bench_kernels import Case, normal
from dsv3c.benchmarks.bench_producers import same_bits
from dsv3c.benchmarks.record import append, environment
from dsv3c.benchmarks.timing import copy_of, interleaved, replayed
from dsv3c.config import preset
from dsv3c.kernels.reference import permute as moves
from dsv3c.kernels.reference import router
from dsv3c.numerics import TILE, Recipe, rounded_sum_bound, routing_weight_bound

ops = torch.ops.dsv3c
V3 = preset("v3-671b")
E, K, H = V3.n_routed_experts, V3.num_experts_per_tok, V3.hidden_size
GATE = (V3.n_group, V3.topk_group, K, V3.norm_topk_prob, V3.routed_scaling_factor)


def cases(T: int) -> Iterator[Case]:
    R = T * K
    logits, bias = torch.randn(T, E), 0.1 * torch.randn(E)
    weights, idx = ops.gate(logits, bias, *GATE)
    _, offs, permutation, inverse = ops.sort_by_expert(idx, E)

    def route() -> tuple[Tensor, ...]:
        weights, idx = ops.gate(logits, bias, *GATE)
        return weights, idx, *ops.sort_by_expert(idx, E)

    def check_route(_: str) -> None:
        expected, expected_idx = router.gate_ref(logits, bias, *GATE)
        found, found_idx, *sorted_ = route()
        same_bits((found_idx, *sorted_), (expected_idx, *router.sort_by_expert_ref(expected_idx, E)))
        if not bool(((found - expected).abs() <= routing_weight_bound(0, 0.0, K, torch.float32, expected)).all()):
            raise AssertionError("weights beyond the bound")

    empty = torch.zeros(1)
    parts = {
        "gate": lambda: ops.gate(logits, bias, *GATE),
        "sort_by_expert": lambda: ops.sort_by_expert(idx, E),
        "empty kernel": lambda: empty.zero_(),
        "torch": lambda: router.sort_by_expert_ref(router.gate_ref(logits, bias, *GATE)[1], E),
    }
    yield Case("gate and sort", {"both": route, **parts}, check_route, bytes=4 * (T * E + 4 * R))
    yield Case(
        "gate_backward",
        {"ours": lambda: ops.gate_backward(weights, logits, idx, False, *GATE[3:])},
        lambda _: None,  # tests/kernels/test_router.py has the bound
        bytes=4 * (T * E + 3 * R),
    )

    x, y = normal(T, H), normal(R, H)
    q = ops.quantize_tile(x, Recipe().amax_floor, False)
    scales = q[1].shape[1]
    yield _beside_a_copy(
        "permute",
        lambda: ops.permute(*q, permutation, inverse),
        lambda: moves.permute_ref(*q, permutation, inverse),
        (T + R) * (H + 4 * scales),
    )
    padded = R + TILE * E
    yield _beside_a_copy(
        "permute_requantize_t",
        lambda: ops.permute_requantize_t(*q, permutation, inverse, offs, Recipe().amax_floor, False),
        lambda: moves.permute_requantize_t_ref(*q, permutation, inverse, offs, Recipe().amax_floor, False),
        T * (H + 4 * scales) + padded * H * (TILE + 4) // TILE,
    )
    yield _beside_a_copy(
        "unpermute_backward",
        lambda: ops.unpermute_backward(x, y, inverse, weights)[:1],
        lambda: moves.unpermute_backward_ref(x, y, inverse, weights)[:1],
        2 * (T + 2 * R) * H,
    )
    for name, w, terms in [
        ("unpermute", weights, ()),
        ("permute's gradient", None, ()),
        ("and two terms", weights, (x, x)),
    ]:
        yield _summed(name, y, inverse, w, terms)


def _beside_a_copy(name: str, run: Callable, expected: Callable, traffic: int) -> Case:
    contenders = {"ours": run, "copy": copy_of(traffic)}
    return Case(name, contenders, lambda _: same_bits(run(), expected()), bytes=traffic, unchecked=("copy",))


def _summed(name: str, y: Tensor, inverse: Tensor, weights: Tensor | None, terms: tuple[Tensor, ...]) -> Case:
    optional = (*terms, None, None)[:2]

    def check(_: str) -> None:
        w = torch.ones_like(inverse) if weights is None else weights
        wide = [(w[:, k, None].double() * y[inverse[:, k].long()].double()) for k in range(K)]
        wide += [term.double() for term in terms]
        expected, magnitude = sum(wide), sum(part.abs() for part in wide)
        error = (ops.unpermute(y, inverse, weights, *optional).double() - expected).abs()
        if not bool((error <= rounded_sum_bound(expected, magnitude, len(wide), y.dtype)).all()):
            raise AssertionError("sums beyond the bound")

    traffic = 2 * (len(y) + (1 + len(terms)) * len(inverse)) * y.shape[1]
    case = _beside_a_copy(name, lambda: ops.unpermute(y, inverse, weights, *optional), lambda: (), traffic)
    return Case(name, case.contenders, check, bytes=traffic, unchecked=("copy",))


def main() -> int:
    parser = command_line.parser(__doc__)
    parser.add_argument("--tokens", type=command_line.at_least_one, default=4096)
    arguments = parser.parse_args()
    command_line.need_gpu(parser)
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    rows, results, wrong = [], [], 0
    for case in cases(arguments.tokens):
        try:
            case.check("ours")
        except AssertionError as error:
            print(f"WRONG {case.name}: {error}", flush=True)
            wrong += 1
            continue
        contenders = {name: run if name == "copy" else replayed(run) for name, run in case.contenders.items()}
        for name, t in interleaved(contenders, rounds=30, seconds=3).items():
            rows.append([case.name, name, t.median_us, t.p20_us, t.p80_us, case.bytes / t.median_us / 1e3])
            results.append({"case": case.name, "contender": name, "bytes": case.bytes, **asdict(t)})
        del case, contenders
        torch.cuda.empty_cache()
    print(tabulate(rows, ["case", "contender", "µs", "p20", "p80", "GB/s"], floatfmt=".1f"))
    command = f"python -m dsv3c.benchmarks.bench_routing --tokens {arguments.tokens}"
    result = {"benchmark": "routing", "command": command, "environment": environment("cuda"), "wrong": wrong}
    if arguments.record and not wrong:
        append([result | {"cases": results}])
    print(json.dumps(result | {"num_cases": len(results)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
