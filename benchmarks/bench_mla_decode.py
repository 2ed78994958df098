"""MLA decode at V3's sizes: ours, absorbed in plain torch, and what eager does (keys and values expanded, then SDPA).

    python -m dsv3c.benchmarks.bench_mla_decode [--record]

Every contender is captured in a CUDA graph, as a decode step is. What a replay leaves must be finite, and ours within
its bound of float64 attention, before any is timed. TFLOPS count 2·(576 + 512) operations a head and key, also for
those who do more; TB/s every latent once. Prints a table; the last line is JSON; --record appends it to `results/`.
"""

import json
from collections.abc import Callable
from dataclasses import asdict

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import dsv3c.operators  # noqa: F401
from dsv3c.benchmarks import command_line
from dsv3c.benchmarks.record import append, environment
from dsv3c.benchmarks.timing import interleaved, replayed
from dsv3c.kernels.reference.mla_decode import LATENT, RANK
from dsv3c.numerics import attention_bounds

NOPE, ROPE, V_DIM = 128, 64, 128
SCALE = (NOPE + ROPE) ** -0.5
EXPANDED_LIMIT = 70e9  # bytes of keys and values that a contender may make
# B, T, H, S: all heads on one GPU, two tokens a step, TP8, few sequences
CASES = [
    (128, 1, 128, 4096), (128, 1, 128, 16384), (128, 1, 128, 32768), (128, 2, 128, 4096), (128, 1, 16, 4096),
    (128, 1, 16, 16384), (16, 1, 128, 8192), (1, 1, 128, 4096), (1, 1, 16, 4096),
]  # fmt: skip


def contenders(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor) -> dict[str, Callable[[], Tensor]]:
    B, T, H, _ = q.shape
    S = table.shape[1] * cache.shape[1]

    def latents() -> Tensor:
        return cache[table.long()].view(B, S, LATENT)

    def absorbed() -> Tensor:
        latent_BSL = latents()
        scores = (q.flatten(1, 2) @ latent_BSL.mT).unflatten(1, (T, H)) * SCALE
        seen_TS = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        p = scores.masked_fill(~seen_TS[:, None], -torch.inf).softmax(-1)
        return (p.flatten(1, 2) @ latent_BSL[..., :RANK]).unflatten(1, (T, H))

    def expanded() -> Tensor:
        compressed, k_rope = latents().split((RANK, ROPE), -1)
        k_nope, v = (compressed @ kv_b).unflatten(-1, (H, NOPE + V_DIM)).split((NOPE, V_DIM), -1)
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, H, -1)), -1)
        return scaled_dot_product_attention(expanded_q, k.transpose(1, 2), v.transpose(1, 2), scale=SCALE)

    found = {"ours": lambda: torch.ops.dsv3c.mla_decode(q, cache, table, lengths, SCALE)[0], "absorbed": absorbed}
    if T == 1 and 2 * B * S * H * (2 * NOPE + ROPE + V_DIM) <= EXPANDED_LIMIT:
        kv_b = torch.randn(RANK, H * (NOPE + V_DIM), dtype=q.dtype) * RANK**-0.5
        expanded_q = torch.randn(B, H, T, NOPE + ROPE, dtype=q.dtype)
        found["expanded"] = expanded
    return found


def check(out: Tensor, q: Tensor, cache: Tensor, table: Tensor) -> None:
    """The first query of the first sequence and the last of the last."""
    T = q.shape[1]
    for b, t in ((0, 0), (len(q) - 1, T - 1)):
        k = cache[table[b].long()].flatten(0, 1).double()
        k = k[: len(k) - T + 1 + t]
        query, v = q[b, t].double(), k[:, :RANK]
        scores, size = query @ k.T * SCALE, (query.square() @ k.T.square()).sqrt() * SCALE
        p = scores.softmax(-1)
        reference, norm = p @ v, (p.square() @ v.square()).sqrt()
        largest = float(torch.maximum(scores.abs(), size).max())
        element, rms, _ = attention_bounds(reference, norm, largest, len(k), LATENT)
        error = (out[b, t].double() - reference).abs()
        found = float((error / norm).square().mean().sqrt())
        if not bool((error <= element).all()) or not found <= rms:
            raise AssertionError(f"beyond the bound: RMS {found:.3g}, bound {rms:.3g}")


def measure(B: int, T: int, H: int, S: int, seconds: float) -> tuple[list[dict], int]:
    pages = S // 64
    cache = torch.randn(B * pages, 64, LATENT, dtype=torch.bfloat16)
    q = torch.randn(B, T, H, LATENT, dtype=torch.bfloat16)
    table, lengths = torch.randperm(len(cache)).view(B, pages).int(), torch.full((B,), S, dtype=torch.int32)
    replays, wrong = {}, 0
    for name, call in contenders(q, cache, table, lengths).items():
        try:
            replay = replayed(call)
            replay().fill_(torch.nan)
            out = replay()
            if name == "ours":
                check(out, q, cache, table)
            elif not bool(out.isfinite().all()):
                raise AssertionError("not finite")
            replays[name] = replay
        except Exception as error:  # a contender that is wrong, or does not fit, gets no time
            print(f"WRONG {(B, T, H, S)} {name}: {error}", flush=True)
            wrong += name == "ours"
    rows = []
    for name, t in interleaved(replays, rounds=25, seconds=seconds).items():
        tflops, tbps = 2 * B * T * H * S * (LATENT + RANK) / t.median_us / 1e6, B * S * LATENT * 2 / t.median_us / 1e6
        sizes = {"B": B, "T": T, "H": H, "S": S, "contender": name}
        rows.append(sizes | asdict(t) | {"tflops": tflops, "tb_per_s": tbps})
    return rows, wrong


def main() -> int:
    parser = command_line.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each case")
    arguments = parser.parse_args()
    command_line.need_gpu(parser)
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    rows, wrong = [], 0
    for case in CASES:
        found, failed = measure(*case, arguments.seconds)
        rows, wrong = rows + found, wrong + failed
        torch.cuda.empty_cache()
        names = ("B", "T", "H", "S", "contender", "median_us", "p20_us", "p80_us", "tflops", "tb_per_s")
        print(tabulate([[r[n] for n in names] for r in found], names, floatfmt=".2f"), flush=True)
    command = f"python -m dsv3c.benchmarks.bench_mla_decode --seconds {arguments.seconds}"
    result = {"benchmark": "mla decode", "command": command, "environment": environment("cuda"), "wrong": wrong}
    if arguments.record and not wrong:
        append([result | {"cases": rows}])
    print(json.dumps(result | {"num_cases": len(rows)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
