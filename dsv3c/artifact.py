"""`dsv3c compile`: what the compiler makes of a model for a target, as a folder; the machine may have no such GPU.

Each kind of module is captured from the config alone, on fake CPU tensors, in the variants of MODES; no weight is
read. An artifact holds

    manifest.json           versions, source fingerprint, passes, units, and the SHA-256 of every other file
    config.json             the model's
    graphs/<unit>/*.txt     L0 captured, L1 joint after our passes, L2 forward and backward
    report.json, .txt       what each pass did; FLOPs, bytes and predicted times (dsv3c/report.py)
    kernels/*.cubin, .json  the Triton kernels that the graphs' operators launch, for sm_90a, and their resources

Predicted times are called predicted in every file. dsv3c/artifact_check.py reads an artifact back.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsv3c.backend import Lowered, lower, source_fingerprint
from dsv3c.capture import Argument, Kind, Unit, Variant, template_of, tensors_of
from dsv3c.checkpoint import inspect
from dsv3c.config import ModelConfig
from dsv3c.errors import ArtifactError
from dsv3c.families import call_of
from dsv3c.fp8_weights import recipe_of
from dsv3c.layers import DecoderLayer, RMSNorm, Rotary
from dsv3c.passes import Pipeline, default
from dsv3c.pricing import price
from dsv3c.report import EAGER, Report, UnitReport
from dsv3c.source import model_config
from dsv3c.tuning import cross_compile, targets
from dsv3c.weights import QuantizedWeights

FORMAT = 2
MANIFEST = "manifest.json"
_OPERATOR = re.compile(r"^%\d+ = (dsv3c\.\S+?)\(", re.MULTILINE)


@dataclass(frozen=True)
class Mode:
    """A variant that every artifact has: one sequence, so many new tokens after so many cached ones."""

    name: str
    tokens: int
    cached: int = 0
    training: bool = False


MODES = (Mode("prefill", 4096), Mode("training", 4096, training=True), Mode("decode", 1, cached=4096))


@dataclass(frozen=True)
class Artifact:
    """What was written to `path`."""

    path: Path
    manifest: dict[str, Any]
    report: Report
    kernels: tuple[dict[str, Any], ...]


def compile_artifact(
    source: str, target: str, out: str | Path, *, progress: Callable[[str], None] = lambda step: None
) -> Artifact:
    """Compiles the checkpoint folder or preset `source` for `target` and writes the artifact to the folder `out`.

    FP8 for targets that have it, exact precision for others. An earlier artifact in `out` is replaced; everything is
    written beside it first and renamed at the end. `progress` is told of each step.

    Raises:
        ConfigError, CheckpointError: `source` is no model that can be used.
        CompileError: an unknown target, or no Triton to compile its kernels with.
        ArtifactError: `out` holds something else, or cannot be written.
    """
    out = Path(out)
    _check_free(out)
    resolved = targets.resolve(target)
    config = inspect(source).config if Path(source).is_dir() else model_config(source)
    hopper = resolved.arch.startswith("sm_90")
    precision, recipe = "fp8" if hopper else "exact", recipe_of(config)
    pipeline = Pipeline.of(default(precision, recipe))
    weights = QuantizedWeights(recipe) if pipeline.quantizes else None

    files: dict[str, bytes] = {"config.json": _json(config.to_dict())}
    units, reports = {}, []
    for kind, modules in kinds(config).items():
        for mode in MODES:
            unit = unit_of(config, kind, mode)
            progress(f"lowering {unit.name}")
            lowered = lower(unit, pipeline, weights, price=partial(price, target=resolved))
            files |= {f"graphs/{unit.name}/{level}.txt": text.encode() for level, text in _texts(lowered)}
            units[unit.name] = {"kind": kind, "mode": asdict(mode), "modules": modules}
            reports.append(UnitReport.of(lowered, modules, resolved))
    report = Report(precision, resolved, (EAGER,), tuple(reports))
    files |= {"report.json": _json(report.to_dict()), "report.txt": str(report).encode()}

    kernels = []
    for name in kernels_of(files) if hopper else ():
        progress(f"compiling kernel {name} for {resolved.arch}")
        kernel = cross_compile.compile_kernel(name, pow2=recipe.pow2)
        kernels.append({"name": name, **kernel.description})
        files |= {f"kernels/{name}.cubin": kernel.cubin, f"kernels/{name}.json": _json(kernels[-1])}

    manifest = {
        "format": FORMAT,
        "model": Path(source).name,
        "target": resolved.name,
        "target_fingerprint": targets.fingerprint(resolved.name),
        "precision": precision,
        "recipe": asdict(recipe),
        "passes": [repr(step) for step in (*pipeline.captured, *pipeline.joint)],
        "units": units,
        **state(),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
    }
    manifest["cache_key"] = cache_key(manifest)
    progress(f"writing {out}")
    _write(out, files | {MANIFEST: _json(manifest)})
    return Artifact(out, manifest, report, tuple(kernels))


def state() -> dict[str, Any]:
    """What an artifact depends on beside its inputs: versions and sources. Another state makes it stale."""
    return {
        "versions": {name: _version(name) for name in ("dsv3c", "torch", "triton")},
        "source_fingerprint": source_fingerprint(),
    }


def cache_key(manifest: dict[str, Any]) -> str:
    """SHA-256 over everything that decides the result: config, target, recipe, passes, sources, versions."""
    inputs = {
        key: manifest[key]
        for key in ("format", "target", "target_fingerprint", "precision", "recipe", "passes", *state())
    }
    return hashlib.sha256(_json(inputs | {"config": manifest["files"]["config.json"]})).hexdigest()


def kinds(config: ModelConfig) -> dict[str, int]:
    """Kind of module of the main model -> how many there are. Equal ones share everything but their parameters."""
    main = config.moe_layers[: config.num_hidden_layers]
    layers = {"dense_layer": main.count(False), "moe_layer": main.count(True)}
    return {kind: count for kind, count in layers.items() if count} | {"rotary": 1, "final_norm": 1, "head": 1}


def unit_of(config: ModelConfig, kind: str, mode: Mode) -> Unit:
    """A bfloat16 module of the model as the unit that compiling the whole model would make, without its memory."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, gradient: bool = False) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=gradient)

    x = meta(1, mode.tokens, config.hidden_size, gradient=mode.training)
    tensors: tuple[torch.Tensor | None, ...] = (x,)
    module: nn.Module
    with torch.device("meta"):
        if kind == "rotary":
            module = Rotary(config)
            tensors = (x, meta(1, mode.tokens, dtype=torch.int64))
        elif kind == "final_norm":
            module = RMSNorm(config.hidden_size, config.rms_norm_eps)
        elif kind == "head":
            module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        else:
            module = DecoderLayer(config, moe=kind == "moe_layer")
            angles = [meta(1, mode.tokens, config.qk_rope_head_dim // 2, dtype=torch.float32) for _ in ("cos", "sin")]
            past = meta(1, mode.cached, config.latent_dim) if mode.cached else None
            tensors = (x, *angles, None, past, None, None, None)
    module.bfloat16()
    arguments = map(Argument.of, tensors, call_of(module).symbolic)
    on_cpu = tuple(argument and argument._replace(device=torch.device("cpu")) for argument in arguments)
    trained = tuple(mode.training and tensor.requires_grad for tensor in tensors_of(module).values())
    shapes = tuple(None if tensor is None else tensor.shape for tensor in tensors)
    return Unit(Kind.of(module), Variant(on_cpu, trained, mode.training), template_of(module), shapes)


def kernels_of(files: dict[str, bytes]) -> list[str]:
    """Names of the kernels that the graphs among `files` need; the weights, their inputs, are quantised by one too."""
    graphs = [content.decode() for name, content in files.items() if name.startswith("graphs/")]
    operators = {operator for graph in graphs for operator in _OPERATOR.findall(graph)}
    return cross_compile.kernels_of({*operators, "dsv3c.quantize_weights.default"})


def _texts(lowered: Lowered) -> Iterator[tuple[str, str]]:
    levels = ("L0", lowered.captured), ("L1", lowered.joint), ("L2_forward", lowered.forward)
    yield from (*levels, ("L2_backward", lowered.backward)) if lowered.backward else levels


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _check_free(out: Path) -> None:
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out}: expected a new folder or an earlier artifact, found neither; choose another")
    if not out.absolute().parent.is_dir():
        raise ArtifactError(f"{out}: expected its parent folder to exist, found none; create it")


def _write(out: Path, files: dict[str, bytes]) -> None:
    """All of `files`, or nothing: beside `out` first, then in its place."""
    parent = out.absolute().parent
    new, old = (parent / f".{out.absolute().name}.{what}-{os.getpid()}" for what in ("partial", "replaced"))
    try:
        for name, content in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if out.exists():
            out.rename(old)
        new.rename(out)
    except OSError as error:
        raise ArtifactError(f"{out}: expected a disk to write to, found {error.strerror}; nothing was kept") from None
    finally:
        if old.exists() and not out.exists():  # stopped between the two renames
            old.rename(out)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
