"""An out-of-memory error raised in a compiled module says who has the memory."""

import re
from types import SimpleNamespace

import pytest
import torch

import dsv3c
from dsv3c.compiler import compilation_of
from dsv3c.kernels import attention
from dsv3c.numerics import E4M3
from dsv3c.out_of_memory import explain
from dsv3c.passes import ChooseSaved

TORCHS = "CUDA out of memory. Tried to allocate 2.00 GiB."


def fails(*_):
    raise torch.OutOfMemoryError(TORCHS)


def sizes_in(message):
    return re.findall(r"[:,] ([a-z A-Z8]+?) [\d.]+ GB", message)


def test_the_sum_of_what_is_known():
    weight = torch.nn.Parameter(torch.zeros(10**7))
    saved = [torch.zeros(2 * 10**7), weight.detach(), None]
    layer = SimpleNamespace(saved_tensors=saved, _forward_cls=SimpleNamespace(__name__="CompiledFunction"))
    error = torch.OutOfMemoryError(TORCHS)
    explain(error, "a layer", [weight], None, ChooseSaved("none"), layer)
    assert str(error) == (
        f"{TORCHS}\ndsv3c: in a layer: weights 0.04 GB, 0.08 GB saved for backward by each layer; "
        "try dsv3c.compile(…, memory='low'), fewer tokens a call"
    )


@pytest.mark.usefixtures("without_codegen")
@pytest.mark.parametrize("memory", ["default", "low"])
def test_forward_and_backward(make_model, compiled, monkeypatch, memory):
    model = make_model(torch.bfloat16, vocab_size=128 * 256)  # more than other consumers have
    result = compiled(model, "fp8", memory=memory)
    ids = torch.zeros(1, 20, dtype=torch.long)
    result(ids).float().sum().backward()
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_explicit_backward", fails)
        with pytest.raises(torch.OutOfMemoryError) as backward:
            result(ids).float().sum().backward()
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_cudnn", fails)
        with pytest.raises(torch.OutOfMemoryError) as forward:
            result(ids)
        with pytest.raises(torch.OutOfMemoryError) as inference, torch.no_grad():
            result(ids)
    for error, where in ((backward, "the backward of a moe_layer"), (forward, "a dense_layer")):
        first, added = str(error.value).split("\n")
        assert first == TORCHS
        assert added.startswith(f"dsv3c: in {where}: weights 0.0")
        assert ("memory='low'" in added) == (memory == "default" and error is backward)  # nothing is saved before
        assert added.endswith("fewer tokens a call")
    assert sizes_in(str(backward.value)) == ["weights", "gradients", "their FP8 copies"]
    copies = [t for copy in compilation_of(result).weights.copies.values() for t in copy.tensors]
    assert {t.dtype for t in copies} == {E4M3, torch.float32}
    for name, size in (
        ("weights", sum(p.nbytes for p in model.parameters())),
        ("gradients", sum(p.grad.nbytes for p in model.parameters())),
        ("their FP8 copies", sum(t.nbytes for t in copies)),
    ):
        assert f"{name} {size / 1e9:.2f} GB" in str(backward.value)
    assert "saved for backward by each layer" not in str(inference.value)
    result(ids).float().sum().backward()  # and all is as before


@pytest.mark.gpu
def test_on_a_gpu_with_less_memory():
    config = dsv3c.preset("tiny").with_layers(1)
    with torch.device("cuda"):
        compiled = dsv3c.compile(dsv3c.DeepseekV3(config).bfloat16())

    def step(tokens):
        compiled(torch.zeros(1, tokens, dtype=torch.long, device="cuda")).float().sum().backward()

    step(256)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 2**26
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"(?s)CUDA out of memory.*dsv3c: in .*weights.*try ") as error:
            step(32768)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "activations, optimizer and all else" in str(error.value)
    step(256)
