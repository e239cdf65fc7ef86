"""The weights in a folder: one or more safetensors files with a state dict.

Names, dtypes and shapes are read from the headers; values are read when they are needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hra_fx.checkpoint.folder import opened
from hra_fx.errors import CheckpointError

SAFE = ".safetensors"
_INDEX = f"{SAFE}.index.json"
#: Weights in other formats, which are never read.
OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx")
#: Files that training saves next to a model and that do not contain weights.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
#: Dtypes of weights that can be folded, by their names in the format.
FLOATS: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
#: Dtypes of tensors that an adapter can replace.
DTYPES: Mapping[str, torch.dtype] = {
    **FLOATS,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, or one entry of its first dimension.

    Attributes:
        file: the file.
        name: the key of the tensor.
        dtype: the name of its dtype in the format, such as "BF16".
        shape: the shape of the tensor.
        index: the entry of the first dimension; `None` for the whole tensor.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    index: int | None = None

    @property
    def size(self) -> int:
        """The size in bytes, if the dtype is in `DTYPES`."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> Tensor:
        """Read the values, as a view of the file in memory if possible.

        Raises:
            CheckpointError: the file cannot be read, or is damaged.
        """
        with opened(self.file) as file:
            values: Tensor = file.get_tensor(self.name) if self.index is None else file.get_slice(self.name)[self.index]
        return values

    def first_row(self) -> Tensor:
        """The first entry of the first dimension, flattened; raises the errors of `read`."""
        with opened(self.file) as file:
            row: Tensor = file.get_slice(self.name)[0]
        return row.flatten()


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        file: the file.
        metadata: text entries.
        tensors: key -> tensor.
    """

    file: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def read_header(file: Path) -> Header:
    """Read and check a header.

    Raises:
        CheckpointError: the file cannot be read, is truncated or damaged.

    >>> read_header(Path("nowhere.safetensors"))
    Traceback (most recent call last):
    hra_fx.errors.CheckpointError: nowhere.safetensors: cannot read the file (No such file or directory...).
    """
    # With the framework torch, safe_open reserves memory for the whole file.
    with opened(file, framework="numpy") as opened_file:
        metadata = dict(opened_file.metadata() or {})
        slices = {key: opened_file.get_slice(key) for key in opened_file.keys()}  # noqa: SIM118, not a dict
        tensors = {
            key: StoredTensor(file, key, str(found.get_dtype()), tuple(found.get_shape()))
            for key, found in slices.items()
        }
    return Header(file, metadata, tensors)


@dataclass(frozen=True)
class WeightSet:
    """The files of one state dict.

    Attributes:
        files: the headers of the files, sorted by name.
        index: the index file, if there is one.
        index_entries: the content of the index file.
    """

    files: tuple[Header, ...]
    index: Path | None = None
    index_entries: Mapping[str, Any] | None = None

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Key -> tensor, for all files."""
        return {name: tensor for header in self.files for name, tensor in header.tensors.items()}

    @property
    def name(self) -> str:
        """The index or the only file, for messages."""
        return str(self.index or self.files[0].file)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Removed key -> key of the shared tensor, as recorded by `safetensors.torch.save_model`."""
        found: dict[str, str] = {}
        for header in self.files:
            for name, kept in header.metadata.items():
                if name not in self.tensors and kept in self.tensors:
                    found[name] = kept
        return found


def weight_sets(folder: Path) -> list[WeightSet]:
    """All sets in a folder, without its subfolders.

    Raises:
        CheckpointError: no set was found, or a shard or an index is missing or damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "pytorch_model.bin").write_bytes(b"")
    ...     weight_sets(Path(folder))
    Traceback (most recent call last):
    hra_fx.errors.CheckpointError: ...pytorch_model.bin: only safetensors files are read. Load the model and save it ...
    """
    indices = sorted(folder.glob(f"*{_INDEX}"))
    sets = [_of_index(index) for index in indices]
    taken = {header.file for found in sets for header in found.files}
    lone = (file for file in sorted(folder.glob(f"*{SAFE}")) if file not in taken)
    sets += [WeightSet((read_header(file),)) for file in lone if file.is_file()]
    if sets:
        return sets
    if others := sorted(foreign(folder)):
        raise CheckpointError(
            f"{others[0]}: only safetensors files are read. Load the model and save it with "
            "model.save_pretrained(folder)."
        )
    below = sorted(file.parent.relative_to(folder).as_posix() for file in folder.glob(f"*/*{SAFE}"))
    suggestion = "Pass the folder of a checkpoint."
    if below:
        names = ", ".join(map(repr, dict.fromkeys(below)))
        suggestion = f"The subfolders {names} have some: pass one of them, or adapter_dir={{name: adapter}} (--part)."
    raise CheckpointError(f"{folder}: no {SAFE} files found. {suggestion}")


def foreign(folder: Path) -> Iterator[Path]:
    """Files at any depth that may contain weights in another format."""
    for file in folder.rglob("*"):
        if file.suffix in OTHERS and not file.name.startswith(_NO_WEIGHTS):
            yield file


def _of_index(index: Path) -> WeightSet:
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
        places: dict[str, str] = dict(entries["weight_map"])
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: cannot read the file, or it has no weight_map ({error!r}). Download it again."
        ) from error
    headers: dict[str, Header] = {}
    for name in names:
        file = index.parent / name
        if file.parent != index.parent or not file.is_file():
            raise CheckpointError(f"{index}: lists {name!r}, which is missing from the folder. Download it again.")
        headers[name] = read_header(file)
    for key, name in places.items():
        if key not in headers[name].tensors:
            raise CheckpointError(
                f"{index}: lists {key!r} in {name!r}, but the file does not have it. Download both again."
            )
    return WeightSet(tuple(headers[name] for name in names), index, entries)
