"""Read the header of a safetensors file without its data. `safetensors` has no function for the places of tensors.

Source of the format: https://github.com/huggingface/safetensors#format: eight bytes with the length of the JSON that
follows, then the data without gaps; offsets count from the end of the JSON.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hra_fx.errors import CheckpointError

METADATA = "__metadata__"
#: Dtypes of weights that can be folded, by their names in the format.
FLOATS: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
#: Dtypes that torch has, of those in the format.
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
    """A tensor in a safetensors file.

    Attributes:
        file: the file.
        name: its key.
        dtype: its name in the format, such as "BF16".
        shape: its shape.
        start: offset in the file, in bytes.
        size: size in bytes.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        file: the file.
        raw: all bytes before the data.
        metadata: text entries.
        tensors: key -> tensor, in the order of the data.
    """

    file: Path
    raw: bytes
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def read_header(file: Path) -> Header:
    """Read and check a header.

    Raises:
        CheckpointError: the file cannot be read, is truncated or damaged.

    >>> read_header(Path("nowhere.safetensors"))
    Traceback (most recent call last):
    hra_fx.errors.CheckpointError: nowhere.safetensors: cannot read the file (No such file or directory).
    """
    try:
        # safe_open checks the header and the size. For torch, it would reserve memory for the whole file.
        with open(file, "rb") as stream, safe_open(file, framework="numpy"):
            first = stream.read(8)
            text = stream.read(struct.unpack("<Q", first)[0])
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read the file ({error.strerror}).") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{file}: truncated, damaged, or not a safetensors file ({error}). Download it again."
        ) from error
    entries = json.loads(text)
    metadata = entries.pop(METADATA, None) or {}
    tensors = [_stored(file, name, entry, 8 + len(text)) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
    return Header(file, first + text, metadata, {tensor.name: tensor for tensor in tensors})


def _stored(file: Path, name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    return StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), data + begin, end - begin)
