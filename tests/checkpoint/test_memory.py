"""A load's peak of host memory: the model, and one tensor."""

import json
import os
import subprocess
import sys

import pytest

# Large enough to show a second copy of anything but a single expert, in seconds.
SIZES = {
    "hidden_size": 1024, "moe_intermediate_size": 512, "intermediate_size": 1024, "n_routed_experts": 32,
    "vocab_size": 2048, "num_nextn_predict_layers": 0,
}  # fmt: skip
LARGEST_TENSOR = 2048 * 1024 * 2
# The float32 temporaries of casting 2^20 values, Python objects, and pages mapped ahead.
SLACK = 24 * 2**20
SCRIPT = """
import json, re, sys
import torch, dsv3c
large, small = sys.argv[1:]

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

found = []
for dtype in (torch.bfloat16, "fp8"):
    dsv3c.load(small, dtype=dtype)  # what stays: imports, operators
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = status("VmRSS")
    model = dsv3c.load(large, dtype=dtype)
    found.append((status("VmHWM") - before, sum(t.nbytes for t in (*model.parameters(), *model.buffers()))))
    del model
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to measure a peak")
@pytest.mark.parametrize("name", ["v3", "tied"])
def test_peak(make, name):
    """FP8 and BF16 files of 110 and 220 MB, each loaded as BF16 and as FP8."""
    folders = make(name, **SIZES).folder, make(name, num_nextn_predict_layers=0).folder
    command = [sys.executable, "-c", SCRIPT, *map(str, folders)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    for peak, model_bytes in json.loads(out):
        assert peak < model_bytes + LARGEST_TENSOR + SLACK
        assert peak > model_bytes - SLACK  # or it was not measured
        assert model_bytes > 4 * SLACK
