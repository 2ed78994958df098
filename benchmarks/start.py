"""From `dsv3c.compile` to the first synchronised result, in a process of its own, whose caches are empty or warm.

`dsv3c bench --mode start` runs this file: `python -m dsv3c.benchmarks.start JSON FILE`, the arguments of
`first_result`; its result goes to the file, or {"error": what was wrong with them}. Not through a pipe: Inductor's
compile workers hold on to its end, and whoever reads waits for them too.
Modules are imported and weights are there before. The call is that of the mode forward, all tokens in, the last one's
logits out; the result is checked after it, layer by layer.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dsv3c.benchmarks.gate import Check, check, record_calls
from dsv3c.benchmarks.workloads import Workload, build, configured, place
from dsv3c.compiler import compilation_of, compile
from dsv3c.errors import Dsv3cError

ROUNDS = ("cold caches", "warm caches", "warm caches")  # one after the other, with the same caches
LIMIT_S = 300  # of a process
_WANTED = "--mode start: expected a result of a new process"


def starts(**arguments: Any) -> tuple[dict[str, list[float]], dict[str, list[Check]]]:
    """By contender: seconds of each round, and the checks of all. Raises Dsv3cError if a process fails."""
    seconds: dict[str, list[float]] = {name: [] for name in ROUNDS}
    checks: dict[str, list[Check]] = {name: [] for name in ROUNDS}
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in ROUNDS:
            found = _in_a_process(Path(folder), arguments)
            seconds[name].append(found["seconds"])
            checks[name] += [Check(**one) for one in found["checks"]]
    return seconds, checks


def _in_a_process(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    where = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    result = folder / "result.json"
    command = [sys.executable, "-P", "-m", "dsv3c.benchmarks.start", json.dumps(arguments), str(result)]
    try:
        subprocess.run(command, env=os.environ | where, stdout=subprocess.DEVNULL, timeout=LIMIT_S, check=True)
    except subprocess.CalledProcessError as error:
        raise Dsv3cError(f"{_WANTED}, found exit code {error.returncode}; try --mode forward") from None
    except subprocess.TimeoutExpired:
        raise Dsv3cError(f"{_WANTED} in {LIMIT_S} s, found none; try --layers 2") from None
    found = json.loads(result.read_text())
    if "error" in found:
        raise Dsv3cError(found["error"])
    return found


def first_result(
    source: str, layers: int | None, experts: int | None, family: str, batch: int, tokens: int, precision: str
) -> dict[str, Any]:
    """`seconds`, and the gate's `checks` as dicts."""
    device, dtype = place()
    model = build(source, configured(source, layers, experts), family, dtype, device)
    with Workload("forward", family, batch, tokens).prepared(model) as calls:
        next(model.parameters())[0].cpu()  # after which all weights are there
        start = time.perf_counter()
        compiled = compile(model, precision=precision)
        out: Any = calls.run(compiled)
        out.cpu()
        seconds = time.perf_counter() - start
        recorded = record_calls(model, lambda: calls.checked(model))
        resolved = compilation_of(compiled).precision
        checks = check(model, {resolved: compiled}, recorded, backward=False)[resolved]
    return {"seconds": seconds, "checks": [asdict(one) for one in checks]}


if __name__ == "__main__":
    try:
        result = first_result(**json.loads(sys.argv[1]))
    except Dsv3cError as error:
        result = {"error": str(error)}
    Path(sys.argv[2]).write_text(json.dumps(result))
