"""Every way in which a checkpoint can be wrong: one line that names the file and the tensor, before memory is taken."""

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

import dsv3c
from dsv3c.checkpoint import inspect
from dsv3c.errors import CheckpointError, Dsv3cError
from dsv3c.model import DeepseekV3

UP = "model.layers.1.mlp.experts.3.up_proj.weight"
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
NORM = "model.layers.2.input_layernorm.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
FIRST = "model-00001-of-000003.safetensors"
INDEX = "model.safetensors.index.json"


def file_of(checkpoint, name: str) -> str:
    return checkpoint.weight_map[name]


def put(name, change, *fragments):
    """Writes the checkpoint with another tensor of that name, or none."""

    def mutate(checkpoint):
        tensor = change(checkpoint.tensors.get(name))
        checkpoint.tensors.pop(name, None)
        if tensor is not None:
            checkpoint.tensors[name] = tensor
        checkpoint.write()
        return [name, *fragments, *([file_of(checkpoint, name)] if tensor is not None else [])]

    return mutate


def drop(name):
    return put(name, lambda tensor: None)


def replace_file(change):
    """Writes the checkpoint, then other bytes into its first shard."""

    def mutate(checkpoint):
        file = checkpoint.write().folder / FIRST
        file.write_bytes(change(file.read_bytes()))
        return [FIRST, f"found {os.path.getsize(file):,} bytes"]

    return mutate


def point(target):
    """Writes the checkpoint, then moves its first shard to `target` and says so in the index."""

    def mutate(checkpoint):
        checkpoint.write()
        file = target.format(folder=checkpoint.folder) if isinstance(target, str) else target
        names = [name for name, home in checkpoint.weight_map.items() if home == FIRST]
        if isinstance(file, str):
            (checkpoint.folder / file).parent.mkdir(exist_ok=True)
            (checkpoint.folder / FIRST).rename(checkpoint.folder / file)
        checkpoint.weight_map |= dict.fromkeys(names, file)
        checkpoint.write_json()
        return [INDEX, f"weight_map.{names[0]}", repr(file)]

    return mutate


def index(text):
    def mutate(checkpoint):
        (checkpoint.write().folder / INDEX).write_text(text)
        return [INDEX]

    return mutate


def config(**changes):
    def mutate(checkpoint):
        checkpoint.config = checkpoint.config | changes
        checkpoint.write()
        return ["config.json"]

    return mutate


def scale_with(value):
    def change(scale_inv):
        scale_inv = scale_inv.clone()
        scale_inv.view(-1)[-1] = value
        return scale_inv

    return change


def missing_shard(checkpoint):
    (checkpoint.write().folder / FIRST).unlink()
    return [FIRST, "no such file"]


def dangling_link(checkpoint):
    missing_shard(checkpoint)
    (checkpoint.folder / FIRST).symlink_to("../blobs/not-downloaded")
    return [FIRST, "no such file"]


def huge_claim(checkpoint):
    header = {"a": {"dtype": "F32", "shape": [10**13], "data_offsets": [0, 4 * 10**13]}}
    return replace_file(lambda _: struct.pack("<Q", len(json.dumps(header))) + json.dumps(header).encode())(checkpoint)


def in_two_shards(checkpoint):
    """The last shard holds a tensor of another as well."""
    checkpoint.write()
    last = "model-00003-of-000003.safetensors"
    here = [name for name, file in checkpoint.weight_map.items() if file == last]
    other = next(name for name, file in checkpoint.weight_map.items() if file == FIRST)
    save_file({name: checkpoint.tensors[name] for name in [*here, other]}, checkpoint.folder / last)
    return [last, other, FIRST]


def twice_in_the_index(checkpoint):
    file = checkpoint.write().folder / INDEX
    file.write_text(file.read_text().replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{FIRST}", '))
    return [INDEX, NORM, "found 2"]


def not_in_the_index(checkpoint):
    checkpoint.write()
    file = checkpoint.weight_map.pop(NORM)
    checkpoint.write_json()
    return [file, NORM]


def not_in_its_file(checkpoint):
    checkpoint.write()
    checkpoint.weight_map["model.layers.2.extra"] = FIRST
    checkpoint.write_json()
    return [FIRST, "model.layers.2.extra"]


class Attack:
    """Unpickling it leaves a file behind."""

    def __reduce__(self):
        return open, ("attacked", "w")


def only_pickles(checkpoint):
    checkpoint.write_json()
    (checkpoint.folder / INDEX).unlink()
    (checkpoint.folder / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    return ["pytorch_model.bin", "pickle"]


def pickles_in_the_index(checkpoint):
    checkpoint.weight_map = dict.fromkeys(checkpoint.tensors, "pytorch_model-00001-of-00001.bin")
    checkpoint.write_json()
    (checkpoint.folder / "pytorch_model-00001-of-00001.bin").write_bytes(pickle.dumps(Attack()))
    return ["pytorch_model-00001-of-00001.bin", "pickle"]


def no_weights(checkpoint):
    checkpoint.write_json()
    (checkpoint.folder / INDEX).unlink()
    return [str(checkpoint.folder), INDEX, "model.safetensors"]


def no_config(checkpoint):
    (checkpoint.write().folder / "config.json").unlink()
    return ["config.json"]


def bf16_weight_with_scales(checkpoint):
    checkpoint.tensors[UP] = checkpoint.tensors[UP].bfloat16()
    checkpoint.write()
    return [f"{UP}_scale_inv", file_of(checkpoint, f"{UP}_scale_inv")]


HEADERS = {
    "missing shard": missing_shard,
    "dangling link": dangling_link,
    "truncated shard": replace_file(lambda data: data[:-1000]),
    "truncated header": replace_file(lambda data: data[:20]),
    "empty shard": replace_file(lambda data: b""),
    "longer shard": replace_file(lambda data: data + bytes(8)),
    "not a shard": replace_file(lambda data: b"version https://git-lfs.github.com/spec/v1\n"),
    "a pickle named safetensors": replace_file(lambda data: pickle.dumps(Attack())),
    "claims more than memory holds": huge_claim,
    "missing scale": drop(f"{UP}_scale_inv"),
    "missing tensor": drop(NORM),
    "missing bias": drop(BIAS),
    "missing expert": drop(UP),
    "scale of whole blocks only": put(f"{KV_A}_scale_inv", lambda scale_inv: scale_inv[:1].clone()),
    "transposed scale": put(f"{KV_A}_scale_inv", lambda scale_inv: scale_inv.new_ones(3, 2)),
    "scale in bf16": put(f"{UP}_scale_inv", lambda scale_inv: scale_inv.bfloat16()),
    "weight in e5m2": put(UP, lambda weight: weight.float().to(torch.float8_e5m2), "found F8_E5M2"),
    "weight in int8": put(UP, lambda weight: weight.view(torch.int8), "found I8"),
    "norm in f16": put(NORM, lambda weight: weight.half(), "found F16"),
    "norm in fp8": put(NORM, lambda weight: weight.to(torch.float8_e4m3fn)),
    "transposed weight": put(KV_A, lambda weight: weight.t().contiguous()),
    "unknown tensor": put("model.layers.1.self_attn.q_a_proj.bias", lambda _: torch.zeros(192)),
    "one expert more": put("model.layers.1.mlp.experts.8.up_proj.weight", lambda _: torch.zeros(128, 256)),
    "bf16 weight with scales": bf16_weight_with_scales,
    "in two shards": in_two_shards,
    "twice in the index": twice_in_the_index,
    "not in the index": not_in_the_index,
    "not in its file": not_in_its_file,
    "index leads outside": point("../outside.safetensors"),
    "index leads to an absolute path": point("{folder}/absolute.safetensors"),
    "index leads into a folder": point("sub/model.safetensors"),
    "index leads to a file of another kind": point("model.gguf"),
    "index leads to a number": point(3),
    "index is no JSON": index("{"),
    "index is a list": index("[]"),
    "index is empty": index('{"weight_map": {}}'),
    "index is text": index('"weight_map"'),
    "only pickles": only_pickles,
    "pickles in the index": pickles_in_the_index,
    "no weights": no_weights,
    "no config": no_config,
    "more layers than tensors": config(num_hidden_layers=5),
    "fewer layers than tensors": config(num_hidden_layers=2, num_nextn_predict_layers=0),
    "another model": config(model_type="deepseek_v32"),
    "another quantisation": config(quantization_config={"quant_method": "compressed-tensors"}),
}
VALUES = {
    "NaN scale": put(f"{UP}_scale_inv", scale_with(float("nan"))),
    "infinite scale": put(f"{UP}_scale_inv", scale_with(float("inf"))),
    "negative scale": put(f"{KV_A}_scale_inv", scale_with(-1e-3)),
}


def assert_one_line(error, fragments) -> None:
    message = str(error.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("name", HEADERS)
def test_headers(make, monkeypatch, name):
    checkpoint = make("v3", write=False)
    fragments = HEADERS[name](checkpoint)
    monkeypatch.chdir(checkpoint.folder)
    monkeypatch.setattr(DeepseekV3, "to_empty", None)  # which takes the memory
    with pytest.raises(Dsv3cError) as error:
        dsv3c.load(checkpoint.folder)
    assert_one_line(error, fragments)
    with pytest.raises(Dsv3cError) as error:
        inspect(checkpoint.folder)
    assert_one_line(error, fragments)
    assert not (checkpoint.folder / "attacked").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "fp8"])
@pytest.mark.parametrize("name", VALUES)
def test_values(make, name, dtype):
    checkpoint = make("v3", write=False)
    fragments = VALUES[name](checkpoint)
    with pytest.raises(CheckpointError) as error:
        dsv3c.load(checkpoint.folder, dtype=dtype)
    assert_one_line(error, fragments)


def test_mtp_that_is_not_there(make):
    """transformers 5 writes num_nextn_predict_layers: 1 whatever it saves."""
    checkpoint = make("v3", write=False)
    for name in [name for name in checkpoint.tensors if name.startswith("model.layers.3.")]:
        del checkpoint.tensors[name]
    folder = checkpoint.write().folder
    assert not dsv3c.load(folder).mtp
    assert not inspect(folder).mtp
    with pytest.raises(CheckpointError, match=r"model\.layers\.3.*mtp=False"):
        dsv3c.load(folder, mtp=True)
    with pytest.raises(Dsv3cError, match="num_nextn_predict_layers"):
        dsv3c.load(make("moonlight").folder, mtp=True)


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"path": "nowhere"}, "nowhere: expected a checkpoint folder, found nothing"),
        ({"path": "config.json"}, "config.json: expected a checkpoint folder, found a file"),
        ({"path": "model.pt"}, r"model\.pt: .*pickle"),
        ({"dtype": torch.float16}, "dtype: .*torch.float16"),
        ({"dtype": "bf16"}, "dtype: .*'bf16'"),
        ({"device": "tpu"}, "device: .*'tpu'"),
        ({"device": "cuda:99"}, "device: .*'cuda:99'"),
    ],
)
def test_arguments(make, monkeypatch, argument, match):
    folder = make("moonlight").folder
    monkeypatch.chdir(folder)
    with pytest.raises(CheckpointError, match=match) as error:
        dsv3c.load(**{"path": folder} | argument)
    assert "\n" not in str(error.value)
