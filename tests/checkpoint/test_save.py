"""What `save` writes: the published layout, the same bits again, all of it or nothing."""

import itertools
import json
import os
import resource
import stat
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import dsv3c
from dsv3c import checkpoint as checkpoints
from dsv3c import shards
from dsv3c.config import ModelConfig, preset
from dsv3c.errors import CheckpointError
from dsv3c.fp8_weights import keep_in_fp8
from dsv3c.model import DeepseekV3
from dsv3c.numerics import cast_bound


def contents(folder) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    """Every tensor of a folder, read without dsv3c; the index and the files must agree."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                assert index["weight_map"][name] == file.name
                tensor = shard.get_tensor(name)
                found[name] = tensor.dtype, list(tensor.shape), tensor.view(torch.uint8).numpy().tobytes()
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(len(data) for *_, data in found.values())
    return found


@pytest.mark.parametrize(
    ("name", "mtp"), [("v3", True), ("v3", False), ("ragged", True), ("v3.1", True), ("kimi-k2", False)]
)
def test_fp8_gives_identical_bytes(make, tmp_path, name, mtp):
    """All but what was not loaded, or is no weight; Terminus' scales that are not powers of two included."""
    checkpoint = make(name)
    dsv3c.save(dsv3c.load(checkpoint.folder, dtype="fp8", mtp=mtp), tmp_path / "again")
    before, after = contents(checkpoint.folder), contents(tmp_path / "again")
    unloaded = () if mtp else ("model.layers.3.",)
    assert after == {k: v for k, v in before.items() if not k.startswith(unloaded) and not k.endswith("inv_freq")}
    config = ModelConfig.from_folder(checkpoint.folder)
    assert ModelConfig.from_folder(tmp_path / "again") == replace(config, num_nextn_predict_layers=int(mtp))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["v3", "ragged", "moonlight", "kimi-k2", "v2-lite", "tied"])
def test_saving_again_changes_nothing(make, tmp_path, name, dtype):
    checkpoint = make(name)
    dsv3c.save(dsv3c.load(checkpoint.folder, dtype=dtype), tmp_path / "once")
    dsv3c.save(dsv3c.load(tmp_path / "once", dtype=dtype), tmp_path / "twice")
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    assert config == json.loads((tmp_path / "twice" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    if name in ("moonlight", "v2-lite", "tied") and dtype == torch.bfloat16:
        before = contents(checkpoint.folder)
        assert contents(tmp_path / "once") == before


def test_quantised_like_the_real_ones(make, tmp_path):
    """FP8 where DeepSeek has it, within half a step of E4M3; what is FP8 already stays as it is; V3.1's scales are
    powers of two."""
    checkpoint = make("v3.1")
    dsv3c.save(dsv3c.load(checkpoint.folder, mtp=True), tmp_path / "fp8", fp8=True)
    before, after = contents(checkpoint.folder), contents(tmp_path / "fp8")
    assert {k: v[:2] for k, v in before.items()} == {k: v[:2] for k, v in after.items()}
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    plain = dict(dsv3c.load(checkpoint.folder, mtp=True).named_parameters())
    kept = dsv3c.load(tmp_path / "fp8", dtype="fp8", mtp=True)
    widened = dict(dsv3c.load(tmp_path / "fp8", dtype=torch.float32, mtp=True).named_parameters())
    for name, module in kept.named_modules():
        if hasattr(module, "weight_scale_inv"):
            scale_inv = module.weight_scale_inv
            assert torch.equal(scale_inv.log2().round().exp2(), scale_inv)
            weight = plain[f"{name}.weight"].float()
            rows, columns = (torch.arange(size) // 128 for size in weight.shape)
            bound = cast_bound(weight, scale_inv[rows][:, columns])
            assert ((widened[f"{name}.weight"].double() - weight.double()).abs() <= bound).all(), name
    dsv3c.save(kept, tmp_path / "again", fp8=True)
    assert contents(tmp_path / "again") == after


@pytest.mark.parametrize(
    ("config", "tensors", "elements"),
    [
        (preset("v3-671b"), 91_991, 684_531_386_000),
        # Without its 61 tensors rotary_emb.inv_freq.
        (
            replace(
                preset("v3-671b"), model_type="kimi_k2", vocab_size=163840, num_attention_heads=64, n_group=1,
                topk_group=1, n_routed_experts=384, first_k_dense_replace=1, num_nextn_predict_layers=0,
            ),
            139_644 - 61,
            None,
        ),
    ],
    ids=["DeepSeek-R1", "Kimi-K2-Instruct"],
)  # fmt: skip
def test_published_counts(config, tensors, elements):
    """As many tensors, and values, as the published checkpoints hold."""
    mtp = config.num_nextn_predict_layers > 0
    with torch.device("meta"):
        model = DeepseekV3(config, mtp=mtp).bfloat16()
    keep_in_fp8(model)
    written = dict(checkpoints._tensors(model, fp8=False))
    assert len(written) == tensors
    assert elements in (None, sum(tensor.numel() for tensor in written.values()))


def test_shards(make, tmp_path, monkeypatch):
    """As few files as the limit allows, in order; names as DeepSeek's; readable by whoever may read the index."""
    model = dsv3c.load(make("v3").folder, dtype="fp8")
    dsv3c.save(model, tmp_path / "one")
    monkeypatch.setattr(shards, "SHARD_BYTES", 400_000)
    dsv3c.save(model, tmp_path / "many")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [f"model-{i + 1:05d}-of-{count:06d}.safetensors" for i in range(count)]
    sizes = [os.path.getsize(file) - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files]
    assert all(size <= shards.SHARD_BYTES < size + after for size, after in itertools.pairwise(sizes))
    index = tmp_path / "many" / "model.safetensors.index.json"
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {stat.S_IMODE(index.stat().st_mode)}


@contextmanager
def file_size_limit(size: int):
    """The kernel refuses to make files larger: what a full disk looks like from here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_nothing(make, tmp_path):
    model = dsv3c.load(make("v3").folder)
    before = sorted(tmp_path.iterdir())
    with file_size_limit(2**20), pytest.raises(CheckpointError) as error:
        dsv3c.save(model, tmp_path / "full")
    assert str(tmp_path / "full") in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_interrupt_leaves_nothing(make, tmp_path, monkeypatch):
    model = dsv3c.load(make("v3").folder)
    before = sorted(tmp_path.iterdir())

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dsv3c.save(model, tmp_path / "interrupted")
    assert sorted(tmp_path.iterdir()) == before


def test_refusals(make, tmp_path):
    """One line each; what exists is not touched."""
    model = dsv3c.load(make("v3").folder)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for argument, target, fragment in [
        (model, tmp_path / "file", "does not exist yet"),
        (model, tmp_path / "empty", "does not exist yet"),
        (model, tmp_path / "link", "does not exist yet"),
        (model, tmp_path / "no" / "parent", "parent folder"),
        (torch.nn.Linear(2, 2), tmp_path / "new", "found Linear"),
        (dsv3c.load(make("v3").folder).half(), tmp_path / "new", "found torch.float16"),
    ]:
        with pytest.raises(CheckpointError, match=fragment) as error:
            dsv3c.save(argument, target)
        assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "new").exists()
