"""`dsv3c bench`: how fast is a compiled model? Eager, torch.compile and dsv3c on the same weights and inputs.

What is called is in workloads.py, what is not a model's call in parts.py and start.py. First every compiled layer is
checked (gate.py); then all are timed in turn (timing.py). Compilation, and the FP8 copies of the weights, are made in
the first call, which is timed apart.
"""

import gc
import json
import sys
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv3c.benchmarks.bench_report import EMULATED, RATIOS_ONLY, check_drawable, draw, report
from dsv3c.errors import Dsv3cError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from dsv3c.benchmarks.gate import Check
    from dsv3c.benchmarks.timing import Timing
    from dsv3c.benchmarks.workloads import Model, Workload
    from dsv3c.config import ModelConfig

WORKLOADS = ("forward", "backward", "moe", "decode")
MODES = (*WORKLOADS, "quantize", "main-grad", "deterministic", "cross-entropy", "optimizer", "start")
FAMILIES = ("ours", "hf")
ROUTINGS = ("router", "zipf")
SKEWED = ("forward", "backward", "moe")  # what the other routings are for
BASELINES = ("eager", "torch.compile")
PRECISIONS = ("auto", "exact", "fp8")
GRAPH = "decode: of dsv3c, the step that generate replays, a CUDA graph whose memory is taken before"
ZIPF = "routing injected, the same for all, weights the router's"


def bench(
    source: Annotated[
        str, typer.Argument(metavar="CHECKPOINT|PRESET", help="A checkpoint's folder or a preset's name.")
    ],
    layers: Annotated[int | None, typer.Option(help="Of a preset: so many layers, dense ones first.")] = None,
    experts: Annotated[
        int | None, typer.Option(help="Of a preset: so many, in one group; 8 of v3-671b are a GPU's share at EP32.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Of a sequence; in decode, cached ones.", show_default="4096, or 128 on a CPU"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    mode: Annotated[str, typer.Option(help=f"Of {', '.join(MODES)}; with commas between.")] = "forward",
    model: Annotated[str, typer.Option(help="ours, or hf: transformers' model, the same weights.")] = "ours",
    routing: Annotated[
        str, typer.Option(help="router, or zipf: experts' loads as 1, 1/2, 1/3, …, the same for all.")
    ] = "router",
    precision: Annotated[str, typer.Option(help="exact, fp8, or auto: exact, and fp8 where it is fast.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the times, to a .png.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Append them to benchmarks/results.")] = False,
) -> None:
    """Compiled against eager and torch.compile: correctness first, then interleaved timing."""
    if plot:
        check_drawable(plot)
    document = measure(
        source,
        layers=layers,
        experts=experts,
        tokens=tokens,
        batch=batch,
        modes=_choices("mode", mode, MODES),
        family=_choices("model", model, FAMILIES, most=1)[0],
        routing=_choices("routing", routing, ROUTINGS, most=1)[0],
        precisions=_choices("precision", precision, PRECISIONS),
    )
    passed = all(row["passed"] for row in document["modes"])
    if passed and plot:
        draw(document, plot)
    if passed and record:
        from dsv3c.benchmarks.record import append

        common = {key: value for key, value in document.items() if key != "modes"}
        typer.echo(f"appended to {append([common | row for row in document['modes']])}", err=True)
    typer.echo(json.dumps(document) if as_json else report(document))
    if not passed:
        raise typer.Exit(1)


def measure(
    source: str,
    *,
    layers: int | None = None,
    experts: int | None = None,
    tokens: int | None = None,
    batch: int = 1,
    modes: tuple[str, ...] = ("forward",),
    family: str = "ours",
    routing: str = "router",
    precisions: tuple[str, ...] = ("auto",),
) -> dict[str, Any]:
    """The JSON document of a run; a mode that failed its checks has no times. Raises Dsv3cError for bad input."""
    import torch

    from dsv3c.benchmarks.record import environment
    from dsv3c.benchmarks.workloads import Workload, build, configured, place, skew_routing

    device, dtype = place()
    on_gpu = device.type == "cuda"
    tokens = tokens if tokens is not None else 4096 if on_gpu else 128
    for name, number in (("tokens", tokens), ("batch", batch)):
        if number < 1:
            raise Dsv3cError(f"--{name}: expected at least 1, found {number}")
    if routing == "zipf" and not set(modes) <= set(SKEWED):
        raise Dsv3cError(f"--routing zipf: expected modes of {', '.join(SKEWED)}, found {','.join(modes)}")
    if "start" in modes and len(precisions) > 1:
        raise Dsv3cError(f"--mode start: expected one precision, found {','.join(precisions)}; try --precision auto")
    config, rows, rows_per_expert = configured(source, layers, experts), {}, None
    _check_modes(source, config, modes, device, dtype)
    if "start" in modes:  # before this process takes memory
        rows["start"] = _measure_start(source, layers, experts, family, batch, tokens, precisions[0])
    if modes != ("start",):
        model = build(source, config, family, dtype, device)
        rows_per_expert = skew_routing(model, batch, tokens) if routing == "zipf" else None
    for mode in modes:
        if mode == "start":
            continue
        torch._dynamo.reset()
        gc.collect()  # compiled models are cycles, and hold copies of the weights
        if on_gpu:
            torch.cuda.empty_cache()
        workload = Workload(mode, family, batch, tokens)
        if mode in WORKLOADS:
            rows[mode] = _measure_mode(workload, model, precisions, device)
        else:
            rows[mode] = _measure_part(workload, model)
    names = {contender["name"] for row in rows.values() for contender in row["contenders"]}
    return {
        "benchmark": "model",
        "source": Path(source).name,
        "family": family,
        "layers": config.num_hidden_layers,
        "experts": config.n_routed_experts,
        "tokens": tokens,
        "batch": batch,
        "routing": routing,
        "rows_per_expert": rows_per_expert,
        "dtype": str(dtype).removeprefix("torch."),
        "command": " ".join(
            ["dsv3c bench", Path(source).name, *([f"--layers {layers}"] if layers else []),
             *([f"--experts {experts}"] if experts else []), f"--tokens {tokens}",
             f"--batch {batch} --mode {','.join(modes)} --model {family} --precision {','.join(precisions)}",
             *(["--routing zipf"] if routing == "zipf" else [])]
        ),
        "notes": [RATIOS_ONLY] * (not on_gpu)
        + [EMULATED] * (not on_gpu and any(name.startswith("dsv3c fp8") for name in names))
        + [GRAPH] * (on_gpu and family == "ours" and "decode" in modes)
        + ([f"{ZIPF}: {', '.join(map(str, rows_per_expert))} rows an expert"] if rows_per_expert else []),
        "environment": environment(device.type),
        "modes": [rows[mode] for mode in modes],
    }  # fmt: skip


def _check_modes(
    source: str, config: "ModelConfig", modes: tuple[str, ...], device: "torch.device", dtype: "torch.dtype"
) -> None:
    """Raises, before the first is measured, what a later one would."""
    from dsv3c.benchmarks.parts import ROOM, check_room
    from dsv3c.benchmarks.workloads import LARGER, moe_of, outline_of
    from dsv3c.config import PRESETS

    outline = outline_of(config, dtype)
    if "moe" in modes:
        moe_of(outline)
    for mode in ROOM.keys() & set(modes):
        hint = f"--layers 2 --experts {config.num_experts_per_tok}" if source in PRESETS else LARGER
        check_room(mode, outline, device, hint)


def _measure_mode(
    workload: "Workload", model: "Model", precisions: tuple[str, ...], device: "torch.device"
) -> dict[str, Any]:
    from dsv3c.benchmarks import gate, timing
    from dsv3c.benchmarks.kernel_times import kernel_times
    from dsv3c.benchmarks.workloads import moe_of

    model = moe_of(model) if workload.mode == "moe" else model
    with workload.prepared(model) as calls:
        compiled = _compiled(model, precisions)
        models = _contenders(model, compiled)
        first_call_s = {}
        for name, contender in models.items():
            _progress(f"{workload.mode}: first call of {name}")
            first_call_s[name] = _first_call_s(partial(calls.warm, contender), device)
        _progress(f"{workload.mode}: checking every layer")
        recorded = gate.record_calls(model, partial(calls.checked, model))
        checks = gate.check(model, compiled, recorded, backward=calls.loss is not None)
        found = {f"dsv3c {precision}": of_one for precision, of_one in checks.items()}
        if failed := _failed(workload.mode, found):
            return failed
        for contender in compiled.values():
            calls.warm(contender)  # makes the FP8 copies again, which the checks freed
        _progress(f"{workload.mode}: timing")
        runs = {name: partial(calls.run, contender) for name, contender in models.items()}
        times = timing.interleaved(runs)
        more = {
            name: {
                "first_call_s": first_call_s[name],
                "saved_bytes": _saved_bytes(calls.loss, contender, device),
                "kernels": (kernels := kernel_times(runs[name])) and asdict(kernels),
            }
            for name, contender in models.items()
        }
    return _row(workload.mode, times, found, more)


def _measure_part(workload: "Workload", model: "Model") -> dict[str, Any]:
    from dsv3c.benchmarks import timing
    from dsv3c.benchmarks.parts import PARTS

    _progress(f"{workload.mode}: checking")
    part = PARTS[workload.mode](model, workload)
    if failed := _failed(workload.mode, part.checks):
        return failed
    for call in part.calls.values():  # of which the checks made some already, so that a first call says nothing
        call()
        call()
    _progress(f"{workload.mode}: timing")
    times = timing.interleaved(part.calls)
    return _row(workload.mode, times, part.checks, {name: {"moved_bytes": b} for name, b in part.moved_bytes.items()})


def _measure_start(
    source: str, layers: int | None, experts: int | None, family: str, batch: int, tokens: int, precision: str
) -> dict[str, Any]:
    from dsv3c.benchmarks import start, timing

    _progress("start: in processes of their own")
    seconds, found = start.starts(
        source=source, layers=layers, experts=experts, family=family, batch=batch, tokens=tokens, precision=precision
    )
    times = {name: timing.summary([s * 1e6 for s in taken]) for name, taken in seconds.items()}
    return _failed("start", found) or _row("start", times, found, {})


def _failed(mode: str, checks: "dict[str, list[Check]]") -> dict[str, Any] | None:
    """The row of a mode in which a contender failed one of its checks."""
    failed = [{"contender": name} | asdict(c) for name, found in checks.items() for c in found if not c.passed]
    return {"mode": mode, "passed": False, "failed": failed, "contenders": []} if failed else None


def _row(
    mode: str, times: "dict[str, Timing]", checks: "dict[str, list[Check]]", more: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Of a mode that passed. Ratios to eager and torch.compile are None where they take no part."""
    contenders = []
    for name, found in times.items():
        worst = max(checks.get(name, ()), key=lambda c: c.error / (c.bound or 1), default=None)
        ratios = {
            f"speedup_over_{baseline.replace('.', '_')}": times[baseline].median_us / found.median_us
            if baseline in times
            else None
            for baseline in BASELINES
        }
        rest = {"first_call_s": None, "saved_bytes": None, "moved_bytes": None, "kernels": None} | more.get(name, {})
        contenders.append(
            {"name": name, **asdict(found), **ratios, **rest, "worst_check": asdict(worst) if worst else None}
        )
    return {"mode": mode, "passed": True, "failed": [], "contenders": contenders}


def _compiled(model: "Model", precisions: tuple[str, ...]) -> dict[str, "Model"]:
    """By precision. "auto" also means "exact", to show what FP8 adds."""
    from dsv3c.compiler import compilation_of, compile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that FP8 is emulated: the report says so
        made = [compile(model, precision=precision) for precision in precisions]
    compiled = {compilation_of(one).precision: one for one in made}
    if "auto" in precisions and "exact" not in compiled:
        compiled["exact"] = compile(model, precision="exact")
    return compiled


def _contenders(model: "Model", compiled: dict[str, "Model"]) -> dict[str, "Model"]:
    import torch

    ours = {f"dsv3c {precision}": compiled[precision] for precision in sorted(compiled)}
    return {"eager": model, "torch.compile": torch.compile(model), **ours}


def _first_call_s(call: "Callable[[], object]", device: "torch.device") -> float:
    """Compiles, and warms up: a second call shows what only a second call does."""
    import torch

    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    call()
    return seconds


def _saved_bytes(loss: "Callable[[Model], torch.Tensor] | None", model: "Model", device: "torch.device") -> int | None:
    """What forward allocated and keeps for backward."""
    import torch

    if loss is None or device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    kept = loss(model)
    saved = torch.cuda.memory_allocated() - before
    del kept
    return saved


def _choices(name: str, text: str, known: tuple[str, ...], most: int | None = None) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(text.split(",")))
    if not set(found) <= set(known) or len(found) > (most or len(known)):
        raise Dsv3cError(f"--{name}: expected {'one' if most else 'some'} of {', '.join(known)}, found {text!r}")
    return found


def _progress(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
