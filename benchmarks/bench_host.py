"""What a call costs the host: of an operator, and of a forward of one dense and one MoE layer of V3's sizes.

    python -m dsv3c.benchmarks.bench_host [--tokens 4096]

Contenders: `triton`, each launcher asked and each launch through Triton; `launch`, launches through kernels/launch.py;
`replay`, calls through kernels/replay.py besides; `direct`, units past Dynamo besides, with what they begin with
started first, which is how it is (the others pay for looking each call up as a new one). Of the forward also a CUDA
graph, which hardly needs the host. First the contenders' results are compared, bit for bit. An operator's numbers are
microseconds of the host for a call among others of its kind; a forward's are milliseconds on a GPU that is idle before,
and of the host.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import dsv3c
from dsv3c import capture
from dsv3c.benchmarks import command_line
from dsv3c.benchmarks.timing import Timing, interleaved, replayed, summary
from dsv3c.config import preset
from dsv3c.kernels import launch
from dsv3c.kernels.replay import Replay
from dsv3c.model import DeepseekV3

CONTENDERS = ("triton", "launch", "replay", "direct")
CAST = 1e-12, False  # amax_floor, pow2


class Switch:
    """Which contender the next calls are."""

    def __init__(self) -> None:
        self.now = "direct"
        classes: tuple[Any, Any] = Replay, launch._Launcher
        replay, launcher = (cls.__call__ for cls in classes)

        def call(operator, *args):
            return replay(operator, *args) if self.now in ("replay", "direct") else operator._call(None, args, [])

        def run(kernel, *args, grid, warmup, **options):
            if self.now != "triton":
                return launcher(kernel, *args, grid=grid, warmup=warmup, **options)
            full = (arg.full() if isinstance(arg, launch.Descriptor) else arg for arg in args)
            return kernel.first(*full, grid=grid, warmup=warmup, **options)

        signature = capture.signature
        classes[0].__call__, classes[1].__call__ = call, run
        capture.signature = lambda *call: signature(*call) if self.now == "direct" else (object(),)  # new each time

    def contenders(self, call: Callable) -> dict[str, Callable]:
        def as_one(name: str) -> Callable:
            def contender():
                self.now = name
                return call()

            return contender

        return {name: as_one(name) for name in CONTENDERS}


def operators(rows: int = 256) -> dict[str, Callable]:
    """Calls of operators that take the GPU less time than the host."""
    ops = torch.ops.dsv3c
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x, weight, h = torch.randn(rows, 1024, **options), torch.ones(1024, **options), torch.randn(rows, 2048, **options)
    q = ops.quantize_tile.default(x, *CAST)
    wide, narrow = (ops.quantize_block.default(torch.randn(n, 1024, **options), *CAST) for n in (2048, 2056))
    return {
        "quantize_tile": lambda: ops.quantize_tile.default(x, *CAST),
        "rms_norm_quantize": lambda: ops.rms_norm_quantize.default(x, weight, 1e-6, *CAST),
        "swiglu_quantize": lambda: ops.swiglu_quantize.default(h, None, *CAST),
        "gemm, cuBLASLt's": lambda: ops.gemm.default(*q, *wide, torch.bfloat16),
        "gemm, ours": lambda: ops.gemm.default(*q, *narrow, torch.bfloat16),
    }


def host_us(contenders: dict[str, Callable], batches: int = 15, calls: int = 40) -> dict[str, Timing]:
    """Of a call, in each batch; the contenders in turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(batches):
        for name, call in contenders.items():
            call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return {name: summary(us) for name, us in times.items()}


def forward_of(tokens: int) -> Callable[[], torch.Tensor]:
    """Two layers of a GPU's share at EP32, without the head."""
    config = preset("v3-671b").with_layers(2).with_experts(8)
    with torch.device("meta"):
        model: Any = DeepseekV3(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda")
    model.init_weights()
    model.lm_head = torch.nn.Identity()
    compiled = dsv3c.compile(model.eval(), precision="fp8")
    ids = torch.randint(config.vocab_size, (1, tokens), device="cuda")
    return torch.no_grad()(lambda: compiled(ids))


def check(contenders: dict[str, Callable]) -> None:
    """The same bits, on other memory too."""
    expected = contenders["triton"]()
    for name in ("launch", "replay", "replay", "replay", "direct", "direct"):
        elsewhere = torch.empty(1 << 20, device="cuda")
        found = contenders[name]()
        for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (expected, found)), strict=True):
            a, b = (x.contiguous().view(torch.uint8) for x in (a, b))
            assert torch.equal(a, b), f"{name} differs"
        del elsewhere


def row(name: str, t: Timing, unit_us: float = 1) -> str:
    return f"  {name:8} {t.median_us / unit_us:8.2f}  ({t.p20_us / unit_us:.2f}-{t.p80_us / unit_us:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=command_line.at_least_one, default=4096)
    parser.add_argument("--rounds", type=command_line.at_least_one, default=30)
    args = parser.parse_args()
    command_line.need_gpu(parser)
    torch.manual_seed(0)
    switch = Switch()
    for name, call in operators().items():
        contenders = switch.contenders(call)
        check(contenders)
        print(f"{name}, host us a call", *(row(*item) for item in host_us(contenders).items()), sep="\n", flush=True)
    forward = forward_of(args.tokens)
    contenders = switch.contenders(forward)
    check(contenders)
    host = host_us(contenders, batches=args.rounds, calls=1)
    print("forward, host us", *(row(*item) for item in host.items()), sep="\n", flush=True)
    switch.now = "direct"
    timings = interleaved(contenders | {"graph": replayed(forward)}, rounds=args.rounds)
    print(f"forward of {args.tokens} tokens, ms", *(row(*item, 1e3) for item in timings.items()), sep="\n")


if __name__ == "__main__":
    main()
