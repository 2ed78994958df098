"""README's table of measured times, made of the newest row of each kind in benchmarks/results: `make readme`."""

from pathlib import Path
from typing import Any

from tabulate import tabulate

from dsv3c.benchmarks.bench_model import WORKLOADS
from dsv3c.benchmarks.bench_report import more
from dsv3c.benchmarks.record import read

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- begin: made by benchmarks/readme_table.py -->\n", "<!-- end -->"
KIND = ("source", "family", "layers", "experts", "tokens", "batch", "mode")
ALL_EXPERTS = {"v3-671b": 256}  # of rows that do not say
SHOWN = ("saved GB", "outside products (idle)")


def updated(readme: str) -> str:
    """`readme` with the table between its two marks made anew."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: expected the marks {BEGIN.strip()} and {END}, found one of them missing")
    return f"{before}{BEGIN}{table(read())}\n{END}{after}"


def table(rows: list[dict[str, Any]]) -> str:
    """One line a contender, in Markdown; the newest of the rows that measure the same on the same machine. Parts of a
    step, starts and other routings stay in the results."""
    rows = [{"experts": ALL_EXPERTS.get(row["source"])} | row for row in rows if _is_shown(row)]
    if not rows:
        return "Nothing recorded yet."
    newest = {(row["environment"]["machine"], *(row[key] for key in KIND)): row for row in rows}
    lines = []
    for row in newest.values():
        where = row["environment"]
        what = f"{row['source']} ({row['family']}), {row['layers']} layers, {row['experts']} experts, {row['mode']}, "
        what += f"{row['batch']} x {row['tokens']}"
        taken = f"{where['machine']}, {where.get('power_limit_w') or 0:.0f} W, torch {where['torch']}, "
        taken += f"transformers {where['transformers']}, " if row["family"] == "hf" else ""
        taken += f"{where['date'][:10]}, " + (f"commit {c}" if (c := where["commit"]) else f"source {where['source']}")
        for contender in row["contenders"]:
            middle, low, high = (contender[key] / 1e3 for key in ("median_us", "p20_us", "p80_us"))
            worst = contender["worst_check"]
            beside = {column: text for column, text in more(contender).items() if column in SHOWN}
            lines.append(
                {
                    "what": what,
                    "contender": contender["name"],
                    "ms (p20-p80)": f"{middle:.2f} ({low:.2f}-{high:.2f})",
                    "x eager": _ratio(contender["speedup_over_eager"]),
                    "x torch.compile": _ratio(contender["speedup_over_torch_compile"]),
                    **dict.fromkeys(SHOWN, ""),
                    **beside,
                    "error (bound)": f"{worst['error']:.1e} ({worst['bound']:.1e})" if worst else "",
                    "taken": taken,
                }
            )
            what = taken = ""  # once for all contenders
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def _is_shown(row: dict[str, Any]) -> bool:
    whole = row.get("benchmark") == "model" and row["mode"] in WORKLOADS
    return whole and row.get("routing", "router") == "router"


def _ratio(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
