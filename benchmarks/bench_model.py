"""`dsv3c bench`: how fast is a compiled model? Eager, torch.compile and dsv3c on the same weights and inputs.

What is called is in workloads.py. First every compiled layer is checked (gate.py); then all are timed in turn
(timing.py). Compilation, and the FP8 copies of the weights, are made in the first call, which is timed apart.
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

from dsv3c.errors import Dsv3cError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from dsv3c.benchmarks.workloads import Model, Workload

MODES = ("forward", "backward", "decode")
FAMILIES = ("ours", "hf")
PRECISIONS = ("auto", "exact", "fp8")
EMULATED = "FP8 is emulated on a CPU: its numbers are those of the recipe, its speed means nothing"
GRAPH = "decode: of dsv3c, the step that generate replays, a CUDA graph whose memory is taken before"
RATIOS_ONLY = "on a CPU only the ratios are meaningful, and those of this machine only"
_COLORS = {"eager": "#9aa0a6", "torch.compile": "#5f6368", "dsv3c exact": "#1a73e8", "dsv3c fp8": "#34a853"}


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
    mode: Annotated[str, typer.Option(help="Of forward, backward, decode; with commas between.")] = "forward",
    model: Annotated[str, typer.Option(help="ours, or hf: transformers' model, the same weights.")] = "ours",
    precision: Annotated[str, typer.Option(help="exact, fp8, or auto: exact, and fp8 where it is fast.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the times, to a .png.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Append them to benchmarks/results.")] = False,
) -> None:
    """Compiled against eager and torch.compile: correctness first, then interleaved timing."""
    document = measure(
        source,
        layers=layers,
        experts=experts,
        tokens=tokens,
        batch=batch,
        modes=_choices("mode", mode, MODES),
        family=_choices("model", model, FAMILIES, most=1)[0],
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
    precisions: tuple[str, ...] = ("auto",),
) -> dict[str, Any]:
    """The JSON document of a run; a mode that failed its checks has no times. Raises Dsv3cError for bad input."""
    import torch

    from dsv3c.benchmarks.record import environment
    from dsv3c.benchmarks.workloads import Workload, build

    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    tokens = tokens if tokens is not None else 4096 if on_gpu else 128
    for name, number in (("tokens", tokens), ("batch", batch)):
        if number < 1:
            raise Dsv3cError(f"--{name}: expected at least 1, found {number}")
    model = build(source, layers, experts, family, dtype, device)
    rows = []
    for mode in modes:
        torch._dynamo.reset()
        gc.collect()  # compiled models are cycles, and hold copies of the weights
        rows.append(_measure_mode(Workload(mode, family, batch, tokens), model, precisions, device))
    names = {contender["name"] for row in rows for contender in row["contenders"]}
    return {
        "benchmark": "model",
        "source": Path(source).name,
        "family": family,
        "layers": model.config.num_hidden_layers,
        "experts": model.config.n_routed_experts,
        "tokens": tokens,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "command": " ".join(
            ["dsv3c bench", Path(source).name, *([f"--layers {layers}"] if layers else []),
             *([f"--experts {experts}"] if experts else []), f"--tokens {tokens}",
             f"--batch {batch} --mode {','.join(modes)} --model {family} --precision {','.join(precisions)}"]
        ),
        "notes": [RATIOS_ONLY] * (not on_gpu)
        + [EMULATED] * (not on_gpu and "dsv3c fp8" in names)
        + [GRAPH] * (on_gpu and family == "ours" and "decode" in modes),
        "environment": environment(device.type),
        "modes": rows,
    }  # fmt: skip


def _measure_mode(
    workload: "Workload", model: "Model", precisions: tuple[str, ...], device: "torch.device"
) -> dict[str, Any]:
    from dsv3c.benchmarks import gate, timing

    with workload.prepared(model) as calls:
        compiled = _compiled(model, precisions)
        models = _contenders(model, compiled)
        first_call_s = {}
        for name, contender in models.items():
            _progress(f"{workload.mode}: first call of {name}")
            first_call_s[name] = _first_call_s(partial(calls.warm, contender), device)
        _progress(f"{workload.mode}: checking every layer")
        recorded = gate.record_calls(model, partial(calls.checked, model))
        checks = gate.check(model, compiled, recorded, backward=workload.mode == "backward")
        failed = [{"precision": p} | asdict(c) for p, found in checks.items() for c in found if not c.passed]
        row: dict[str, Any] = {"mode": workload.mode, "passed": not failed, "failed": failed, "contenders": []}
        if failed:
            return row
        for contender in compiled.values():
            calls.warm(contender)  # makes the FP8 copies again, which the checks freed
        _progress(f"{workload.mode}: timing")
        times = timing.interleaved({name: partial(calls.run, contender) for name, contender in models.items()})
        saved = {name: _saved_bytes(calls.loss, contender, device) for name, contender in models.items()}
    for name, found in times.items():
        worst = max(checks.get(name.removeprefix("dsv3c "), ()), key=lambda c: c.error / (c.bound or 1), default=None)
        row["contenders"].append(
            {
                "name": name,
                **asdict(found),
                "speedup_over_eager": times["eager"].median_us / found.median_us,
                "speedup_over_torch_compile": times["torch.compile"].median_us / found.median_us,
                "first_call_s": first_call_s[name],
                "saved_bytes": saved[name],
                "worst_check": asdict(worst) if worst else None,
            }
        )
    return row


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


def _first_call_s(call: partial, device: "torch.device") -> float:
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


def report(document: dict[str, Any]) -> str:
    """The document as tables for people."""
    from tabulate import tabulate

    where = document["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "triton", "dsv3c"))
    power = f", {where['power_limit_w']:.0f} W" if where.get("power_limit_w") else ""
    parts = [
        f"{document['source']} ({document['family']}), {document['layers']} layers, {document['experts']} experts, "
        f"{document['batch']} x {document['tokens']} tokens, {document['dtype']}; {where['machine']}{power}; {versions}"
    ]
    for row in document["modes"]:
        if row["passed"]:
            lines = [_line(row["mode"], contender, document["notes"]) for contender in row["contenders"]]
            parts.append(tabulate(lines, headers="keys", disable_numparse=True, stralign="right"))
        else:
            parts.append(f"{row['mode']}: these are wrong, so no speed is shown")
            parts.append(tabulate(row["failed"], headers="keys", floatfmt=".2e"))
    return "\n\n".join([*parts, *(f"Note: {note}." for note in document["notes"])])


def _line(mode: str, contender: dict[str, Any], notes: list[str]) -> dict[str, str]:
    emulated = EMULATED in notes and contender["name"] == "dsv3c fp8"
    line = {mode: contender["name"]}
    if RATIOS_ONLY not in notes:
        line |= {
            "median ms": f"{contender['median_us'] / 1e3:.3f}",
            "p20-p80 ms": f"{contender['p20_us'] / 1e3:.3f}-{contender['p80_us'] / 1e3:.3f}",
            "memory GB": f"{contender['peak_bytes'] / 1e9:.2f}",
            "first call s": f"{contender['first_call_s']:.0f}",
        }
        if contender["saved_bytes"] is not None:
            line["saved GB"] = f"{contender['saved_bytes'] / 1e9:.2f}"
    for baseline in ("eager", "torch.compile"):
        ratio = contender[f"speedup_over_{baseline.replace('.', '_')}"]
        line[f"x {baseline}"] = "emulated" if emulated else f"{ratio:.2f}"
    worst = contender["worst_check"]
    line["worst error (bound)"] = f"{worst['error']:.1e} ({worst['bound']:.1e})" if worst else ""
    return line


def draw(document: dict[str, Any], path: Path) -> None:
    """A panel a mode, a bar a contender, whiskers from p20 to p80, times as fast as eager above."""
    try:
        import matplotlib
    except ImportError:
        raise Dsv3cError("--plot: expected matplotlib, found none; try pip install 'dsv3c[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = document["modes"]
    figure, axes = pyplot.subplots(1, len(rows), figsize=(4.5 * len(rows), 3.6), squeeze=False, layout="constrained")
    for panel, row in zip(axes[0], rows, strict=True):
        for found in row["contenders"]:
            middle, low, high = (found[key] / 1e3 for key in ("median_us", "p20_us", "p80_us"))
            whiskers = [[middle - low], [high - middle]]
            bar = panel.bar(found["name"], middle, yerr=whiskers, capsize=3, color=_COLORS[found["name"]])
            emulated = EMULATED in document["notes"] and found["name"] == "dsv3c fp8"
            panel.bar_label(bar, ["emulated" if emulated else f"{found['speedup_over_eager']:.2f}x"], fontsize=8)
        panel.set(title=row["mode"], ylabel="ms")
        panel.tick_params(axis="x", labelsize=8, rotation=20)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(report(document).partition("\n")[0], fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _choices(name: str, text: str, known: tuple[str, ...], most: int | None = None) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(text.split(",")))
    if not set(found) <= set(known) or len(found) > (most or len(known)):
        raise Dsv3cError(f"--{name}: expected {'one' if most else 'some'} of {', '.join(known)}, found {text!r}")
    return found


def _progress(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
