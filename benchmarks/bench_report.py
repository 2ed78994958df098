"""What `dsv3c bench` measured, for people: tables and a picture of its JSON document."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsv3c.errors import Dsv3cError
from dsv3c.files import check_writable

EMULATED = "FP8 is emulated on a CPU: its numbers are those of the recipe, its speed means nothing"
RATIOS_ONLY = "on a CPU only the ratios are meaningful, and those of this machine only"
_COLORS = {"eager": "#9aa0a6", "torch.compile": "#5f6368", "dsv3c exact": "#1a73e8", "dsv3c fp8": "#34a853"}


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
    line = {mode: contender["name"]}
    if RATIOS_ONLY not in notes:
        line |= {
            "median ms": f"{contender['median_us'] / 1e3:.3f}",
            "p20-p80 ms": f"{contender['p20_us'] / 1e3:.3f}-{contender['p80_us'] / 1e3:.3f}",
        }
        line |= more(contender)
    for baseline in ("eager", "torch.compile"):
        ratio = contender[f"speedup_over_{baseline.replace('.', '_')}"]
        line[f"x {baseline}"] = "" if ratio is None else "emulated" if _emulated(contender, notes) else f"{ratio:.2f}"
    worst = contender["worst_check"]
    line["worst error (bound)"] = f"{worst['error']:.1e} ({worst['bound']:.1e})" if worst else ""
    return line


def more(contender: dict[str, Any]) -> dict[str, str]:
    """What only some contenders have, by column."""
    gb = {key: contender.get(f"{key}_bytes") for key in ("peak", "saved", "moved")}
    gb = {key: size / 1e9 for key, size in gb.items() if size is not None}
    kernels, first_call_s = contender.get("kernels"), contender.get("first_call_s")
    found = {"memory GB": f"{gb['peak']:.2f}"} if "peak" in gb else {}
    found |= {"saved GB": f"{gb['saved']:.2f}"} if "saved" in gb else {}
    found |= {"first call s": f"{first_call_s:.0f}"} if first_call_s is not None else {}
    found |= {"TB/s": f"{gb['moved'] / contender['median_us'] * 1e3:.2f}"} if "moved" in gb else {}
    if kernels:
        other, idle = (kernels[key] / sum(kernels.values()) for key in ("other_us", "idle_us"))
        found["outside products (idle)"] = f"{other + idle:.0%} ({idle:.0%})"
    return found


def _emulated(contender: dict[str, Any], notes: list[str]) -> bool:
    return EMULATED in notes and contender["name"].startswith("dsv3c fp8")


def check_drawable(path: Path) -> None:
    """Raises Dsv3cError where `draw` could not."""
    if path.suffix != ".png" or path.is_dir() or not path.parent.is_dir():
        raise Dsv3cError(f"--plot: expected a .png in a folder that is there, found {path}; try {path.stem}.png")
    if find_spec("matplotlib") is None:
        raise Dsv3cError("--plot: expected matplotlib, found none; try pip install 'dsv3c[plot]'")
    check_writable("--plot", path)


def draw(document: dict[str, Any], path: Path) -> None:
    """A panel a mode, a bar a contender, whiskers from p20 to p80, times as fast as eager above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = document["modes"]
    figure, axes = pyplot.subplots(1, len(rows), figsize=(4.5 * len(rows), 3.6), squeeze=False, layout="constrained")
    for panel, row in zip(axes[0], rows, strict=True):
        for found in row["contenders"]:
            middle, low, high = (found[key] / 1e3 for key in ("median_us", "p20_us", "p80_us"))
            whiskers = [[middle - low], [high - middle]]
            bar = panel.bar(found["name"], middle, yerr=whiskers, capsize=3, color=_COLORS.get(found["name"]))
            ratio = "" if found["speedup_over_eager"] is None else f"{found['speedup_over_eager']:.2f}x"
            panel.bar_label(bar, ["emulated" if _emulated(found, document["notes"]) else ratio], fontsize=8)
        panel.set(title=row["mode"], ylabel="ms")
        panel.tick_params(axis="x", labelsize=8, rotation=20)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(report(document).partition("\n")[0], fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
