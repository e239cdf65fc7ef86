"""The header of a safetensors file: which tensors are where. Read without the data, and written with tensors added.

Source of the format: https://github.com/huggingface/safetensors#format: eight bytes with the length of the JSON that
follows, then the data; offsets count from the end of that JSON, and leave no gap.
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

#: What safetensors itself allows.
_LONGEST = 100_000_000
_METADATA = "__metadata__"
#: Of these weights are folded; the names are those of the format.
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
class Stored:
    """A tensor in a safetensors file.

    Attributes:
        file: the file.
        name: its key.
        dtype: as the format calls it, such as "BF16".
        shape: its shape.
        start: where its bytes begin, from the beginning of the file.
        size: how many there are.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Added:
    """A tensor that a header is to get: as `Stored`, without a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        file: the file.
        raw: its bytes up to the data.
        metadata: its text entries.
        tensors: key -> tensor, in the order of the data.
    """

    file: Path
    raw: bytes
    metadata: Mapping[str, str]
    tensors: Mapping[str, Stored]


def read_header(file: Path) -> Header:
    """Read and check a header.

    Raises:
        CheckpointError: the file cannot be read, is cut short or damaged; it names the file.

    >>> read_header(Path("nowhere.safetensors"))
    Traceback (most recent call last):
    hra_fx.errors.CheckpointError: nowhere.safetensors: cannot be read (No such file or directory). Give a file ...
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            first = stream.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
            text = stream.read(length) if length <= min(size - 8, _LONGEST) else b""
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}). Give a file that can be read.") from error
    try:
        entries = json.loads(text)
        metadata = entries.pop(_METADATA, {})
        tensors = [_stored(file, name, entry, 8 + length) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"its header of {length} bytes cannot be read") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end or tensor.size < 0:
            raise _damaged(file, f"{tensor.name!r} begins at byte {tensor.start}, and what is before it ends at {end}")
        end += tensor.size
    if end != size:
        raise _damaged(file, f"its header tells of {end} bytes, and it has {size}")
    return Header(file, first + text, metadata, {tensor.name: tensor for tensor in tensors})


def extended(header: Header, added: Sequence[Added]) -> tuple[bytes, list[Stored | Added]]:
    """The bytes of a header with tensors added, and the order of the data.

    As safetensors does it, wide numbers come before narrow ones, so that every tensor stays aligned.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"a": torch.ones(2)}, Path(folder, "x.safetensors"))
    ...     header = read_header(Path(folder, "x.safetensors"))
    >>> [tensor.name for tensor in extended(header, [Added("b", "F64", (1,), 8)])[1]]
    ['b', 'a']
    """
    order: list[Stored | Added] = list(header.tensors.values())
    for new in added:
        places = (i for i, other in enumerate(order) if _width(other) < _width(new))
        order.insert(next(places, len(order)), new)
    return (_written(header.metadata, order) if added else header.raw), order


def dtype_name(dtype: torch.dtype) -> str | None:
    """What the format calls a dtype, where it is a usual one.

    >>> dtype_name(torch.bfloat16)
    'BF16'
    """
    return next((name for name, known in _DTYPES.items() if known is dtype), None)


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype that the format calls so, where it is a usual one."""
    return _DTYPES.get(name)


def _stored(file: Path, name: str, entry: Mapping[str, Any], data: int) -> Stored:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(name)
    return Stored(file, name, str(entry["dtype"]), shape, data + begin, end - begin)


def _width(tensor: Stored | Added) -> float:
    return tensor.size / max(1, math.prod(tensor.shape))


def _written(metadata: Mapping[str, str], order: Iterable[Stored | Added]) -> bytes:
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
    return CheckpointError(f"{file}: is cut short or damaged, or is no safetensors file ({reason}). Fetch it again.")
