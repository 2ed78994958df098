"""With Inductor's code generation: right results, a warm start in a second process, a miss when a source changed."""

import json
import os
import subprocess
import sys

PROGRAM = """
import json, sys, warnings
import torch
from torch._dynamo.utils import counters
import dsv3c
from dsv3c import backend
from dataclasses import replace

source = sys.argv[1]
if source:
    backend.source_fingerprint = lambda: source
torch.manual_seed(0)
config = replace(dsv3c.preset("tiny"), num_hidden_layers=1, first_k_dense_replace=1, vocab_size=64)
model = dsv3c.DeepseekV3(config).eval()
warnings.simplefilter("ignore")
compiled = dsv3c.compile(model, precision=sys.argv[2])
tokens = torch.arange(12)[None]
with torch.no_grad():
    out, eager, exact = compiled(tokens), model(tokens), model.double()(tokens)
from dsv3c.numerics import distance
print(json.dumps({
    "hits": counters["inductor"]["fxgraph_cache_hit"], "misses": counters["inductor"]["fxgraph_cache_miss"],
    "autograd_hits": counters["aot_autograd"]["autograd_cache_hit"],
    "distance": distance(out, exact), "eager": distance(eager, exact),
}))
"""


def run(folder, source="", precision="fp8") -> dict:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", PROGRAM, source, precision]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_generated_code_and_the_compile_cache(tmp_path):
    from dsv3c.numerics import MODEL_DISTANCE

    cold = run(tmp_path, precision="exact")
    assert all(ours <= MODEL_DISTANCE * eager for ours, eager in zip(cold["distance"], cold["eager"], strict=True))
    cold = run(tmp_path)
    assert (cold["hits"], cold["misses"]) == (0, 4)  # rotary angles, layer, final norm, head
    warm = run(tmp_path)
    assert (warm["hits"], warm["misses"], warm["autograd_hits"]) == (4, 0, 4)
    assert warm["distance"] == cold["distance"]
    changed = run(tmp_path, source="another source")
    assert (changed["hits"], changed["misses"]) == (0, 4)
