"""The `dsv3c` command. Each subcommand imports what it needs when it runs: `dsv3c --help` needs no torch.

Results go to stdout, with `--json` as one JSON document whose names carry the units; progress and errors go to stderr.
Exit codes: 0 done, 1 a correctness gate failed, 2 bad input, 130 interrupted.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3c.benchmarks.bench_model import bench
from dsv3c.cli_explain import explain
from dsv3c.cli_schedule import schedule
from dsv3c.cli_tune import tune
from dsv3c.debug import use_writable_caches
from dsv3c.errors import Dsv3cError
from dsv3c.schedules import ScheduleError
from dsv3c.tuning import targets

app = typer.Typer(
    help="A compiler for DeepSeek-V3.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    callback=lambda: use_writable_caches(lambda line: typer.echo(f"dsv3c: {line}", err=True)),
)  # fmt: skip
app.command("bench")(bench)
app.command("explain")(explain)
app.command("schedule")(schedule)
app.command("tune")(tune)

Source = Annotated[str, typer.Argument(metavar="CHECKPOINT|PRESET", help="A checkpoint's folder or a preset's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command("compile")
def compile_artifact(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder, or an earlier artifact to replace.")],
    target: Annotated[str, typer.Option(help=f"{', '.join(targets.names())}, or auto: this machine.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Compile a model's layers for a target, whether or not it is here, into an artifact: graphs, kernels, report."""
    from tabulate import tabulate

    from dsv3c import artifact

    start = time.perf_counter()
    with _progress() as progress:
        made = artifact.compile_artifact(source, target, output, progress=progress)
    elapsed_s = time.perf_counter() - start
    if as_json:
        report = made.report.to_dict()
        summary = ("name", "modules", "flops", "moved_bytes", "predicted_us")
        _print_json(
            artifact=str(made.path), target=report["target"], precision=report["precision"], elapsed_s=elapsed_s,
            units=[{key: unit[key] for key in summary} for unit in report["units"]], kernels=made.kernels,
        )  # fmt: skip
        return
    typer.echo(f"{made.report.precision} for {made.report.target.name} ({made.report.target.device})\n")
    typer.echo(made.report.summary() + "\n")
    if made.kernels:
        columns = ("name", "registers", "spills", "shared_bytes", "num_warps", "num_stages")
        typer.echo(tabulate([[kernel[column] for column in columns] for kernel in made.kernels], columns) + "\n")
    typer.echo(f"written to {made.path} in {elapsed_s:.0f} s; predicted times are rooflines, not measurements")


@app.command("check")
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `dsv3c compile` wrote.")], as_json: AsJson = False
) -> None:
    """Check that an artifact is whole, made by this version, and holds the graphs and kernels it must."""
    from dsv3c.artifact_check import check_artifact

    found = check_artifact(folder)
    if as_json:
        _print_json(**found)
        return
    products = sum(found["fp8_products"].values())
    typer.echo(
        f"{folder}: {found['precision']} for {found['target']}, {found['files']} files, "
        f"{len(found['kernels'])} kernels; {len(found['fp8_products'])} units with {products} FP8 products, "
        f"as many as the config says"
    )


@app.command("info")
def info(source: Source, as_json: AsJson = False) -> None:
    """What is in a checkpoint, or would be in a preset's."""
    from tabulate import tabulate

    from dsv3c.checkpoint import inspect
    from dsv3c.source import model_config

    config = model_config(source)
    found = inspect(source)
    moe_layers = sum(config.moe_layers[: config.num_hidden_layers])
    idle = moe_layers * (config.n_routed_experts - config.num_experts_per_tok)
    facts: dict[str, Any] = {
        "parameters": found.parameters,
        "active_parameters": found.parameters - idle * 3 * config.hidden_size * config.moe_intermediate_size,
        "dense_layers": config.num_hidden_layers - moe_layers,
        "moe_layers": moe_layers,
        "experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "mtp": found.mtp,
        "cache_bytes_per_token": config.num_hidden_layers * config.latent_dim * 2,
        "tensors": found.tensors,
        "bytes_by_dtype": found.bytes_by_dtype,
    }
    if as_json:
        _print_json(source=source, model_type=config.model_type, **facts, config=config.to_dict())
        return
    sizes = {f"bytes in {dtype}": size for dtype, size in facts.pop("bytes_by_dtype").items()}
    facts["mtp"] = "yes" if found.mtp else "no"
    facts |= sizes
    rows = [[name.replace("_", " "), f"{fact:,}" if isinstance(fact, int) else fact] for name, fact in facts.items()]
    typer.echo(f"{source} ({config.model_type})\n")
    typer.echo(tabulate(rows, tablefmt="plain", colalign=("left", "right"), disable_numparse=True))


def main() -> None:
    """Entry point of the `dsv3c` script."""
    try:
        app(prog_name="dsv3c")
    except (Dsv3cError, ScheduleError) as error:
        line = getattr(error, "message", str(error))
        typer.echo(f"dsv3c: {' '.join(line.split())}", err=True)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be imported
            raise
        typer.echo(f"dsv3c: {' '.join(str(error).split())}; try fewer --tokens, --layers or --experts", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_json(**document: Any) -> None:
    typer.echo(json.dumps(document))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is going on, if someone can see it."""
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update
