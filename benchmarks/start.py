"""From `dsv3c.compile` to the first synchronised result, in a process of its own, whose caches are empty or warm.

`dsv3c bench --mode start` runs this file: `python -m dsv3c.benchmarks.start JSON`, the arguments of `first_result`.
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

ROUNDS = 2  # of a cold and a warm start each
LIMIT_S = 600


def starts(**arguments: Any) -> tuple[dict[str, list[float]], list[Check]]:
    """Seconds of each round by contender, and the checks of the last. The second process of a round finds the caches
    of the first. Raises Dsv3cError if one fails."""
    seconds: dict[str, list[float]] = {"cold caches": [], "warm caches": []}
    for _ in range(ROUNDS):
        with TemporaryDirectory() as folder:
            for name in seconds:
                found = _in_a_process(Path(folder), arguments)
                seconds[name].append(found["seconds"])
    return seconds, [Check(**one) for one in found["checks"]]


def _in_a_process(caches: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    where = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    command = [sys.executable, "-P", "-m", "dsv3c.benchmarks.start", json.dumps(arguments)]
    try:
        done = subprocess.run(
            command, env=os.environ | where, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise Dsv3cError(f"--mode start: expected a result of a new process, found {error}") from None
    return json.loads(done.stdout.splitlines()[-1])


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
    print(json.dumps(first_result(**json.loads(sys.argv[1]))))
