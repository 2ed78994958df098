"""`dsv3c explain`: what the compiler did to a model, what each part should cost, and with --measure what it costs."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3c.errors import Dsv3cError
from dsv3c.files import check_writable
from dsv3c.tuning import targets

MODES = ("forward", "backward")


def explain(
    source: Annotated[
        str, typer.Argument(metavar="CHECKPOINT|PRESET", help="A checkpoint's folder or a preset's name.")
    ],
    layers: Annotated[int | None, typer.Option(help="Of a preset: so many layers, dense ones first.")] = None,
    experts: Annotated[int | None, typer.Option(help="Of a preset: so many, in one group.")] = None,
    tokens: Annotated[int | None, typer.Option(show_default="4096, or 128 on a CPU")] = None,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    mode: Annotated[str, typer.Option(help="forward, or backward: both.")] = "forward",
    model: Annotated[str, typer.Option(help="ours, or hf: transformers' model, the same weights.")] = "ours",
    precision: Annotated[str, typer.Option(help="exact, fp8, or auto: fp8 where it is fast.")] = "auto",
    target: Annotated[
        str, typer.Option(help=f"Predict for {', '.join(targets.names())}, or auto: this machine.")
    ] = "auto",
    measure: Annotated[bool, typer.Option("--measure", help="Time the operators, with torch's profiler.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also as a page with timelines.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What was measured, for Perfetto; measures.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Regions, operators, passes and kernels of a compiled model: predicted, and measured, times. Builds the model."""
    for option, found, known in (("mode", mode, MODES), ("model", model, ("ours", "hf"))):
        if found not in known:
            raise Dsv3cError(f"--{option}: expected one of {', '.join(known)}, found {found!r}")
    for name, number in (("tokens", tokens if tokens is not None else 1), ("batch", batch)):
        if number < 1:
            raise Dsv3cError(f"--{name}: expected at least 1, found {number}")
    for option, path in (("html", html), ("trace", trace)):
        if path is not None:
            check_writable(f"--{option}", path)
    report = _report(source, layers, experts, tokens, batch, mode, model, precision, target, measure, trace)
    if html is not None:
        from dsv3c.report_page import page

        _write(html, page(report))
    typer.echo(json.dumps(report.to_dict()) if as_json else str(report))


def _report(
    source: str, layers: int | None, experts: int | None, tokens: int | None, batch: int, mode: str, family: str,
    precision: str, target: str, measure: bool, trace: Path | None,
) -> Any:  # fmt: skip
    import torch

    import dsv3c
    from dsv3c.benchmarks.workloads import build, configured, place

    device, dtype = place()
    eager = build(source, configured(source, layers, experts), family, dtype, device)
    compiled = dsv3c.compile(eager, target=target, precision=precision)
    tokens = tokens if tokens is not None else 4096 if device.type == "cuda" else 128
    input_ids = torch.randint(eager.config.vocab_size, (batch, tokens), device=device)
    with torch.set_grad_enabled(mode == "backward"):
        return dsv3c.explain(compiled, input_ids, measure=measure, trace=trace)


def _write(path: Path, text: str) -> None:
    """Beside it, then renamed."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
