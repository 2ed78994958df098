"""FP8 in a compiled layer: the right GEMMs, each one right, on operands cast from the right tensors."""

import re
from collections import Counter
from itertools import pairwise
from math import sqrt
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3c import backend, compiler
from dsv3c.compiler import compilation_of
from dsv3c.errors import CompileError
from dsv3c.numerics import distance, quantized_gemm_rms, quantized_layer_rms, unit_roundoff
from dsv3c.weights import QuantizedWeights

pytestmark = pytest.mark.usefixtures("without_codegen")

# Of attention q_a_proj with kv_a_proj_with_mqa, q_b_proj, kv_b_proj, o_proj; of an MLP gate with up, and down.
PRODUCTS = 4 + 2


def step(model, logits, batch=1, tokens=40):
    logits(model, torch.randint(0, 256, (batch, tokens))).float().square().mean().backward()


@pytest.mark.parametrize("which", ["ours", "transformers"])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_holds_the_analytic_number_of_gemms(which, training, request, compiled, logits):
    make = request.getfixturevalue("make_model" if which == "ours" else "make_their_model")
    model = compiled(make(torch.bfloat16), "fp8")
    with torch.set_grad_enabled(training):
        logits(model, torch.randint(0, 256, (1, 8)))
    joints = {unit: backend.joint.text for unit, backend in compilation_of(model).backends.items()}
    for unit, joint in joints.items():
        found = Counter(re.findall(r"= (?:dsv3c|aten)\.(\w*gemm\w*|\w*mm|_grouped_mm)\.", joint))
        if not unit.kind.name.endswith("layer"):
            assert set(found) == ({"mm"} if unit.kind.name == "head" else set())
            continue
        times = 3 if training else 1
        expected = Counter(gemm=PRODUCTS)
        if unit.kind.name == "moe_layer":
            expected += Counter(grouped_gemm=2, wide_mm=times)  # the gate
        if training:
            expected += Counter(gemm_dgrad=PRODUCTS, gemm_wgrad=PRODUCTS)
            if unit.kind.name == "moe_layer":
                expected += Counter(grouped_gemm_dgrad=2, grouped_gemm_wgrad=2)
        assert found == expected, unit.name


class Watch(TorchDispatchMode):
    """Compares each FP8 GEMM that runs with the float64 product of what its operands were cast from."""

    def __init__(self):
        super().__init__()
        self.sources: dict[int, torch.Tensor] = {}
        self.kept: list = []  # so that no place is used twice
        self.errors: list[tuple[str, float, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("dsv3c::")
        if name == "quantize_tile":
            self.source(out[0], args[0])
        elif name == "latent_quantize":
            self.source(out[1], out[0][:, : out[1].shape[1]])
        elif name == "quantize_tile_t":
            self.source(out[0], padded(args[0], args[1]).t())
        elif name == "quantize_tile_both":
            self.source(out[0], args[0])
            self.source(out[2], padded(args[0], args[1]).t())
        elif name == "requantize_t":
            self.source(out[0], padded(self.sources[place(args[0])], args[2]).t())
        elif name == "aten::index.Tensor" and place(args[0]) in self.sources and args[1][0] is not None:
            self.source(out, self.sources[place(args[0])][args[1][0]])
        elif "gemm" in name:
            self.check(name, out, self.sources[place(args[0])], self.sources[place(args[2])], args[4])
        return out

    def source(self, quantized, source):
        self.sources[place(quantized)] = source.detach().double()
        self.kept.append(quantized)

    def check(self, name, out, left, right, offs):
        ends = offs.tolist() if isinstance(offs, torch.Tensor) else None
        if name == "gemm":
            exact, norm = left @ right.t(), (left**2 @ right.t() ** 2).sqrt()
        elif name == "gemm_dgrad":
            exact, norm = left @ right, (left**2 @ right**2).sqrt()
        elif name == "gemm_wgrad":
            exact, norm = left @ right.t(), (left**2 @ right.t() ** 2).sqrt()
        else:
            exact, norm = torch.zeros_like(out, dtype=torch.float64), torch.zeros_like(out, dtype=torch.float64)
            for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                if name == "grouped_gemm_wgrad":
                    first = sum(-(-(b - a) // 128) * 128 for a, b in zip([0, *ends], ends[:e], strict=False))
                    columns = slice(first, first + end - start)
                    a, b, target = left[:, columns], right[:, columns].t(), e
                else:
                    a, b, target = (
                        left[start:end],
                        right[e].t() if name == "grouped_gemm" else right[e],
                        slice(start, end),
                    )
                exact[target], norm[target] = a @ b, (a**2 @ b**2).sqrt()
        reached = norm > 0
        error = ((out.double() - exact)[reached] / norm[reached]).square().mean().sqrt()
        size = (exact[reached] / norm[reached]).square().mean().sqrt()
        # Both operands quantised (in wgrad x twice), and the output rounded.
        bound = sqrt((2 if "wgrad" in name else 1) * quantized_gemm_rms() ** 2 + (unit_roundoff(out.dtype) * size) ** 2)
        self.errors.append((name, float(error) / bound, out.numel()))


def place(x) -> int:
    """Autograd hands back what it saved as another object."""
    return x.untyped_storage()._cdata


def padded(x, offs):
    """Rows spread so that each group starts at a multiple of 128; what quantize_tile_t documents."""
    ends = offs.tolist() if offs is not None else [x.shape[0]]
    rows = -(-x.shape[0] // 128) * 128 + (128 * len(ends) if offs is not None else 0)
    out, first = x.new_zeros(rows, x.shape[1]), 0
    for start, end in zip([0, *ends], ends, strict=False):
        out[first : first + end - start] = x[start:end]
        first += -(-(end - start) // 128) * 128
    return out


@pytest.mark.parametrize(
    ("which", "dtype"), [("ours", torch.bfloat16), ("ours", torch.float32), ("transformers", torch.bfloat16)]
)
def test_every_gemm_is_right_about_what_it_was_given(which, dtype, request, compiled, logits, monkeypatch):
    make = request.getfixturevalue("make_model" if which == "ours" else "make_their_model")
    # What is fused with a cast has no BF16 value to compare with.
    fused = ["FuseQuantize", "FuseRouting", "CastHeads", "RotateInPlace"]
    model, watch = compiled(make(dtype), "fp8", skip=fused), Watch()
    quantize = QuantizedWeights.quantize

    def quantize_and_tell(self, stacks, *, training):
        copies = quantize(self, stacks, training=training)
        for i, w_fp8 in enumerate(copies[::2]):
            watch.source(w_fp8, torch.cat(stacks[i // 2]))
        return copies

    def run_watched(forward):
        def watched(*inputs):
            with watch:
                return forward(*inputs)

        return make_boxed_func(watched)

    monkeypatch.setattr(QuantizedWeights, "quantize", quantize_and_tell)
    monkeypatch.setattr(backend, "make_boxed_func", run_watched)
    step(model, logits)
    counts = Counter(name for name, *_ in watch.errors)
    assert counts == Counter(
        gemm=18, gemm_dgrad=18, gemm_wgrad=18, grouped_gemm=4, grouped_gemm_dgrad=4, grouped_gemm_wgrad=4
    )
    assert max(ratio for _, ratio, _ in watch.errors) <= 1, watch.errors


UNFUSED = ("FuseQuantize", "FuseRouting")


@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("which", ["ours", "transformers"])
def test_fusing_changes_no_more_than_roundings(which, dense, request, compiled, logits):
    """A layer's norms, SwiGLU and routing fused or not, its linears merged or not: its gradients differ by less than
    what FP8 products alone are allowed. (In a second layer, a rounding moves a token to other experts.)"""
    make = request.getfixturevalue("make_model" if which == "ours" else "make_their_model")
    model, gradients = make(torch.bfloat16, num_hidden_layers=1, first_k_dense_replace=dense), []
    for skip in ((), UNFUSED, (*UNFUSED, "MergeLinear")):
        model.zero_grad()
        torch.manual_seed(0)
        step(compiled(model, "fp8", skip=skip), logits)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for with_pass, without in pairwise(gradients):
        for name, plain in without.items():
            if plain.any():
                assert distance(with_pass[name], plain)[0] <= quantized_layer_rms(gradient=True), name


def test_tiny_gradients_survive_in_the_parameters_dtype(make_model, compiled):
    """A mean over many tokens, without loss scaling: V3's amax floor of 1e-4 would round such gradients to zero."""
    model = compiled(make_model(torch.bfloat16), "fp8")
    (model(torch.randint(0, 256, (1, 16))).float().square().mean() * 1e-9).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.bfloat16
        if "proj" in name:
            assert parameter.grad.count_nonzero() > parameter.numel() // 2, name


def test_fp8_on_a_cpu_says_that_it_is_emulated(make_model):
    from dsv3c.compiler import compile

    with pytest.warns(UserWarning, match="emulated"):
        model = compile(make_model(), precision="fp8")
    assert "emulated" in compilation_of(model).notes[0]


def test_fp8_on_a_gpu_that_is_no_hopper_is_refused(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    with pytest.raises(CompileError, match="expected a Hopper GPU, or a CPU, found NVIDIA B200; try precision='exact'"):
        compiler._precision("fp8", model)
    assert compiler._precision("auto", model) == ("exact", [])


def test_a_gpu_that_is_not_known_gets_predictions_for_another(make_model, monkeypatch):
    def unknown(name):
        raise CompileError("target: expected a GPU of h100, found NVIDIA B200 with 148 multiprocessors")

    monkeypatch.setattr(compiler, "resolve", unknown)
    with pytest.warns(UserWarning, match="found NVIDIA B200 .*; until then times are predicted for h100"):
        model = compiler.compile(make_model(), precision="exact")
    assert compilation_of(model).target.name == "h100"
    assert "NVIDIA B200" in compilation_of(model).notes[0]
    with pytest.raises(CompileError, match="found NVIDIA B200"):
        compiler.compile(make_model(), target="h200", precision="exact")
