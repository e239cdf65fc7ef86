"""Read the header of a safetensors file without its data, and write one with additional tensors.

Source of the format: https://github.com/huggingface/safetensors#format: eight bytes with the length of the JSON that
follows, then the data without gaps; offsets count from the end of the JSON.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hra_fx.errors import CheckpointError

#: The limit of safetensors itself.
_LONGEST = 100_000_000
_METADATA = "__metadata__"
#: Dtypes of weights that can be folded, by their names in the format.
FLOATS: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_DTYPES: Mapping[str, torch.dtype] = {
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
class NewTensor:
    """A tensor to be added to a file: like `StoredTensor`, without a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
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
        size = file.stat().st_size
        with open(file, "rb") as stream:
            first = stream.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
            text = stream.read(length) if length <= min(size - 8, _LONGEST) else b""
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read the file ({error.strerror}).") from error
    try:
        entries = json.loads(text)
        metadata = entries.pop(_METADATA, {})
        tensors = [_stored(file, name, entry, 8 + length) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"invalid header of {length} bytes") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end or tensor.size < 0:
            raise _damaged(file, f"{tensor.name!r} starts at byte {tensor.start} instead of {end}")
        end += tensor.size
    if end != size:
        raise _damaged(file, f"{end} bytes according to the header, {size} in the file")
    return Header(file, first + text, metadata, {tensor.name: tensor for tensor in tensors})


def extended(header: Header, added: Sequence[NewTensor]) -> tuple[bytes, list[StoredTensor | NewTensor]]:
    """The bytes of a header with tensors added, and the order of the data.

    As in safetensors, wider dtypes come first, which keeps every tensor aligned.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"a": torch.ones(2)}, Path(folder, "x.safetensors"))
    ...     header = read_header(Path(folder, "x.safetensors"))
    >>> [tensor.name for tensor in extended(header, [NewTensor("b", "F64", (1,), 8)])[1]]
    ['b', 'a']
    """
    order: list[StoredTensor | NewTensor] = list(header.tensors.values())
    for new in added:
        places = (i for i, other in enumerate(order) if _width(other) < _width(new))
        order.insert(next(places, len(order)), new)
    return (_written(header.metadata, order) if added else header.raw), order


def dtype_name(dtype: torch.dtype) -> str | None:
    """The format's name of a dtype, if it has one.

    >>> dtype_name(torch.bfloat16)
    'BF16'
    """
    return next((name for name, known in _DTYPES.items() if known is dtype), None)


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype of a name in the format, if torch has it."""
    return _DTYPES.get(name)


def _stored(file: Path, name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(name)
    return StoredTensor(file, name, str(entry["dtype"]), shape, data + begin, end - begin)


def _width(tensor: StoredTensor | NewTensor) -> float:
    return tensor.size / max(1, math.prod(tensor.shape))


def _written(metadata: Mapping[str, str], order: Iterable[StoredTensor | NewTensor]) -> bytes:
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for tensor in order:
        offsets = [end, end + tensor.size]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file}: truncated, damaged, or not a safetensors file ({reason}). Download it again.")
