"""The same files in transformers: the same weights, hence the same logits; and files that transformers wrote."""

import json

import pytest
import torch

import dsv3c
from dsv3c.numerics import MODEL_DISTANCE, distance

transformers = pytest.importorskip("transformers", reason="the oracle: pip install 'dsv3c[hf]'")


def theirs_of(version: str):
    return getattr(transformers, f"Deepseek{version}ForCausalLM")


def assert_same_model(ours, theirs, mtp_layer: str) -> None:
    """The same bits under the same names, and logits as close to float64 as transformers' own."""
    state = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith(mtp_layer)}
    their_state = theirs.state_dict()
    assert state.keys() == their_state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, their_state[name].to(tensor.dtype)), name
    ids = torch.randint(96, (2, 12))
    with torch.no_grad():
        out, their_out = ours(ids), theirs(ids).logits
        reference = ours.double()(ids)
    for mine, other in zip(distance(out, reference), distance(their_out, reference), strict=True):
        assert mine <= MODEL_DISTANCE * other
        assert other <= MODEL_DISTANCE * mine


@pytest.mark.parametrize(("name", "version"), [("v3", "V3"), ("moonlight", "V3"), ("tied", "V3"), ("v2-lite", "V2")])
def test_reads_what_we_read(make, name, version):
    """A BF16 checkpoint in the published layout."""
    checkpoint = make(name, quantization_config=None, auto_map=None)
    theirs = theirs_of(version).from_pretrained(checkpoint.folder, dtype=torch.float32)
    assert_same_model(dsv3c.load(checkpoint.folder, dtype=torch.float32), theirs.eval(), "model.layers.3.")


@pytest.mark.parametrize(("name", "version"), [("v3", "V3"), ("moonlight", "V3"), ("v2-lite", "V2")])
def test_reads_what_we_write(make, tmp_path, name, version):
    model = dsv3c.load(make(name).folder, dtype=torch.float32)
    dsv3c.save(model, tmp_path / "saved")
    theirs = theirs_of(version).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_same_model(model, theirs.eval(), "model.layers.3.")


@pytest.mark.parametrize(("name", "version"), [("v3", "V3"), ("v2-lite", "V2")])
def test_we_read_what_it_writes(make, tmp_path, name, version):
    """Its config dialect, experts taken apart, and num_nextn_predict_layers where there is no MTP layer."""
    checkpoint = make(name, quantization_config=None, auto_map=None)
    theirs = theirs_of(version).from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    assert "rope_parameters" in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert_same_model(dsv3c.load(tmp_path / "saved", dtype=torch.float32), theirs, "model.layers.3.")
