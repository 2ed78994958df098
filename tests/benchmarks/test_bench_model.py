"""`dsv3c bench`: what it measures, that it refuses to show the speed of something wrong, and what it writes."""

import json
import subprocess
import sys
import warnings
import weakref
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from dsv3c import losses, numerics
from dsv3c.benchmarks import (
    bench_model,
    gate,
    kernel_times,
    parts,
    readme_table,
    record,
    start,
    timing,
    workloads,
)
from dsv3c.benchmarks.bench_model import draw, measure, report
from dsv3c.benchmarks.gate import median_row_distance
from dsv3c.cli import app, main
from dsv3c.config import preset
from dsv3c.errors import Dsv3cError
from dsv3c.kernels.reference import gemms as reference
from dsv3c.main_grad import MainGradOptimizer
from dsv3c.model import DeepseekV3
from dsv3c.numerics import Recipe
from dsv3c.weights import QuantizedWeights


@pytest.fixture
def quick(without_codegen, monkeypatch):
    """No code generation for the baseline either, and few rounds."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: original(model, **({"backend": "eager"} | options)))
    interleaved = timing.interleaved
    monkeypatch.setattr(timing, "interleaved", lambda calls: interleaved(calls, rounds=2))


@pytest.mark.parametrize(
    ("family", "modes", "layers"),
    [("ours", ("forward", "decode"), 1), ("ours", ("backward",), 2), ("hf", ("decode", "moe"), 2)],
)
def test_every_mode_is_checked_and_timed(quick, family, modes, layers, tmp_path):
    """Of a dense layer, or of that and a MoE: each takes seconds to compile, in each mode and precision."""
    if family == "hf":
        pytest.importorskip("transformers", reason="their model: pip install 'dsv3c[hf]'")
    sizes = {"layers": layers, "experts": 4, "tokens": 16}
    document = measure("tiny", modes=modes, family=family, precisions=("exact", "fp8"), **sizes)
    assert (document["layers"], document["experts"]) == (layers, 4)
    assert f"--layers {layers} --experts 4 --tokens 16" in document["command"]
    assert [row["mode"] for row in document["modes"]] == list(modes)
    for row in document["modes"]:
        assert row["passed"]
        assert [c["name"] for c in row["contenders"]] == ["eager", "torch.compile", "dsv3c exact", "dsv3c fp8"]
        eager, _, exact, fp8 = row["contenders"]
        assert eager["speedup_over_eager"] == 1
        assert exact["speedup_over_eager"] == eager["median_us"] / exact["median_us"]
        assert exact["p20_us"] <= exact["median_us"] <= exact["p80_us"]
        # Quantisation errs, and more than summing in another order does: the FP8 model is compared, not exact's.
        assert fp8["worst_check"]["error"] > exact["worst_check"]["bound"]
    assert json.loads(json.dumps(document)) == document
    text = report(document)
    assert " ms" not in text  # of a CPU nobody wants to know
    assert text.count("emulated") == 2 * len(modes) + 1
    draw(document, tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_no_speed_of_a_wrong_model(quick, monkeypatch, tmp_path):
    """The mutant: a GEMM with scales a fifth too large. (The latent hides that: it is normed after its one product.)"""

    def enlarged(x, x_scale_inv, w, w_scale_inv, dtype):
        return reference.gemm_ref(x, x_scale_inv, w, 1.2 * w_scale_inv, dtype)

    x = torch.ops.dsv3c.quantize_tile(torch.randn(2, 2), 1.0, False)
    w = torch.ops.dsv3c.quantize_block(torch.randn(2, 2), 1.0, False)
    before = torch.ops.dsv3c.gemm(*x, *w, torch.float32)
    with replaced("gemm", enlarged):
        monkeypatch.setattr(record, "RESULTS", tmp_path)
        arguments = ["bench", "tiny", "--layers", "1", "--tokens", "16", "--precision", "fp8", "--record", "--json"]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout)["modes"]
    assert not row["passed"]
    assert row["contenders"] == []
    assert [check["what"] for check in row["failed"]] == ["x"]
    assert all(check["error"] > check["bound"] for check in row["failed"])
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.ops.dsv3c.gemm(*x, *w, torch.float32), before)  # the mutant is gone
    assert "wrong" in report(json.loads(result.stdout))


@contextmanager
def replaced(operator, function):
    """An operator with another CPU definition."""
    library = torch.library.Library("dsv3c", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it overrides one
        library.impl(operator, function, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def test_parts_have_rows_of_their_own(quick, monkeypatch, tmp_path):
    fp8, modes = parts._fp8, ("quantize", "main-grad", "deterministic", "cross-entropy", "optimizer")
    assert tuple(parts.PARTS) == modes
    compiled = iter([fp8])  # for the copies; the others' would take its time
    monkeypatch.setattr(parts, "_fp8", lambda model, **_: next(compiled, lambda model: model)(model))
    document = measure("tiny", layers=2, tokens=16, modes=modes)
    assert [row["mode"] for row in document["modes"]] == list(modes)
    assert all(row["passed"] for row in document["modes"])
    found = {row["mode"]: {c["name"]: c for c in row["contenders"]} for row in document["modes"]}
    assert list(found["quantize"]) == ["copy", "dsv3c fp8"]
    assert list(found["main-grad"]) == ["dsv3c fp8", "dsv3c fp8, main_grad"]
    assert list(found["deterministic"]) == ["dsv3c fp8", "dsv3c fp8, deterministic"]
    assert list(found["cross-entropy"]) == ["eager", "torch.compile", "dsv3c"]
    assert found["cross-entropy"]["eager"]["speedup_over_eager"] == 1
    assert found["quantize"]["copy"]["speedup_over_eager"] is None
    assert all(c["first_call_s"] is None for row in document["modes"] for c in row["contenders"])
    layer = list(DeepseekV3(preset("tiny").with_layers(2)).model.layers[-1].parameters())
    values = sum(p.numel() for p in layer if p.dim() > 1) - 16 * 256  # the gate's stay as they are
    scales = 2 * 4 * values / 128**2  # a little more: blocks at the ends are ragged
    assert 0 <= found["quantize"]["dsv3c fp8"]["moved_bytes"] - (4 + 2) * values - scales < scales
    assert found["optimizer"]["AdamW"]["moved_bytes"] == 28 * sum(p.numel() for p in layer)
    assert json.loads(json.dumps(document)) == document
    assert "float32 weights" in report(document)
    draw(document, tmp_path / "times.png")


@pytest.mark.parametrize("experts", [(), (3,)])
def test_wrong_copies_are_counted(experts):
    weights, stack = QuantizedWeights(Recipe()), [torch.randn(*experts, 256, 384) for _ in range(1 if experts else 2)]
    copies = weights.quantize([stack], training=True)
    assert parts._share_of_wrong(stack, copies, weights) == 0
    wrong = [copies[0], copies[1].roll(1, -1), *copies[2:]]  # each block another's scale
    share = copies[1].numel() / sum(copy.numel() for copy in copies)
    assert parts._share_of_wrong(stack, wrong, weights) == share


def _not_written(self):
    for weight, parameter in zip(self.weights, self.parameters, strict=True):
        weight.grad = parameter.main_grad
    self.optimizer.step()


def _added(alpha, embedding_only):
    """A hook that adds so many times the gradient, or does so in the embedding alone."""

    def add(parameter):
        mutated = not embedding_only or len(parameter) == preset("tiny").vocab_size
        parameter.main_grad.add_(parameter.grad, alpha=alpha if mutated else 1)
        parameter.grad = None

    return add


def _not_summed(parameter):
    parameter.main_grad.copy_(parameter.grad)
    parameter.grad = None


def _never_the_same(model, ids, arguments):
    return model(ids, **arguments).square().mean() * torch.rand(())


@pytest.mark.parametrize(
    ("mode", "target", "mutant"),
    [
        ("main-grad", "dsv3c.main_grad._add", _added(2, False)),
        ("main-grad", "dsv3c.main_grad._add", _added(2, True)),
        ("main-grad", "dsv3c.main_grad._add", _added(0, True)),
        ("main-grad", "dsv3c.main_grad._add", _not_summed),
        ("deterministic", "dsv3c.benchmarks.workloads._loss", _never_the_same),
        ("cross-entropy", "dsv3c.benchmarks.parts.cross_entropy", lambda *a: losses.cross_entropy(*a) * 1.001),
        ("optimizer", "dsv3c.main_grad.MainGradOptimizer.step", _not_written),
        ("optimizer", "dsv3c.main_grad.MainGradOptimizer.step", lambda self: None),
    ],
)
def test_no_speed_of_a_wrong_part(quick, monkeypatch, mode, target, mutant):
    monkeypatch.setattr(target, mutant)
    monkeypatch.setattr(parts, "_fp8", lambda model, **_: model)  # which takes its time
    (row,) = measure("tiny", layers=2, tokens=16, modes=(mode,))["modes"]
    assert not row["passed"]
    assert row["contenders"] == []


def test_wrong_steps_are_counted():
    make = partial(torch.optim.AdamW, lr=1e-4)
    model = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    before = model.weight.detach().clone()
    main = MainGradOptimizer(model, make)
    model.weight.main_grad.normal_()
    main.step()
    wrong = partial(parts._share_of_wrong_steps, make, before)
    (weight,), parameter = main.weights, model.weight
    assert wrong(weight, parameter) == 0
    nearly = weight.clone()
    nearly[0] *= 1 + 2**-20  # less than bfloat16 shows
    assert wrong(nearly, parameter) == 1 / 8
    parameter.detach()[0] *= 2
    assert wrong(weight, parameter) == 1 / 8


@pytest.mark.parametrize("family", bench_model.FAMILIES)
def test_zipf_routing(family):
    if family == "hf":
        pytest.importorskip("transformers", reason="their model: pip install 'dsv3c[hf]'")
    config = workloads.configured("tiny", 2, 4)
    model = workloads.build("tiny", config, family, torch.float32, torch.device("cpu"))
    sizes = workloads.skew_routing(model, 1, 100)
    assert sum(sizes) == 400
    assert sizes == [193, 96, 48, 63]  # 1, 1/2, 1/4, 1/3, rounded down, the rest to the first
    experts, seen = workloads.moe_of(model).experts, []
    experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    x, weights = torch.randn(100, 256), torch.rand(100, 4)
    order = torch.stack([torch.randperm(4) for _ in range(100)])
    out = experts(x, torch.arange(4).expand(100, 4), weights)
    assert torch.equal(seen[0].flatten().bincount(), torch.tensor(sizes))
    # A router may list its experts in any order.
    again = experts(x, order, weights.gather(1, order))
    assert numerics.distance(again, out)[0] <= numerics.experts_rms(256, 128, torch.float32)


def test_zipf_routing_is_the_same_for_all_sequences():
    """The oracle of forward is called with one after another."""
    model = workloads.build("tiny", workloads.configured("tiny", 2, 4), "ours", torch.float32, torch.device("cpu"))
    assert workloads.skew_routing(model, 3, 16) == [3 * 32, 3 * 15, 3 * 7, 3 * 10]
    with workloads.Workload("forward", "ours", 3, 16).prepared(model) as calls:
        (_, _), (path, call) = gate.record_calls(model, lambda: calls.checked(model)).items()
    layer = model.get_submodule(path)
    one_by_one, together = (gate._oracle(layer, call, backward)["x"] for backward in (False, True))
    eager = numerics.distance(gate._results(layer, call, False)["x"], together)[0]
    assert numerics.distance(one_by_one, together)[0] <= numerics.float64_agreement(eager)


def test_zipf_routing_is_the_same_for_all_contenders(quick):
    arguments = {"layers": 2, "experts": 4, "tokens": 16, "precisions": ("fp8",), "routing": "zipf"}
    document = measure("tiny", modes=("moe",), **arguments)
    (row,) = document["modes"]
    assert row["passed"]
    assert document["rows_per_expert"] == [32, 15, 7, 10]
    assert "--routing zipf" in document["command"]
    assert "32, 15, 7, 10 rows an expert" in report(document)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_qqtst_128x128_128x6_2x1_v_bz_coopA_algo2_Ablk128_Bvec128_TNN", "gemm"),
        ("_warp_specialized_gemm_kernel", "gemm"),
        ("_wgrad_specialized_kernel", "gemm"),
        ("_add_splits_kernel", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, float, float, false>", "gemm"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::Gemm", "gemm"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x32x8_stage3", "gemm"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "gemm"),
        ("triton_tem_fused_mm_3", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x192", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*", "attention"),
        ("mla_decode_kernel", "attention"),
        ("_combine_kernel", "attention"),
        ("_cast_heads_kernel", "other"),
        ("_gate_kernel", "other"),
        ("_retile_kernel", "other"),
        ("triton_poi_fused__unsafe_view_attention_cat_mm_0", "other"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::FillFunctor<c10::BFloat16>", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kernel_times.kind(name) == kind


def test_kernel_times_add_up_to_the_span():
    kernels = [("nvjet", 12.0, 20.0), ("_norm_kernel", 10.0, 11.0), ("flash_fwd", 18.0, 25.0), ("Memset", 19.0, 21.0)]
    found = kernel_times._summary(kernels)
    assert found == kernel_times.KernelTimes(gemm_us=8, attention_us=5, other_us=1, idle_us=1)
    assert found.total_us == 25 - 10
    assert kernel_times.kernel_times(lambda: None) is None  # no GPU


def test_kernel_times_of_a_round_without_kernels(monkeypatch):
    rounds = iter([[("nvjet", 1.0, 2.0)], [], [("nvjet", 1.0, 2.0)]])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel_times, "_kernels", lambda call: next(rounds))
    assert kernel_times.kernel_times(lambda: None) is None


def test_starts_are_processes_with_caches_of_their_own(quick, monkeypatch):
    folders, subprocess_run = [], subprocess.run

    def run(command, *, env, **options):
        if command[0] != sys.executable:
            return subprocess_run(command, env=env, **options)
        assert command[1:4] == ["-P", "-m", "dsv3c.benchmarks.start"]
        caches = [Path(env[name]) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
        assert caches[0] != caches[1]
        assert caches[0].parent == caches[1].parent
        assert caches[0].exists() == bool(folders)  # cold, then warm
        caches[0].mkdir(exist_ok=True)
        folders.append(caches[0])
        *_, arguments, result = command
        Path(result).write_text(json.dumps(first_result(arguments) | {"seconds": len(folders)}))

    @cache
    def first_result(arguments):
        return start.first_result(**json.loads(arguments))

    monkeypatch.setattr(start.subprocess, "run", run)
    (row,) = measure("tiny", layers=1, tokens=16, modes=("start",), precisions=("exact",))["modes"]
    assert row["passed"]
    assert [c["name"] for c in row["contenders"]] == ["cold caches", "warm caches"]
    assert [(c["runs"], c["median_us"] / 1e6) for c in row["contenders"]] == [(1, 1), (2, 2.5)]
    assert len(folders) == 3
    assert not any(folder.exists() for folder in folders)


def test_no_speed_of_a_wrong_start(monkeypatch):
    """The mutant: the first cold start alone is wrong."""
    errors = iter([1.0])

    def result(folder, arguments):
        return {"seconds": 1.0, "checks": [gate.Check("layer", "x", next(errors, 0.0), 0.0, 0.5).__dict__]}

    monkeypatch.setattr(start, "_in_a_process", result)
    (row,) = measure("tiny", modes=("start",))["modes"]
    assert not row["passed"]
    assert [(found["contender"], found["error"]) for found in row["failed"]] == [("cold caches", 1.0)]


def test_a_start_that_cannot_be(monkeypatch, capfd):
    """A real process's error is one line of the one that started it, exit code 2."""
    monkeypatch.setattr(sys, "argv", ["dsv3c", "bench", "v3-671b", "--mode", "start"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    out, err = capfd.readouterr()  # the process's own, too
    assert out == ""
    line = err.removeprefix("start: in processes of their own\n")
    assert line.startswith("dsv3c: v3-671b: expected ")
    assert line.endswith("; try --layers 2\n")
    assert line.count("\n") == 1


def test_a_start_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(start.sys, "executable", "false")
    with pytest.raises(Dsv3cError, match="--mode start: expected a result of a new process, found exit code 1"):
        start._in_a_process(tmp_path, {})


def test_an_oracle_has_room_beside_256_experts(monkeypatch):
    """Of a bfloat16 model, on transformers' side: no gradient of all experts for each of them."""
    pytest.importorskip("transformers", reason="their model: pip install 'dsv3c[hf]'")
    config = workloads.configured("tiny", 2, 64)
    model = workloads.build("tiny", config, "hf", torch.bfloat16, torch.device("cpu"))
    wide = 4 * sum(p.numel() for p in workloads.moe_of(model).parameters())
    with workloads.Workload("backward", "hf", 1, 16).prepared(model) as calls:
        (_, _), moe = gate.record_calls(model, lambda: calls.checked(model)).items()
    monkeypatch.setattr(gate, "CHUNK", 1 << 16)
    peak = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    live[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
            peak = max(peak, sum(live.values()))
            return out

    live = weakref.WeakKeyDictionary()
    with Watch():
        gate.check(model, {}, dict([moe]), backward=True)
    assert wide < peak < 3 * wide


def test_median_row_distance(monkeypatch):
    monkeypatch.setattr("dsv3c.benchmarks.gate.CHUNK", 64)  # several pieces
    out, ref = torch.randn(5, 7, 16), torch.randn(5, 7, 16, dtype=torch.float64)
    rows = (out.double() - ref).square().mean(-1).sqrt().flatten()
    expected = rows.sort().values[(len(rows) - 1) // 2] / ref.square().mean().sqrt()
    assert f"{median_row_distance(out, ref):.6g}" == f"{float(expected):.6g}"
    assert median_row_distance(ref, ref) == 0
    zeros = torch.zeros(5, 100, 16)  # most rows, of both
    assert median_row_distance(torch.cat((2 * out, zeros), 1), torch.cat((out, zeros), 1)) > 0
    assert not median_row_distance(torch.full_like(out, torch.nan), ref) <= 1


def test_contenders_take_turns(monkeypatch):
    ticks, calls = iter(range(10**6)), []
    monkeypatch.setattr(timing, "_cpu_us", lambda call: call() or next(ticks))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    times = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=5)
    assert "".join(calls) == "abbaabbaab"
    assert times["a"] == timing.Timing(4.0, 2.4, 7.2, 5, None)


def test_recorded_rows_make_the_readme_table(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    row = {
        "benchmark": "model", "source": "v3-671b", "family": "ours", "layers": 2, "tokens": 4096, "batch": 1,
        "mode": "forward", "contenders": [
            {"name": "eager", "median_us": 30000.0, "p20_us": 29000.0, "p80_us": 31000.0, "speedup_over_eager": 1.0,
             "speedup_over_torch_compile": 0.9, "worst_check": None},
        ],
        "environment": {"machine": "NVIDIA H200", "power_limit_w": 700.0, "torch": "2.11.0", "date": "2026-11-21T20:00",
                        "commit": "abc", "source": "def"},
    }  # fmt: skip
    newer = row | {"contenders": [row["contenders"][0] | {"median_us": 28000.0}]}
    path = record.append([row, newer])
    assert path.name == "nvidia-h200.jsonl"
    table = readme_table.table(record.read())
    assert "28.00 (29.00-31.00)" in table
    assert "30.00" not in table
    kernels = {"gemm_us": 60.0, "attention_us": 20.0, "other_us": 15.0, "idle_us": 5.0}
    part = {"name": "copy", "median_us": 1000.0, "p20_us": 1000.0, "p80_us": 1000.0, "speedup_over_eager": None,
            "speedup_over_torch_compile": None, "worst_check": None, "moved_bytes": 4 * 10**9, "saved_bytes": 10**9,
            "kernels": kernels}  # fmt: skip
    record.append([row | {"mode": "moe", "routing": routing, "contenders": [part]} for routing in ("router", "zipf")])
    record.append([row | {"mode": "quantize", "contenders": [part]}])
    table = readme_table.table(record.read())
    assert "quantize" not in table
    (line,) = (line for line in table.splitlines() if "moe" in line)
    assert [cell.strip() for cell in line.split("|")[4:8]] == ["", "", "1.00", "20% (5%)"]
    assert "28.00 (29.00-31.00)" in table
    readme = f"before\n{readme_table.BEGIN}old\n{readme_table.END}\nafter\n"
    assert readme_table.updated(readme) == f"before\n{readme_table.BEGIN}{table}\n{readme_table.END}\nafter\n"


def test_environment_says_what_and_where():
    found = record.environment("cpu")
    assert found["torch"] == torch.__version__
    assert found["machine"].startswith("cpu")
    assert len(found["source"]) == 12
