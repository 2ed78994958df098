"""`make demo`: the whole way in a few minutes on a machine without a GPU.

A small model in DeepSeek's checkpoint layout is written, loaded, compiled and compared with its eager self: speed in
exact precision, where a CPU can show it, and the error of FP8, which a CPU emulates.
"""

import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from tabulate import tabulate

import dsv3c
from dsv3c.benchmarks import gate
from dsv3c.benchmarks.timing import interleaved
from dsv3c.checkpoint import inspect

TOKENS = 128
# Two layers, dense and MoE; weights of unit gain, so that the layers matter beside the residual stream.
CONFIG = replace(dsv3c.preset("tiny").with_layers(2), initializer_range=256**-0.5, num_nextn_predict_layers=0)


def main() -> None:
    start = time.perf_counter()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*FP8 is emulated")  # the headings say so
    input_ids = torch.randint(CONFIG.vocab_size, (1, TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        dsv3c.save(dsv3c.DeepseekV3(CONFIG).bfloat16(), path, fp8=True)
        info = inspect(path)
        files = ", ".join(sorted(file.name for file in path.iterdir()))
        title(f"A checkpoint in the real layout: {info.parameters:,} parameters, {info.tensors} tensors; {files}")
        print(tabulate(sorted(info.bytes_by_dtype.items()), headers=["dtype", "bytes"], intfmt=","))
        model, kept = dsv3c.load(path, dtype=torch.float32), dsv3c.load(path, dtype="fp8")

    title("Compiled, exact precision (float32), against eager: speed on this machine, as a ratio")
    exact = dsv3c.compile(model, precision="exact")
    compare(model, exact, "exact", input_ids)
    with torch.no_grad():
        times = interleaved({"eager": lambda: model(input_ids), "compiled": lambda: exact(input_ids)})
    print(f"compiled is {times['eager'].median_us / times['compiled'].median_us:.2f} times as fast as eager "
          f"(medians of {times['eager'].runs} runs in turn, 1 x {TOKENS} tokens)")  # fmt: skip

    title(
        "Compiled, FP8 as DeepSeek-V3 trains with, weights as the checkpoint holds them: error (speed: emulated here)"
    )
    fp8 = dsv3c.compile(kept, precision="fp8", target="h800")
    compare(kept, fp8, "fp8", input_ids)

    title("What the compiler did in FP8, and the times it predicts for an H800")
    print(dsv3c.explain(fp8))
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Next: dsv3c --help")


@torch.no_grad()
def compare(eager: torch.nn.Module, compiled: torch.nn.Module, precision: str, input_ids: torch.Tensor) -> None:
    """Prints the error of each layer beside its bound. Raises SystemExit if one is over it."""
    start = time.perf_counter()
    logits = compiled(input_ids)
    print(f"first call, which compiles: {time.perf_counter() - start:.0f} s")
    checks = gate.check(
        eager, {precision: compiled}, gate.record_calls(eager, lambda: eager(input_ids)), backward=False
    )
    rows = [(c.layer, c.what, c.error, c.eager_error, c.bound) for c in checks[precision]]
    headers = ["layer", "result", "error", "eager's error", "bound"]
    print(tabulate(rows, headers, floatfmt=".1e"))
    print("(distance from the layer in wider precision, over its size; the median token's)")
    same = (logits.argmax(-1) == eager(input_ids).argmax(-1)).float().mean().item()
    print(f"most likely next token: the same as eager's at {same:.0%} of {TOKENS} positions")
    if not all(check.passed for check in checks[precision]):
        raise SystemExit("a layer is farther from its value than its bound")


def title(text: str) -> None:
    print(f"\n== {text}\n")


if __name__ == "__main__":
    main()
