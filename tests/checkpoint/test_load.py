"""What `load` makes of the published layouts, bit for bit; and what it must not do."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3c
from dsv3c import checkpoint as checkpoints
from dsv3c.model import DeepseekV3

BF16_ONLY = ("moonlight", "v2-lite", "tied")
FP8 = ("v3", "ragged", "v3.1", "kimi-k2")
WITH_MTP = ("v3", "ragged", "v3.1")
DTYPES = (torch.bfloat16, torch.float32)


def assert_equal_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def tensors_of(model: DeepseekV3, checkpoint) -> dict[str, torch.Tensor]:
    """What the model holds, under the names on disk; the stacked experts taken apart."""
    found = {}
    width, experts = checkpoint.config["moe_intermediate_size"], checkpoint.config["n_routed_experts"]
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        path, stacked, what = name.partition(".experts.")
        if not stacked:
            found[name] = tensor
            continue
        weight, scale, _ = what.partition("_scale_inv")
        rows = -(-width // 128) if scale else width
        for expert in range(experts):
            prefix = f"{path}.experts.{expert}"
            if weight == "down_proj":
                found[f"{prefix}.down_proj.weight{scale}"] = tensor[expert]
            else:
                found[f"{prefix}.gate_proj.weight{scale}"] = tensor[expert, :rows]
                found[f"{prefix}.up_proj.weight{scale}"] = tensor[expert, rows:]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "mtp"), [*((name, False) for name in FP8 + BF16_ONLY), *((name, True) for name in WITH_MTP)]
)
def test_values(make, name, dtype, mtp):
    """Every parameter is its float64 value, rounded to float32 by the dequantisation, then to the model's dtype."""
    checkpoint = make(name)
    model = dsv3c.load(checkpoint.folder, dtype=dtype, mtp=mtp)
    assert not model.training
    found = tensors_of(model, checkpoint)
    for disk, tensor in found.items():
        expected = checkpoint.exact(disk).float()
        assert_equal_bits(tensor, expected if "correction_bias" in disk else expected.to(dtype))
    copies = ("inv_freq", "_scale_inv", "3.embed_tokens.weight", "shared_head.head.weight")
    rest = {disk for disk in checkpoint.tensors if disk not in found and not disk.endswith(copies)}
    assert rest == {disk for disk in rest if not mtp and disk.startswith("model.layers.3.")}


@pytest.mark.parametrize("name", FP8)
def test_kept_in_fp8(make, name):
    """Weights and scales are the file's, bit for bit, and compute what the dequantised model computes."""
    checkpoint = make(name)
    model = dsv3c.load(checkpoint.folder, dtype="fp8")
    for disk, tensor in tensors_of(model, checkpoint).items():
        assert_equal_bits(tensor, checkpoint.tensors[disk])
    ids = torch.randint(96, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(ids), dsv3c.load(checkpoint.folder)(ids))


def test_casts_leave_fp8_alone(make):
    """A cast of the model is a cast of what is not FP8."""
    checkpoint = make("ragged")
    kept, plain = dsv3c.load(checkpoint.folder, dtype="fp8").float(), dsv3c.load(checkpoint.folder).float()
    linear, expert = kept.model.layers[0].self_attn.o_proj, kept.model.layers[1].mlp.experts
    assert linear.weight.dtype == expert.down_proj.dtype == torch.float8_e4m3fn
    assert linear.weight_scale_inv.dtype == expert.down_proj_scale_inv.dtype == torch.float32
    assert kept.lm_head.weight.dtype == torch.float32
    exact = dsv3c.load(checkpoint.folder, dtype=torch.float32)
    exact.lm_head, exact.model.embed_tokens = plain.lm_head, plain.model.embed_tokens
    ids = torch.randint(96, (2, 9))
    with torch.no_grad():
        assert torch.equal(kept(ids), exact(ids))


@pytest.mark.parametrize("name", ["moonlight", "v2-lite"])
def test_bf16_quantised_as_it_is_read(make, tmp_path, name):
    """The same as `save(fp8=True)` writes, which are the operator's bits, and recorded in the config."""
    checkpoint = make(name)
    model = dsv3c.load(checkpoint.folder, dtype="fp8")
    assert model.config.quantization_config["quant_method"] == "fp8"
    dsv3c.save(dsv3c.load(checkpoint.folder), tmp_path / "fp8", fp8=True)
    saved = load_file(tmp_path / "fp8" / "model-00001-of-000001.safetensors")
    found = tensors_of(model, checkpoint)
    assert found.keys() == saved.keys()
    for disk, tensor in found.items():
        assert_equal_bits(tensor, saved[disk])
    weight = "model.layers.1.mlp.experts.5.up_proj.weight"
    pair = torch.ops.dsv3c.quantize_block(checkpoint.tensors[weight], 1e-4, False)
    assert_equal_bits(found[weight], pair[0])
    assert_equal_bits(found[f"{weight}_scale_inv"], pair[1])


@pytest.mark.parametrize(("name", "dtype"), [("ragged", torch.bfloat16), ("moonlight", "fp8")])
def test_casts_in_pieces(make, monkeypatch, name, dtype):
    """A large tensor is cast a few rows of blocks at a time."""
    folder = make(name).folder
    whole = dsv3c.load(folder, dtype=dtype).state_dict()
    monkeypatch.setattr(checkpoints, "CAST_VALUES", 1)
    pieces = dsv3c.load(folder, dtype=dtype).state_dict()
    for key, tensor in whole.items():
        assert_equal_bits(tensor, pieces[key])


def test_single_file(make):
    checkpoint = make("moonlight", write=False)
    save_file(checkpoint.tensors, checkpoint.folder / "model.safetensors")
    (checkpoint.folder / "config.json").write_text(json.dumps(checkpoint.config))
    model = dsv3c.load(checkpoint.folder)
    assert_equal_bits(model.lm_head.weight, checkpoint.tensors["lm_head.weight"])


def test_hugging_face_cache(make, tmp_path):
    """A snapshot is a folder of links to blobs elsewhere; the folder itself may be linked too."""
    checkpoint = make("v3")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir()
    snapshot.mkdir()
    for number, file in enumerate(sorted(checkpoint.folder.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../blobs/{number:064x}")
    (tmp_path / "main").symlink_to("snapshots")
    model = dsv3c.load(tmp_path / "main")
    assert_equal_bits(model.lm_head.weight, checkpoint.tensors["lm_head.weight"])


def test_code_of_a_checkpoint_is_never_run(make, tmp_path):
    checkpoint = make("v3")
    (checkpoint.folder / "modeling_deepseek.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    dsv3c.load(checkpoint.folder)
    assert not (tmp_path / "ran").exists()
    assert "modeling_deepseek" not in sys.modules


def test_quiet_without_a_terminal(make, capfd):
    dsv3c.load(make("v3").folder)
    assert capfd.readouterr() == ("", "")


def test_tied_head_on_disk(make):
    """Some write it nevertheless."""
    checkpoint = make("tied", write=False)
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["model.embed_tokens.weight"].clone()
    model = dsv3c.load(checkpoint.write().folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_bias_rounded_by_others(make):
    """Widened again; there is nothing else to load."""
    checkpoint = make("moonlight", write=False)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    checkpoint.tensors[name] = checkpoint.tensors[name].bfloat16()
    bias = dsv3c.load(checkpoint.write().folder).model.layers[1].mlp.gate.e_score_correction_bias
    assert_equal_bits(bias, checkpoint.tensors[name].float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FP8 + BF16_ONLY)
def test_on_a_gpu(make, name):
    """The same bits as on the CPU, whichever side computes them."""
    folder = make(name).folder
    for dtype in (*DTYPES, "fp8"):
        here, there = dsv3c.load(folder, dtype=dtype), dsv3c.load(folder, dtype=dtype, device="cuda")
        for (name, tensor), other in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
            assert other.device.type == "cuda", name
            assert_equal_bits(tensor, other.cpu())
