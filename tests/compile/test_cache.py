"""With Inductor's code generation: right results, a warm start in a second process, a miss when a source changed."""

import json
import os
import subprocess
import sys

PROGRAM = """
import copy, json, sys, warnings
import torch
from torch._dynamo.utils import counters
import dsv3c
from dsv3c import backend
from dsv3c.numerics import distance
from dataclasses import replace

warnings.simplefilter("ignore")
torch.manual_seed(0)
config = replace(dsv3c.preset("tiny"), num_hidden_layers=1, first_k_dense_replace=1, vocab_size=64)
model, tokens = dsv3c.DeepseekV3(config).eval(), torch.arange(12)[None]
with torch.no_grad():
    eager = model(tokens)
    exact = copy.deepcopy(model).double()(tokens)
for precision, source in json.loads(sys.argv[1]):
    counters.clear()
    if source:
        backend.source_fingerprint = lambda: source
    with torch.no_grad():
        out = dsv3c.compile(model, precision=precision)(tokens)
    print(json.dumps({
        "hits": counters["inductor"]["fxgraph_cache_hit"], "misses": counters["inductor"]["fxgraph_cache_miss"],
        "autograd_hits": counters["aot_autograd"]["autograd_cache_hit"],
        "distance": distance(out, exact), "eager": distance(eager, exact),
    }))
"""


def run(folder, *compilations) -> list[dict]:
    """Precisions, and names of other sources than there are, in one process."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(compilations)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()[-len(compilations) :]]


def test_generated_code_and_the_compile_cache(tmp_path):
    from dsv3c.numerics import MODEL_DISTANCE

    exact, cold = run(tmp_path, ("exact", ""), ("fp8", ""))
    assert all(ours <= MODEL_DISTANCE * eager for ours, eager in zip(exact["distance"], exact["eager"], strict=True))
    assert (cold["hits"], cold["misses"]) == (0, 4)  # rotary angles, layer, final norm, head
    warm, changed = run(tmp_path, ("fp8", ""), ("fp8", "another source"))
    assert (warm["hits"], warm["misses"], warm["autograd_hits"]) == (4, 0, 4)
    assert warm["distance"] == cold["distance"]
    assert (changed["hits"], changed["misses"]) == (0, 4)
