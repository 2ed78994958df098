"""Checkpoints in the layout that DeepSeek publishes: `load`, `save`, `inspect`.

`places` is the whole correspondence: for each tensor of a checkpoint, the view of a model's parameter or buffer that
holds it. It gives the names and shapes that headers are checked against (on the meta device), what a load fills, and
what a save writes.

A weight in FP8 has a float32 scale `<name>_scale_inv` per block of 128x128 beside it, in any file, which multiplies to
dequantise. Scales are data: never computed anew, never assumed to be powers of two (in V3.1 most are, o_proj's in
V3.1-Terminus are not). Source: deepseek-ai/DeepSeek-V3 README_WEIGHTS.md.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError
from torch import Tensor

from dsv3c import shards
from dsv3c.config import ModelConfig, preset
from dsv3c.errors import CheckpointError
from dsv3c.fp8_weights import FP8_CONFIG, Float8Experts, keep_in_fp8, quantized_modules, recipe_of
from dsv3c.layers import Experts, Router
from dsv3c.model import DeepseekV3
from dsv3c.numerics import E4M3, TILE, Recipe, ceil_div
from dsv3c.shards import DTYPES, Entry

SCALE = "_scale_inv"
# Values cast at a time, so that the float32 temporaries of a cast stay small beside any tensor.
CAST_VALUES = 2**20


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds, or what one made from a preset would, in bfloat16."""

    config: ModelConfig
    parameters: int  # the main model's: without MTP, scales, and the MTP layer's copies of embedding and head
    tensors: int
    bytes_by_dtype: dict[str, int]
    mtp: bool


class Place(NamedTuple):
    """Where a checkpoint's tensor lives in a model: a view, another of its scales if the model keeps it in FP8, and
    whether DeepSeek's checkpoints have it in FP8."""

    tensor: Tensor
    scale_inv: Tensor | None = None
    quantized: bool = False


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | Literal["fp8"] = torch.bfloat16,
    device: torch.device | str = "cpu",
    mtp: bool = False,
) -> DeepseekV3:
    """The checkpoint in the folder `path` as a model in eval mode.

    Tensors go one by one from the mapped file to their place on `device`: the host holds one tensor besides the model.

    Args:
        dtype: torch.bfloat16 or torch.float32 (FP8 weights are dequantised), or "fp8": the linears and experts that
            DeepSeek quantises are kept in FP8, bit for bit as in the files, for compiled inference. Those that the
            files hold in BF16 or F32 are quantised as they are read (`dsv3c.quantize_block`, V3's recipe); the rest of
            the model is bfloat16.
        mtp: load the multi-token prediction layer too.

    Raises:
        CheckpointError: the folder does not hold what its config.json says; before memory is taken, but for the values
            of scales.
        ConfigError: config.json is of another architecture.
    """
    if dtype not in (torch.bfloat16, torch.float32, "fp8"):
        raise CheckpointError(f"dtype: expected torch.bfloat16, torch.float32 or 'fp8', found {dtype!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise CheckpointError(f"device: expected one of this machine, found {str(device)!r}; try 'cpu'") from None
    config, entries = _open(path)
    with torch.device("meta"):
        model = DeepseekV3(config, mtp=mtp)
    planned = _match(entries, places(model), model, Path(path))
    model.to(torch.bfloat16 if dtype == "fp8" else dtype)
    if dtype == "fp8":
        keep_in_fp8(model)
        model.config = replace(config, quantization_config=config.quantization_config or FP8_CONFIG)
    model.to_empty(device=device)
    recipe, reader, destinations = recipe_of(config), shards.Reader(entries), places(model)
    with _progress(sum(entry.nbytes for entry in planned.values())) as advance:
        for name, entry in sorted(planned.items(), key=lambda item: item[1].file.name):
            scale_inv = _read_scale(reader, name + SCALE) if entry.dtype == "F8_E4M3" else None
            _fill(destinations[name], reader.read(name), scale_inv, recipe)
            advance(entry.nbytes)
    return model.eval()


def save(model: DeepseekV3, path: str | Path, *, fp8: bool = False) -> None:
    """Writes the model to the new folder `path`: config.json, shards of up to 5 GB, and their index.

    Every tensor in the model's dtype, what the model keeps in FP8 bit for bit. With `fp8`, the linears and experts that
    DeepSeek's checkpoints have in FP8 are quantised. Written beside `path` and renamed when complete.

    Raises:
        CheckpointError: `path` exists, its parent does not, or the disk is full; nothing is left behind.
    """
    target = Path(path)
    if not isinstance(model, DeepseekV3):
        raise CheckpointError(
            f"save: expected a dsv3c.DeepseekV3, found {type(model).__name__}; try its own save method"
        )
    if os.path.lexists(target):
        raise CheckpointError(
            f"{target}: expected a folder that does not exist yet, found one; remove it or choose another"
        )
    if not target.parent.is_dir():
        raise CheckpointError(f"{target}: expected its parent folder to exist, found none; create it")
    dtype = model.lm_head.weight.dtype
    if dtype not in DTYPES.values():
        raise CheckpointError(f"save: expected a bfloat16 or float32 model, found {dtype}; try model.bfloat16()")
    quantized = any(place.quantized and (fp8 or place.scale_inv is not None) for place in places(model).values())
    config = replace(
        model.config,
        num_nextn_predict_layers=int(model.mtp),
        quantization_config=(model.config.quantization_config or FP8_CONFIG) if quantized else None,
    )
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        shards.write(partial, _tensors(model, fp8=fp8))
        shards.write_json(
            partial / "config.json", config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
        )
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target}: expected a disk with room to write to, found {error}; nothing was kept"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def inspect(path: str | Path) -> CheckpointInfo:
    """What is in the checkpoint folder `path`, from config.json and headers; or in a preset of that name.

    Raises:
        CheckpointError, ConfigError: as `load`.
    """
    if Path(path).is_dir():
        config, entries = _open(path)
        mtp = any(name.startswith(_mtp_prefix(config)) for name in entries)
    else:
        config, entries = preset(str(path)), None
        mtp = config.num_nextn_predict_layers > 0
    with torch.device("meta"):
        main = DeepseekV3(config)
        model = DeepseekV3(config, mtp=True) if mtp and config.num_nextn_predict_layers else main
    if entries is None:
        codes = {dtype: code for code, dtype in DTYPES.items()}
        tensors = _tensors(model.bfloat16(), fp8=False)
        entries = {name: Entry(Path(), codes[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors}
    else:
        _match(entries, places(model), model, Path(path))
    sizes: dict[str, int] = {}
    for entry in entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return CheckpointInfo(config, main.num_parameters(), len(entries), sizes, mtp)


def places(model: DeepseekV3) -> dict[str, Place]:
    """Where each tensor of a checkpoint lives in `model`, by its name on disk; scales go with their weights."""
    quantized = dict(quantized_modules(model))
    found: dict[str, Place] = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            found |= _experts(path, module)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is not model.model.embed_tokens.weight or module is model.model.embed_tokens:  # a tied head
                scale_inv = getattr(module, f"{name}{SCALE}", None)
                found[f"{path}.{name}"] = Place(parameter.detach(), scale_inv, path in quantized)
        if isinstance(module, Router) and module.e_score_correction_bias is not None:
            found[f"{path}.e_score_correction_bias"] = Place(module.e_score_correction_bias)
    return found


def _experts(path: str, experts: Experts) -> Iterator[tuple[str, Place]]:
    """Slices of the stacked tensors: on disk each expert has three weights of its own."""
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    for index in range(len(down)):
        tensors = *gate_up[index].chunk(2), down[index]
        scales: tuple[Tensor | None, ...] = None, None, None
        if isinstance(experts, Float8Experts):
            scales = *experts.gate_up_proj_scale_inv[index].chunk(2), experts.down_proj_scale_inv[index]
        for name, tensor, scale_inv in zip(("gate_proj", "up_proj", "down_proj"), tensors, scales, strict=True):
            yield f"{path}.{index}.{name}.weight", Place(tensor, scale_inv, True)


def _mtp_prefix(config: ModelConfig) -> str:
    return f"model.layers.{config.num_hidden_layers}."


def _mtp_copies(model: DeepseekV3) -> dict[str, Tensor]:
    """On disk the MTP layer has its own copies of embedding and head."""
    prefix, embedding = _mtp_prefix(model.config), model.model.embed_tokens.weight.detach()
    return {
        f"{prefix}embed_tokens.weight": embedding,
        f"{prefix}shared_head.head.weight": model.lm_head.weight.detach(),
    }


def _open(path: str | Path) -> tuple[ModelConfig, dict[str, Entry]]:
    folder = Path(path)
    if not folder.is_dir():
        if folder.suffix in shards.PICKLES:
            raise shards.pickle_error(folder)
        raise CheckpointError(
            f"{folder}: expected a checkpoint folder, found {'a file' if folder.exists() else 'nothing'}"
        )
    return ModelConfig.from_folder(folder), shards.entries(folder)


def _match(entries: dict[str, Entry], expected: dict[str, Place], model: DeepseekV3, folder: Path) -> dict[str, Entry]:
    """The weights to load, scales left out: exactly the expected ones, as far as headers tell."""
    prefix = _mtp_prefix(model.config)
    if model.mtp and not any(name.startswith(prefix) for name in entries):
        raise CheckpointError(f"{folder}: {prefix}*: expected an MTP layer, found none; load it with mtp=False")
    missing = [name for name in expected if name not in entries]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise CheckpointError(
            f"{folder}: {missing[0]}{more}: expected because of config.json, found no such tensor; "
            f"download the checkpoint again, or correct config.json"
        )
    scales = {name + SCALE for name in expected if entries[name].dtype == "F8_E4M3"}
    for name, entry in entries.items():
        if name in expected:
            _check(name, entry, expected[name], entries)
        elif name not in scales and not _ignored(name, model):
            raise CheckpointError(
                f"{entry.file}: {name}: expected a tensor of the model in config.json, found one it does not have; "
                f"remove the tensor, or correct config.json"
            )
    return {name: entries[name] for name in expected}


def _ignored(name: str, model: DeepseekV3) -> bool:
    """What checkpoints hold that the model computes, shares, or was not asked to have."""
    config = model.config
    return (
        name.endswith(".rotary_emb.inv_freq")
        or (name == "lm_head.weight" and config.tie_word_embeddings)
        or (name.startswith(_mtp_prefix(config)) and config.num_nextn_predict_layers > 0 and not model.mtp)
        or (model.mtp and name in _mtp_copies(model))
    )


def _check(name: str, entry: Entry, place: Place, entries: dict[str, Entry]) -> None:
    where, shape = f"{entry.file}: {name}", tuple(place.tensor.shape)
    if entry.shape != shape:
        raise CheckpointError(
            f"{where}: expected shape {list(shape)} because of config.json, found {list(entry.shape)}; "
            f"one of the two belongs to another model"
        )
    if entry.dtype != "F8_E4M3":
        return
    if not place.quantized:
        raise CheckpointError(f"{where}: expected dtype BF16 or F32, found F8_E4M3; convert it to BF16")
    scale = entries.get(name + SCALE)
    if scale is None:
        raise CheckpointError(
            f"{where}{SCALE}: expected the scales of an F8_E4M3 weight, found none; download it again"
        )
    blocks = tuple(ceil_div(size, TILE) for size in shape)
    if (scale.shape, scale.dtype) != (blocks, "F32"):
        raise CheckpointError(
            f"{scale.file}: {name}{SCALE}: expected F32 {list(blocks)}, one per block of {TILE}x{TILE}, "
            f"found {scale.dtype} {list(scale.shape)}; quantise the weight again"
        )


def _read_scale(reader: shards.Reader, name: str) -> Tensor:
    scale_inv = reader.read(name)
    wrong = ~((scale_inv >= 0) & scale_inv.isfinite())
    if wrong.any():
        block = wrong.nonzero()[0].tolist()
        raise CheckpointError(
            f"{reader.table[name].file}: {name}: expected finite scales of at least 0, "
            f"found {scale_inv[tuple(block)].item()} at {block}; download the file again"
        )
    return scale_inv


def _fill(place: Place, source: Tensor, scale_inv: Tensor | None, recipe: Recipe) -> None:
    """Puts a tensor and its scales, if it has any, into their place, quantised or dequantised as the place demands."""
    device = place.tensor.device
    source = source.to(device)
    scale_inv = None if scale_inv is None else scale_inv.to(device)
    if scale_inv is not None and place.scale_inv is not None:
        place.tensor.copy_(source)
        place.scale_inv.copy_(scale_inv)
    elif scale_inv is not None:
        for rows, blocks in _pieces(source):
            part = torch.ops.dsv3c.dequantize_block(source[rows], scale_inv[blocks], place.tensor.dtype)
            place.tensor[rows].copy_(part)
    elif place.scale_inv is not None:
        for rows, blocks in _pieces(source):
            part, part_scale_inv = torch.ops.dsv3c.quantize_block(source[rows], recipe.amax_floor, recipe.pow2)
            place.tensor[rows].copy_(part)
            place.scale_inv[blocks].copy_(part_scale_inv)
    else:
        place.tensor.copy_(source)


def _pieces(weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Some rows of blocks at a time: which rows, and which blocks."""
    step = max(1, CAST_VALUES // (TILE * weight.shape[1]))
    for first in range(0, ceil_div(len(weight), TILE), step):
        yield slice(first * TILE, (first + step) * TILE), slice(first, first + step)


def _tensors(model: DeepseekV3, *, fp8: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors to write, in the model's order; those to be quantised are quantised one by one."""
    recipe = recipe_of(model.config)
    for name, place in places(model).items():
        if fp8 and place.quantized and place.scale_inv is None:
            blocks = [ceil_div(size, TILE) for size in place.tensor.shape]
            quantized = Place(
                torch.empty_like(place.tensor, dtype=E4M3), place.tensor.new_empty(blocks, dtype=torch.float32)
            )
            _fill(quantized, place.tensor, None, recipe)
            place = quantized
        yield name, place.tensor
        if place.scale_inv is not None:
            yield name + SCALE, place.scale_inv
    if model.mtp:
        # safetensors refuses two names for one memory.
        yield from ((name, tensor.clone()) for name, tensor in _mtp_copies(model).items())


@contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr if that is a terminal; yields what to call with the bytes done."""
    columns = TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total_bytes)
        yield lambda done: bar.advance(task, done)
