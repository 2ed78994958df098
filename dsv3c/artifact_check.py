"""`dsv3c check`: is a folder an artifact, whole, of these sources and versions, with graphs that hold what they must?

What must hold of the graphs is the levels' specification (`_check_level`), and the number of FP8 products, which
follows from the config alone (`fp8_linears`).
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dsv3c.artifact import FORMAT, MANIFEST, MODES, Mode, cache_key, kernels_of, kinds, state
from dsv3c.config import ModelConfig
from dsv3c.errors import ArtifactError, ConfigError
from dsv3c.numerics import TILE
from dsv3c.operators.mla_decode import LATENT, RANK
from dsv3c.tuning import targets

_LINE = re.compile(r"%(\d+) = (\S+?)\((.*?)\)(?: : (.+?))?(?:  # (\S+) \((\w+)\))?")
_FP8_PRODUCT = re.compile(r"dsv3c\.(?:grouped_)?gemm(?:_keys|_dgrad|_wgrad)?\.default")
_PRODUCT = re.compile(r"aten\.(?:mm|bmm|addmm|baddbmm|linear|_grouped_mm)\.|dsv3c\.grouped_linear")
_ATTENTION = "scaled_dot_product_attention"
LEVELS = ("L0", "L1", "L2_forward", "L2_backward")


def fp8_linears(config: ModelConfig, kind: str) -> int:
    """Linears of a module that the recipe quantises: of a layer those of attention (queries straight or through a
    latent, two of keys and values, output), and three of a dense MLP, or two grouped ones of the experts and three of
    shared experts; of the head none.
    """
    if not kind.endswith("_layer"):
        return 0
    attention = (1 if config.q_lora_rank is None else 2) + 2 + 1
    return attention + (2 + (3 if config.n_shared_experts else 0) if kind == "moe_layer" else 3)


def merged_linears(config: ModelConfig, kind: str) -> int:
    """How many of them are part of another's product (`MergeLinear`): keys' projection down of queries', up of gate, if
    one of the two, or both, have whole blocks of rows."""
    if not kind.endswith("_layer"):
        return 0
    queries = config.q_lora_rank or config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    shared = config.n_shared_experts * config.moe_intermediate_size
    width = shared if kind == "moe_layer" else config.intermediate_size
    return (queries % TILE == 0 or config.latent_dim % TILE == 0) + (width > 0 and width % TILE == 0)


def fp8_products(config: ModelConfig, kind: str, mode: Mode) -> int:
    """FP8 GEMMs of a module: fprop, and in training dgrad and wgrad. Decoding over V3's latent has none of kv_b_proj,
    which `AbsorbAttention` turns into two products of its own."""
    absorbed = (
        bool(mode.cached) and kind.endswith("_layer") and (config.kv_lora_rank, config.latent_dim) == (RANK, LATENT)
    )
    return (fp8_linears(config, kind) - merged_linears(config, kind)) * (3 if mode.training else 1) - absorbed


def check_artifact(folder: str | Path) -> dict[str, Any]:
    """What was checked, JSON-ready.

    Raises:
        ArtifactError: no artifact, a file missing or changed, other versions or sources than these (stale), or a graph
            that violates its level's specification; the message names the file and the reason.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            _refuse(path, "a file inside the artifact", "a path out of it")
        if not path.is_file():
            _refuse(path, "a file, as the manifest says", "none")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            _refuse(path, "the content the manifest has the hash of", "another")
    _check_state(folder, manifest)
    return {
        "artifact": str(folder),
        "target": manifest["target"],
        "precision": manifest["precision"],
        "files": len(manifest["files"]),
        "fp8_products": _check_units(folder, manifest),
        "kernels": _check_kernels(folder, manifest),
    }


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        _refuse(path, "an artifact's manifest", "none")
    except OSError as error:
        _refuse(path, "a readable file", str(error.strerror))
    except ValueError as error:
        _refuse(path, "JSON", str(error))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        _refuse(path, f"format {FORMAT}", repr(found))
    keys = ("target", "target_fingerprint", "precision", "recipe", "passes", "units", "files", "cache_key", *state())
    missing = [key for key in keys if key not in manifest]
    if missing or not {"config.json", "report.json", "report.txt"} <= manifest["files"].keys():
        _refuse(path, "a complete manifest", f"none of {', '.join(missing) or 'config.json and the reports'}")
    return manifest


def _check_state(folder: Path, manifest: dict[str, Any]) -> None:
    now = state()
    for name, version in now["versions"].items():
        made = manifest["versions"].get(name)
        if made != version:
            _refuse(folder, f"{name} {made}, which made it", f"{name} {version}; it is stale", "compile it again")
    if manifest["source_fingerprint"] != now["source_fingerprint"]:
        _refuse(folder, "the dsv3c sources that made it", "changed ones; it is stale", "compile it again")
    if manifest["target_fingerprint"] != targets.fingerprint(manifest["target"]):
        _refuse(
            folder, f"the data of target {manifest['target']} that made it", "others; it is stale", "compile it again"
        )
    if manifest["cache_key"] != cache_key(manifest):
        _refuse(folder / MANIFEST, "a cache_key that follows from its entries", "another", "compile it again")


def _check_units(folder: Path, manifest: dict[str, Any]) -> dict[str, int]:
    """Number of FP8 products, by unit."""
    try:
        config = ModelConfig.from_folder(folder)
    except ConfigError as error:
        raise ArtifactError(str(error)) from None
    expected = {(kind, mode.name) for kind in kinds(config) for mode in MODES}
    found = {(unit["kind"], unit["mode"]["name"]) for unit in manifest["units"].values()}
    if found != expected:
        _refuse(folder / MANIFEST, f"{len(expected)} units, each kind of module in each mode", str(len(found)))
    reasons = _reasons(folder)
    products = {}
    for name, unit in manifest["units"].items():
        mode = Mode(**unit["mode"])
        has_backward = mode.training and unit["kind"] != "rotary"  # angles have no gradient
        for level in LEVELS if has_backward else LEVELS[:-1]:
            file = f"graphs/{name}/{level}.txt"
            if file not in manifest["files"]:
                _refuse(folder / file, "a graph, as for every unit", "none")
            lines = parse(folder / file)
            _check_level(folder / file, level, lines, reasons[name], fp8=manifest["precision"] == "fp8")
            if level == "L1":
                products[name] = sum(bool(_FP8_PRODUCT.fullmatch(line.operator)) for line in lines)
                analytic = fp8_products(config, unit["kind"], mode)
                analytic = analytic if manifest["precision"] == "fp8" else 0
                if products[name] != analytic:
                    _refuse(folder / file, f"{analytic} FP8 products, as many as its linears have", str(products[name]))
    return products


@dataclass(frozen=True)
class Line:
    """One node of a canonical graph text (dsv3c.passes.text)."""

    operator: str
    type: str
    region: str | None  # "path (kind)"
    kind: str | None


def parse(path: Path) -> list[Line]:
    """The graph in the file `path`: nodes that use what is above them, and one output. Raises ArtifactError."""
    lines = []
    texts = path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(texts):
        match = _LINE.fullmatch(text)
        where = f"{path}:{number + 1}"
        if match is None or int(match[1]) != number:
            _refuse(where, f"a node %{number} = operator(…)", repr(text[:60]))
        if any(int(used) >= number for used in re.findall(r"%(\d+)", match[3])):
            _refuse(where, "a node that uses what is above it", repr(text[:60]))
        region = f"{match[5]} ({match[6]})" if match[5] else None
        lines.append(Line(match[2], match[4] or "", region, match[6]))
    operators = Counter(line.operator for line in lines)
    if not lines or lines[-1].operator != "output" or operators["output"] != 1:
        _refuse(path, "one output, at the end", f"{operators['output']} in {len(lines)} lines")
    return lines


def _check_level(path: Path, level: str, lines: list[Line], reasons: set[str], *, fp8: bool) -> None:
    """What may stand in a graph of `level`.

    L0: torch functions, no aten. L1, L2: aten, prims and dsv3c operators, functions of tensors no more; with FP8 no
    BF16 product in the region of a linear or of the experts, unless a pass gave a reason. Everywhere: no attention
    that could be taken apart, unless a pass gave a reason.
    """
    for number, line in enumerate(lines):
        where = f"{path}:{number + 1}"
        if level == "L0" and line.operator.startswith(("aten.", "prims.")):
            _refuse(where, "torch functions", line.operator)
        function = "." not in line.operator and line.operator not in ("placeholder", "output", "getitem")
        if level != "L0" and function and "[" in line.type:
            _refuse(where, "operators of aten, prims and dsv3c", line.operator)
        if line.region in reasons:
            continue
        if _ATTENTION in line.operator:
            _refuse(where, "dsv3c.attention", line.operator)
        product = level != "L0" and _PRODUCT.match(line.operator) and line.type.startswith("bfloat16")
        if fp8 and product and line.kind in ("linear", "experts"):
            _refuse(where, "an FP8 product, or a reason in the report", f"{line.operator} in {line.region}")


def _reasons(folder: Path) -> dict[str, set[str]]:
    """By unit: the regions that a pass left alone and said why."""
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return {
            unit["name"]: {site["where"] for step in unit["passes"] for site in step["skipped"] if site["reason"]}
            for unit in report["units"]
        }
    except (ValueError, KeyError, TypeError) as error:
        _refuse(path, "a report", f"{type(error).__name__} {error}")


def _check_kernels(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Names of the cubins, exactly those that the graphs need."""
    if manifest["precision"] != "fp8":
        return []
    graphs = {name: (folder / name).read_bytes() for name in manifest["files"] if name.startswith("graphs/")}
    needed = kernels_of(graphs)
    for name in needed:
        for file in (f"kernels/{name}.cubin", f"kernels/{name}.json"):
            if file not in manifest["files"]:
                _refuse(folder / file, "a kernel that the graphs need", "none")
        if not (folder / f"kernels/{name}.cubin").read_bytes().startswith(b"\x7fELF"):
            _refuse(folder / f"kernels/{name}.cubin", "a cubin", "another file")
    return needed


def _refuse(where: Path | str, expected: str, found: str, hint: str = "compile the artifact again") -> NoReturn:
    raise ArtifactError(f"{where}: expected {expected}, found {found}; {hint}")
