"""Tensors in safetensors files: names, dtypes and shapes are read from the header, values when they are needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hra_fx.checkpoint.weights import opened

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
        name: its key.
        dtype: its name in the format, such as "BF16".
        shape: its shape.
        index: the entry of the first dimension; `None` for the whole tensor.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    index: int | None = None

    @property
    def size(self) -> int:
        """Size in bytes, if its dtype is in `DTYPES`."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> Tensor:
        """The values, as a view of the file in memory where possible.

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
    """What the header of a file says.

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
    # For torch, safe_open reserves memory for the whole file.
    with opened(file, framework="numpy") as opened_file:
        metadata = dict(opened_file.metadata() or {})
        slices = {key: opened_file.get_slice(key) for key in opened_file.keys()}  # noqa: SIM118, not a dict
        tensors = {
            key: StoredTensor(file, key, str(found.get_dtype()), tuple(found.get_shape()))
            for key, found in slices.items()
        }
    return Header(file, metadata, tensors)
