"""What `inspect` tells: from headers alone, and of presets."""

import pytest
import torch

from dsv3c import shards
from dsv3c.checkpoint import inspect
from dsv3c.errors import ConfigError


@pytest.mark.parametrize("name", ["v3", "ragged", "moonlight", "kimi-k2", "v2-lite", "tied"])
def test_checkpoints(make, name, monkeypatch):
    """Counts are those of the tensors that were written; no tensor is read."""
    checkpoint = make(name)
    monkeypatch.setattr(shards.Reader, "__init__", None)
    info = inspect(checkpoint.folder)
    tensors = checkpoint.tensors
    assert info.tensors == len(tensors)
    assert info.mtp == (name in ("v3", "ragged"))
    assert info.config.hidden_size == checkpoint.config["hidden_size"]
    for code, dtype in {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}.items():
        expected = sum(tensor.nbytes for tensor in tensors.values() if tensor.dtype == dtype)
        assert info.bytes_by_dtype.get(code, 0) == expected
    main = [n for n in tensors if not n.startswith("model.layers.3.") and not n.endswith(("_scale_inv", "inv_freq"))]
    assert info.parameters == sum(tensors[n].numel() for n in main)


def test_presets():
    info = inspect("v3-671b")
    assert info.parameters == 671_026_419_200
    assert info.mtp
    # Besides the parameters, the MTP layer with its copies of embedding and head (references.md); biases are float32.
    biases, embedding = 59 * 256, 129280 * 7168
    values = 671_026_419_200 + 11_610_068_224 + 2 * embedding
    assert info.bytes_by_dtype == {"BF16": 2 * (values - biases), "F32": 4 * biases}


@pytest.mark.parametrize(("path", "hint"), [("v3-672b", "did you mean 'v3-671b'"), ("no/such/folder", "or a folder")])
def test_neither_folder_nor_preset(path, hint):
    with pytest.raises(ConfigError, match=hint):
        inspect(path)
