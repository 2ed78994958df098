"""A folder of safetensors files as one table of tensors, the layout of DeepSeek's and of transformers' checkpoints.

Nothing in a folder is trusted: an index may point elsewhere, a file may be cut short or hold what the index does not
say, a pickle runs code when it is opened. `entries` reads headers alone, which safetensors checks against the size of
their file, so that everything can be refused before memory is taken. Knows nothing of models.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3c.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, as its header describes it."""

    file: Path
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder by name. Raises CheckpointError, which names the file and, if it can, the tensor."""
    if not (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            return _header(folder / SINGLE)
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise pickle_error(folder / pickles[0])
        raise CheckpointError(f"{folder}: expected {INDEX} or {SINGLE}, found neither; download the checkpoint again")
    weight_map = _weight_map(folder / INDEX)
    found: dict[str, Entry] = {}
    for file in dict.fromkeys(weight_map.values()):
        for name, entry in _header(folder / file).items():
            home = weight_map.get(name)
            if home != file:
                expected = f"it in {home} alone" if home else "no such tensor"
                raise CheckpointError(
                    f"{entry.file}: {name}: expected {expected} (says {INDEX}), found it here; remove one of them"
                )
            found[name] = entry
    for name, file in weight_map.items():
        if name not in found:
            raise CheckpointError(
                f"{folder / file}: {name}: expected it here (says {INDEX}), found no such tensor; download it again"
            )
    return found


class Reader:
    """Reads tensors of a table. What was read through a mapped file counts as this process's memory while the file is
    open, so it is opened anew before that is more than the largest tensor."""

    def __init__(self, table: dict[str, Entry]) -> None:
        self.table = table
        self.limit = max(entry.nbytes for entry in table.values())
        self.file: Path | None = None
        self.mapped = 0

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, a view of the mapped file."""
        entry = self.table[name]
        if entry.file != self.file or self.mapped + entry.nbytes > self.limit:
            self.shard = safe_open(entry.file, "pt")
            self.file, self.mapped = entry.file, 0
        self.mapped += entry.nbytes
        return self.shard.get_tensor(name)


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes shards of up to SHARD_BYTES and their index into an empty folder. Host memory: one shard."""
    shards: list[list[str]] = []
    total = 0
    for batch in _batches(tensors):
        # How many there will be, which their names tell, is known at the end.
        save_file(batch, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in batch.values())
        shards.append(list(batch))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):06d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file in set(weight_map.values()):
        shutil.copymode(folder / INDEX, folder / file)  # safetensors lets nobody else read its files


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _batches(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """One dict, filled again and again."""
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if batch and size + tensor.nbytes > SHARD_BYTES:
            yield batch
            batch.clear()
            size = 0
        batch[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    yield batch


def _header(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, "pt") as shard:
            views = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118  (not a dict)
            found = {name: Entry(file, view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{file}: expected a shard, found no such file; download it again") from None
    except (OSError, SafetensorError) as error:
        size = f"{os.path.getsize(file):,} bytes"
        raise CheckpointError(
            f"{file}: expected a complete safetensors file, found {size} ({error}); download it again"
        ) from None
    for name, entry in found.items():
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{file}: {name}: expected dtype {', '.join(DTYPES)}, found {entry.dtype}; convert it to one of them"
            )
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name, from the index."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            [(twice, times)] = Counter(name for name, _ in pairs).most_common(1)
            raise CheckpointError(f"{index}: {twice}: expected one entry, found {times}; remove all but one")
        return seen

    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: expected JSON, found {error}; download it again") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map: expected an object of tensor and file names, found {weight_map!r:.60}; "
            f"download it again"
        )
    for name, file in weight_map.items():
        if isinstance(file, str) and file.endswith(PICKLES):
            raise pickle_error(index.parent / file)
        # The name itself must stay in the folder; the file may be a link, as in Hugging Face's cache.
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: weight_map.{name}: expected a .safetensors file in this folder, found {file!r:.200}; "
                f"download the index again"
            )
    return weight_map


def pickle_error(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file}: expected safetensors, found a pickle, which runs code when it is opened; convert it to safetensors"
    )
