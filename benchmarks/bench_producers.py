"""Casts and fused producers at V3's sizes, each beside a copy that moves as many bytes, in turns.

    python -m dsv3c.benchmarks.bench_producers [--only casts,swiglu,...] [--seconds 2] [--record]

Each is checked against its definition before it is timed, casts bit for bit, and replayed from a CUDA graph: in a model
the host is ahead, and here its launches would count. Prints a table; the last line is JSON; --record appends it to
`results/`. `of copy` is the copy's time over the producer's: the share of what the memory gives.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor

import dsv3c.operators  # noqa: F401
from dsv3c.benchmarks import command_line
from dsv3c.benchmarks.record import append, environment
from dsv3c.benchmarks.timing import copy_of, interleaved, replayed
from dsv3c.kernels.reference import casts as reference
from dsv3c.kernels.reference import cross_entropy, heads, norm, rotary, swiglu
from dsv3c.kernels.reference.permute import permute_requantize_t_ref
from dsv3c.numerics import E4M3, TILE, Recipe, distance, quantized_gemm_rms, unit_roundoff

ops = torch.ops.dsv3c
FLOOR, GRADIENT_FLOOR = Recipe().amax_floor, Recipe().gradient_amax_floor
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """A producer and its definition on the same operands, and the bytes that it reads and writes at least."""

    name: str
    run: Callable[[], object]
    definition: Callable[[], object]
    bytes: int
    exact: bool = False


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """FP8 pairs dequantised; the tests compare far more closely."""
    tensors = list(zip(found, expected, strict=True))
    while tensors:
        (f, e), *tensors = tensors
        bound = unit_roundoff(torch.bfloat16)
        if f.dtype == E4M3:
            (f_scale_inv, e_scale_inv), *tensors = tensors
            f, e = reference.dequantize_tile(f, f_scale_inv), reference.dequantize_tile(e, e_scale_inv)
            bound = quantized_gemm_rms()
        if f.numel() and not distance(f, e)[0] <= bound:
            raise AssertionError(f"RMS distance {distance(f, e)[0]:.3g}, bound {bound:.3g}")


def same_bits(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for f, e in zip(found, expected, strict=True):
        if not torch.equal(f.contiguous().view(torch.uint8), e.contiguous().view(torch.uint8)):
            raise AssertionError("bits differ from the definition")


def casts() -> Iterator[Case]:
    for R, K, groups in [(4096, 2048, 0), (4096, 7168, 0), (4096, 18432, 0), (32768, 2048, 8), (32768, 7168, 8)]:
        x, n = normal(R, K), R * K
        offs = torch.arange(1, groups + 1, dtype=torch.int32) * (R // groups) if groups else None
        quantized, packed = ops.quantize_tile(x, FLOOR, False), ops.quantize_e5m6(x, FLOOR)
        for name, size, arguments in [
            ("quantize_tile", 3, (x, FLOOR, False)),
            ("quantize_tile_t", 3, (x, offs, FLOOR, False)),
            ("quantize_tile_both", 4, (x, offs, FLOOR, False)),
            ("requantize_t", 2, (*quantized, offs, FLOOR, False)),
            ("quantize_e5m6", 3.5, (x, FLOOR)),
            ("dequantize_e5m6", 3.5, (*packed, torch.bfloat16)),
        ]:
            definition = getattr(reference, f"{name}_ref")
            yield case(f"{name} {R}x{K}", name, arguments, definition, int(size * n), exact=True)
    H, top_k = 7168, 8
    for T, groups in [(4096, 8), (4096, 32), (4096, 256), (16384, 8)]:
        idx = torch.rand(T, groups).topk(top_k).indices.int()
        _, offs, permutation, inverse = ops.sort_by_expert(idx, groups)
        arguments = *ops.quantize_tile(normal(T, H), FLOOR, False), permutation, inverse, offs, FLOOR, False
        rows = T + top_k * T + TILE * groups  # x's, read once, and what is written; a scale for each 128 bytes
        title = f"permute_requantize_t {top_k * T}x{H} in {groups}"
        yield case(title, "permute_requantize_t", arguments, permute_requantize_t_ref, rows * H * 33 // 32, exact=True)
    for shape in [(7168, 16384), (32, 4096, 7168)]:
        w = normal(*shape)
        quantized = ops.quantize_block(w, FLOOR, False)
        for name, arguments in [("quantize_block", (w, FLOOR, False)), ("dequantize_block", (*quantized, w.dtype))]:
            title = f"{name} {'x'.join(map(str, shape))}"
            yield case(title, name, arguments, getattr(reference, f"{name}_ref"), 3 * w.numel(), exact=True)


def swiglus() -> Iterator[Case]:
    for rows, width, groups in [(32768, 2048, 8), (4096, 18432, None)]:
        h, da = normal(rows, 2 * width), normal(rows, width)
        offs = None if groups is None else torch.arange(1, groups + 1, dtype=torch.int32) * (rows // groups)
        weight = None if groups is None else torch.rand(rows)
        n = rows * width
        saved = ops.quantize_tile(h, FLOOR, False)
        for name, size, arguments in [
            ("swiglu_quantize", 5, (h, weight, FLOOR, False)),
            ("swiglu_quantize_save", 7, (h, weight, FLOOR, False)),
            ("swiglu_quantize_backward", 9, (*saved, da, weight, offs, FLOOR, GRADIENT_FLOOR, False)),
        ]:
            yield case(f"{name} {rows}x{width}", name, arguments, getattr(swiglu, f"{name}_ref"), size * n)


def norms() -> Iterator[Case]:
    for rows, width in [(4096, 7168), (16384, 7168), (4096, 1536)]:
        x, residual, weight, n = normal(rows, width), normal(rows, width), normal(width), rows * width
        dsum = normal(rows, width)
        rstd = norm.rms_norm(x, weight, EPS)[1]
        for name, size, arguments in [
            ("rms_norm_quantize", 3, (x, weight, EPS, FLOOR, False)),
            ("add_rms_norm_quantize", 7, (x, residual, weight, EPS, FLOOR, False, False)),
            ("add_rms_norm_quantize", 9, (x, residual, weight, EPS, FLOOR, False, True)),
            ("rms_norm_backward", 8, (residual, x, weight, rstd, dsum)),
            ("rms_norm_backward", 6, (residual, x, weight, rstd, None)),
        ]:
            yield case(f"{name} {rows}x{width}", name, arguments, getattr(norm, f"{name}_ref"), size * n)


def rotaries() -> Iterator[Case]:
    R, H, nope, rope, V, K = 4096, 128, 128, 64, 128, 512
    q, dv = normal(R, H, nope + rope), normal(R, H, V)
    x, weight = normal(R, K + rope), normal(K)
    angle = torch.rand(R, rope // 2)
    cos, sin = angle.cos(), angle.sin()
    angles_moved, latent = 8 * R * rope // 2, K + rope
    moved, arguments = R * (2 * latent + 2 * latent + K) + angles_moved, (x, weight, cos, sin, EPS, FLOOR, False)
    yield case(f"latent_quantize {R}", "latent_quantize", arguments, rotary.latent_quantize_ref, moved)
    turned, joined = R * H * (nope + rope), R * H * (nope + V)
    for name, moved, arguments in [
        ("rotate_quantize_both", 4 * turned + angles_moved, (q, cos, sin, GRADIENT_FLOOR, False)),
        ("join_quantize_both", 4 * joined, (q, dv, nope, GRADIENT_FLOOR, False)),
    ]:
        yield case(f"{name} {R}", name, arguments, getattr(heads, f"{name}_ref"), moved)
    for inverse in (False, True):
        expected = q.clone()
        rotary.rotate_heads_ref(expected, cos, sin, inverse)
        yield Case(
            f"rotate_heads_ {R}{' inverse' * inverse}",
            lambda inverse=inverse: (ops.rotate_heads_(q, cos, sin, inverse), q)[1:],
            lambda expected=expected: (expected,),
            4 * R * H * rope + angles_moved,
        )


def cross_entropies() -> Iterator[Case]:
    R, V = 4096, 129280
    logits, labels, scale = normal(R, V), torch.randint(V, (R,)), torch.ones(1)
    gradient = logits.clone()
    loss = cross_entropy.cross_entropy_ref(gradient, labels, scale)
    yield Case(
        f"cross_entropy_ {R}x{V}",
        lambda: (ops.cross_entropy_(logits, labels, scale), logits),
        lambda: (loss, gradient),
        4 * R * V,
    )


def case(title: str, name: str, arguments: tuple, definition: Callable, moved: int, exact: bool = False) -> Case:
    return Case(title, lambda: getattr(ops, name)(*arguments), lambda: definition(*arguments), moved, exact)


SECTIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "casts": casts,
    "swiglu": swiglus,
    "norm": norms,
    "rotary": rotaries,
    "cross_entropy": cross_entropies,
}


def main() -> int:
    parser = command_line.parser(__doc__, SECTIONS)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    arguments = parser.parse_args()
    command_line.need_gpu(parser)
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    table, cases, wrong = [], [], 0
    for section in arguments.only:
        for each in SECTIONS[section]():
            try:
                outputs = [x if isinstance(x, tuple) else (x,) for x in (each.run(), each.definition())]
                (same_bits if each.exact else agree)(*outputs)
            except Exception as error:  # one that is wrong, or does not run, gets no time
                print(f"WRONG {each.name}: {error}", flush=True)
                wrong += 1
                continue
            del outputs
            contenders = {"ours": replayed(each.run), "copy": copy_of(each.bytes)}
            times = interleaved(contenders, rounds=30, seconds=arguments.seconds)
            ours, copy = times["ours"], times["copy"]
            share = copy.median_us / ours.median_us
            table.append([each.name, ours.median_us, ours.p20_us, ours.p80_us, copy.median_us, share])
            spread = {f"{key}_us": [t.median_us, t.p20_us, t.p80_us] for key, t in times.items()}
            cases.append({"case": each.name, "bytes": each.bytes, "of_copy": share} | spread)
            print(f"{each.name}: {ours.median_us:.1f} us, {share:.2f} of copy", flush=True)
            del contenders
            torch.cuda.empty_cache()
    print(tabulate(table, ["case", "µs", "p20", "p80", "copy", "of copy"], floatfmt=".2f"), flush=True)
    command = f"python -m dsv3c.benchmarks.bench_producers --only {','.join(arguments.only)}"
    result = {"benchmark": "producers", "command": command, "environment": environment("cuda"), "wrong": wrong}
    if arguments.record and not wrong:
        append([result | {"cases": cases}])
    print(json.dumps(result | {"num_cases": len(cases)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
