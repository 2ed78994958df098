"""What a measurement is worth: where, with what and of which source it was taken; and the files that keep it.

`results/<machine>.jsonl` holds one measurement a line, appended, never edited; the newest of its kind counts.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsv3c import __version__

RESULTS = Path(__file__).parent / "results"


def environment(device: str) -> dict[str, Any]:
    """Machine, versions, commit and date. `source` is a fingerprint of dsv3c's own files, edited ones included."""
    import torch

    from dsv3c.backend import source_fingerprint

    found: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"cpu {platform.machine()}",
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "dsv3c": __version__,
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
        "commit": _output(
            "git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"
        ),
        "source": source_fingerprint()[:12],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        query = "--query-gpu=driver_version,power.limit"
        line = _output("nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={torch.cuda.current_device()}")
        driver, _, watts = (line or "").partition(", ")
        found |= {"driver": driver or None, "power_limit_w": float(watts) if watts else None}
    return found


def append(rows: list[dict[str, Any]]) -> Path:
    """Adds `rows`, all of one machine, to its file."""
    machine = rows[0]["environment"]["machine"]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine.lower().replace(' ', '-')}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read() -> list[dict[str, Any]]:
    """All measurements, oldest first within a file."""
    lines = (line for path in sorted(RESULTS.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines())
    return [json.loads(line) for line in lines]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
